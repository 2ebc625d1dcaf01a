"""Runs in a bucket: the files, the lease, checkpoints and whole runs, on a server of localhost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("gcsfs", reason="gcsfs is a test dependency; install '.[test]'")

from etils import epath

import pspo_jax as pj
from pspo_jax.checkpoint.reading import read_params, saved_steps
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.export import main as export
from pspo_jax.report import main as report
from pspo_jax.runs import home, lease
from pspo_jax.runs.mirror import Mirror, reading
from pspo_jax.runs.run_folder import open_folder
from pspo_jax.system import buckets
from pspo_jax.system.storage import StorageError
from tests import xla
from tests.checkpoint.trees import abstract, tree
from tests.distributed.processes import finish_all, launch
from tests.helpers import TINY
from tests.runs.gcs import environment, serving
from tests.runs.processes import TIMES, flags, metrics

URL = "gs://bucket"


@pytest.fixture(scope="module")
def server():
    """The server that this process takes for Google Cloud Storage."""
    with serving() as found, environment(found.env):
        yield found


@pytest.fixture
def store(server):
    """The server's objects: none, and no fault."""
    server.store.objects.clear()
    server.store.fault = lambda method, path: None
    yield server.store
    server.store.fault = lambda method, path: None


NAMES = st.sampled_from(["a", "b", "folder/a", "folder/b", "folder/deep/a"])
STEPS = st.one_of(
    st.tuples(st.just("write"), NAMES, st.binary(max_size=20)),
    st.tuples(st.just("remove"), st.sampled_from(["a", "b", "folder", "folder/deep"]), st.just(None)),
    st.tuples(st.just("move"), st.sampled_from(["a", "folder"]), st.sampled_from(["moved/1", "moved/2"])),
)


@settings(max_examples=10)
@given(steps=st.lists(STEPS, max_size=6))
@example(steps=[("write", "a", b"\r"), ("write", "b", b"\r\n\r\n--")])
def test_a_bucket_and_a_local_folder_answer_alike(server, steps):
    """The same calls on both, after any history: contents, listings, and what is there."""
    server.store.objects.clear()
    with tempfile.TemporaryDirectory() as local:
        places = Path(local), epath.Path(f"{URL}/run")
        for call, name, value in steps:
            for place in places:
                if call == "write":
                    if isinstance(place, Path):
                        (place / name).parent.mkdir(parents=True, exist_ok=True)
                    buckets.write(place / name, value)
                elif call == "remove":
                    buckets.remove(place / name)
                elif buckets.exists(place / name) and not buckets.exists(place / value):
                    buckets.move(place / name, place / value)
            # Folders that hold no file are there on a disk alone.
            for folder in sorted((p for p in Path(local).rglob("*") if p.is_dir()), reverse=True):
                if not any(folder.iterdir()):
                    folder.rmdir()
            files = {p.relative_to(local).as_posix(): p.read_bytes() for p in Path(local).rglob("*") if p.is_file()}
            assert {name: buckets.read_bytes(places[1] / name) for name in files} == files
            assert {name: thing.size for name, thing in buckets.objects(places[1]).items()} == {
                name: len(data) for name, data in files.items()
            }
            for name in (".", "folder", "folder/deep", "moved", "a"):
                there = [place / name if name != "." else place for place in places]
                if not files and name == ".":
                    continue
                assert buckets.exists(there[0]) == buckets.exists(there[1]), name
                listed = [[child.name for child in buckets.children(place)] for place in there]
                assert listed[0] == listed[1] or there[0].is_file(), name


def test_one_of_many_makes_an_object_and_refusals_are_one_line(store):
    place = epath.Path(f"{URL}/run/one")
    made: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: made.append(buckets.create(place, b"%d" % i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    store.fault = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(
        StorageError, match=rf"^{place}: cannot be written \(Forbidden: .*\); once it can, .*carries on$"
    ):
        buckets.write(place, b"")
    assert buckets.exists(place)
    store.fault = lambda method, path: 401
    for call in (buckets.exists, buckets.children, buckets.read_bytes):
        with pytest.raises(OSError, match="refused, 401") as caught:
            call(place)
        assert caught.value.refused


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/run", "must be a folder, or gs://BUCKET/FOLDER of Google Cloud Storage"),
        ("gs://bucket", "must name a folder in a bucket"),
        ("gs://bucket/a b", "must name a folder in a bucket"),
        ("gs://bucket/a/../b", "must name a folder in a bucket"),
        ("gs://none/run", "there is no such bucket"),
    ],
)
def test_a_url_that_names_no_folder_of_a_bucket_is_refused(store, url, words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        open_folder(url)
    assert str(caught.value).startswith(f"run.dir={url}: ") and words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_refuses_and_a_missing_package_are_told_apart(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for status in (401, 403):
        store.fault = lambda method, path, status=status: status
        with pytest.raises(ConfigError, match=r"the bucket refuses .* storage\.objectUser .* gcloud auth"):
            open_folder(f"{URL}/run")
    store.fault = lambda method, path: None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"run.dir=gs://.*/file/\.cache/.*, which stands for it.*: Not a dir"):
        open_folder(f"{URL}/run")
    monkeypatch.setattr(home.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gcsfs; pip install 'pspo-jax\[gcs\]'"):
        open_folder(f"{URL}/run")


def test_a_working_folder_and_its_bucket_hold_the_same_files(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    folder = open_folder(f"{URL}/a/run/")
    assert home.home_of(folder) == epath.Path(f"{URL}/a/run") and home.home_of(tmp_path) == tmp_path
    assert open_folder(f"{URL}/a/run") == folder != open_folder(f"{URL}/a")
    mirror = Mirror(folder, home.home_of(folder), {})
    (folder / "completions").mkdir()
    (folder / "completions" / "step_1.jsonl").write_text("1")
    (folder / "metrics.jsonl").write_text("one\n")
    for name in ("run.lock", "x.partial"):
        (folder / name).write_text("own")
    mirror.push()
    assert store.names() == ["a/run/completions/step_1.jsonl", "a/run/metrics.jsonl"]
    store.requests.clear()
    mirror.push()
    assert not store.requests
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    (folder / "completions" / "step_1.jsonl").unlink()
    mirror.push()
    assert {name: store.read(name) for name in store.names()} == {"a/run/metrics.jsonl": b"one\ntwo\n"}
    for name in ("checkpoints/0/d", "cold_start/x", "set_aside/1/metrics.jsonl", "events.out.tfevents.1"):
        store.put(f"a/run/{name}", b"large", {})
    # What was logged after the last copy is no part of the run.
    (folder / "stray.txt").write_text("x")
    mirror.pull()
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        "home.json",
        "metrics.jsonl",
        "run.lock",
        "x.partial",
    ]
    with reading(f"{URL}/a/run") as (copy, keep):
        assert copy.name == "run" and (copy / "metrics.jsonl").read_bytes() == b"one\ntwo\n"
        (copy / "report.html").write_text("page")
        keep()
        with pytest.raises(ConfigError, match=f"^{URL}/a/run: no$"), home.named(copy):
            raise ConfigError(f"{copy}: no")
    assert store.read("a/run/report.html") == b"page" and not copy.exists()


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed and end fast."""
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "EXPIRY", 1.0)


def test_a_lease_is_held_given_back_and_taken_over_when_its_holder_is_silent(store, quick, monkeypatch):
    place, said = epath.Path(f"{URL}/run"), []
    with lease.held(place, "a", said.append) as check:
        with pytest.raises(ConfigError, match=rf"^run.dir={place}: is held by process {os.getpid()} on .* since "):
            lease._acquire(place, {"holder": "b", "id": "b"}, said.append)
        check()
    assert len(said) == 1 and "has not given this run back" in said[0]
    said.clear()
    with lease.held(place, "b", said.append) as check:
        assert not said  # the one before was given back
        with lease.held(place, "b", said.append):
            assert not said  # the same working folder, whose lock says that the process before is dead
            until = time.monotonic() + 5
            with pytest.raises(ConfigError, match="took this run over"):
                while time.monotonic() < until:
                    check()
                    time.sleep(0.02)
    number, last = lease._newest(place)
    assert number == 3 and last["released"] and store.names("run/run.lock/") == ["run/run.lock/000003.json"]
    buckets.write(lease._path(place, 4), json.dumps({"holder": "gone", "id": "x", "time": time.time()}).encode())
    with lease.held(place, "c", said.append):
        assert lease._newest(place)[0] == 5 and "gone has not given this run back" in said[-1]
    said.clear()
    buckets.write(lease._path(place, 6), json.dumps({"holder": "old", "id": "x", "time": time.time() - 9e3}).encode())
    with lease.held(place, "c", said.append):
        assert not said


def test_checkpoints_are_restored_set_aside_and_cleared_in_a_bucket(store):
    folder, said = epath.Path(f"{URL}/run/checkpoints"), []
    with Checkpoints(folder, CheckpointConfig(every=1, keep=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"note": step}, {"greedy": 0.5})
    store.objects.pop("run/checkpoints/3/commit_success.txt")  # as if killed while it was written
    array = next(name for name in store.names("run/checkpoints/2/state/ocdbt.process_0/d/"))
    data = bytearray(store.read(array))
    data[len(data) // 2] ^= 1
    store.put(array, bytes(data), {})
    assert saved_steps(folder) == [1, 2]
    with Checkpoints(folder, CheckpointConfig(), said.append) as checkpoints:
        assert checkpoints.steps() == [1, 2] and not said
        state, metadata = checkpoints.restore(abstract(tree(1)), said.append)
        assert metadata["note"] == 1 and len(said) == 1 and "checkpoint 2 is damaged" in said[0], said
        jax.tree.map(np.testing.assert_array_equal, state, tree(1))
        assert saved_steps(folder) == [1] and not store.names("run/checkpoints/3/")
        assert store.names("run/checkpoints.damaged/2/state/") and not store.names("run/checkpoints/2/")
        checkpoints.save(2, tree(2), {"note": 2})
        checkpoints.wait()
        assert checkpoints.steps() == saved_steps(folder) == [1, 2]


def test_a_bucket_that_refuses_a_save_ends_it_or_is_asked_again(store):
    folder, said = epath.Path(f"{URL}/run/checkpoints"), []
    with pytest.raises(StorageError) as raised, Checkpoints(folder, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, tree(1), {"note": 1})
        checkpoints.wait()
        store.fault = lambda method, path: 403 if method == "POST" else None
        checkpoints.save(2, tree(2), {"note": 2})
        checkpoints.wait()
    line = str(raised.value)
    assert re.fullmatch(
        rf"{folder}: checkpoint 2 could not be written \(.*\); checkpoint 1 is whole; once .*", line, re.DOTALL
    )
    assert "\n" not in line
    store.fault = lambda method, path: None
    retry = CheckpointConfig(every=1, on_error="retry", retry_minutes=1)
    with Checkpoints(folder, retry, said.append) as checkpoints:
        store.fault = lambda method, path: 403 if len(said) < 2 else None
        checkpoints.save(2, tree(2), {"note": 2})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert len(said) == 2 and all("it is tried again in" in line for line in said), said
    assert saved_steps(folder) == [1, 2]


def _config(folder, **fields):
    return pj.replace(
        pj.Config(),
        TINY
        | {
            "run.dir": str(folder),
            "run.steps": 4,
            "run.fingerprint": True,
            "run.compilation_cache": "off",
            "checkpoint.every": 2,
            "sft.steps": 20,
            "eval.samples": 1,
        }
        | fields,
    )


def _metrics(data: bytes):
    lines = [json.loads(line) for line in data.decode().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


@pytest.mark.slow
def test_a_run_in_a_bucket_carries_on_from_an_empty_disk_to_the_bit(store, tmp_path, monkeypatch, capsys):
    """Stopped in a cold start and after a step; the disk is erased each time. Then every command reads the bucket."""
    url = f"{URL}/runs/run"
    local = pj.train(_config(tmp_path / "local"))
    for machine, stop in enumerate((3, 4)):
        monkeypatch.setenv("HOME", str(tmp_path / f"machine-{machine}"))
        result = pj.train(_config(url), callbacks=[lambda step, _, stop=stop: step == stop])
        assert result.finished == (stop == 4)
        shutil.rmtree(tmp_path / f"machine-{machine}")
    assert result.scores == local.scores
    jax.tree.map(np.testing.assert_array_equal, result.state.params, local.state.params)
    assert _metrics(store.read("runs/run/metrics.jsonl")) == metrics(tmp_path / "local")
    there = {name.removeprefix("runs/run/") for name in store.names("runs/run/")}
    files = {p.relative_to(tmp_path / "local").as_posix() for p in (tmp_path / "local").rglob("*") if p.is_file()}
    exact = {name for name in files if not re.search("checkpoints|cold_start/params|tfevents|run.lock", name)}
    assert exact <= there, exact - there
    for name in exact - {"report.html", "summary.json", "metrics.jsonl", "config.yaml", "cold_start/files.json"}:
        assert store.read(f"runs/run/{name}") == (tmp_path / "local" / name).read_bytes(), name
    # The readers, on another machine, leave nothing there.
    monkeypatch.setenv("HOME", str(tmp_path / "reader"))
    monkeypatch.chdir(tmp_path)
    store.objects.pop("runs/run/report.html")
    with monkeypatch.context() as context:
        context.setattr(jax.config, "update", lambda *_: None)
        assert report([url]) == 0
        assert report([url, "--prompts"]) == 0
        assert export(["--run", url, "--out", str(tmp_path / "model"), "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{url}/report.html" in said and f"{url}/prompts.html" in said
    assert {"runs/run/report.html", "runs/run/prompts.parquet"} <= set(store.names())
    step = read_params(tmp_path / "local" / "checkpoints", 2)[0]
    other = read_params(epath.Path(f"{url}/checkpoints"), 2)[0]
    jax.tree.map(np.testing.assert_array_equal, step, other)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not list((tmp_path / "reader").glob("**/*.jsonl"))


QUICK = """
import sys
from pspo_jax.commands.train import main
from pspo_jax.config import command_line
from pspo_jax.runs import lease
lease.BEAT, lease.EXPIRY = 0.5, 3.0
command_line.run(main, "pspo_jax.train")
"""
FIELDS = {"run__steps": 4, "checkpoint__every": 2, "sft__steps": 20, "model__layers": 1, "log__report": True}


def _train(env, machine, folder, **fields):
    machine.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, *flags(folder, **FIELDS, **fields)],
        env=env | {"HOME": str(machine), "XLA_FLAGS": xla.flags(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process, code=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


@pytest.mark.slow
def test_a_killed_process_is_followed_by_another_machine(child_env, server, store, tmp_path):
    """SIGKILL once checkpoint 2 is whole; a second machine waits for the lease, and a third beside it is refused."""
    url, env = f"{URL}/runs/run", child_env | server.env
    _finish(_train(child_env, tmp_path / "home", tmp_path / "local"))
    first = _train(env, tmp_path / "first", url)
    until = time.monotonic() + 200
    while "runs/run/checkpoints/2/files.json" not in store.objects and first.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert "runs/run/summary.json" not in store.objects
    shutil.rmtree(tmp_path / "first")
    out = _finish(_train(env, tmp_path / "second", url))
    assert "has not given this run back" in out and "resuming at step 2 of 4" in out, out
    assert _metrics(store.read("runs/run/metrics.jsonl")) == metrics(tmp_path / "local")
    ours, theirs = (read_params(place / "checkpoints", 4)[0] for place in (tmp_path / "local", epath.Path(url)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    run_there = [sys.executable, "-m", "pspo_jax.evaluate", "--run", url, "--steps", "latest"]
    for words in ("384/384", f"was in {url}/evaluation/step_4/arithmetic.jsonl"):
        there = env | {"HOME": str(tmp_path / "reader")}
        found = subprocess.run(run_there, env=there, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0 and f"written to {url}/evaluation" in found.stdout, found.stdout + found.stderr
        assert words.replace("384", "16") in found.stdout, found.stdout
    # A run that is alive is not taken over, and one in a bucket that fails ends with one line.
    with lease.held(epath.Path(url), "another", print):
        writing = threading.Event()
        beats = threading.Thread(target=_beat, args=(epath.Path(url), writing))
        beats.start()
        out = _finish(_train(env, tmp_path / "third", url), code=2)
        writing.set()
        beats.join()
    assert out.splitlines()[-1].startswith(f"pspo_jax.train: error: run.dir={url}: is held by process {os.getpid()} ")
    store.fault = lambda method, path: 403 if method == "POST" and store.names("runs/other/run.lock/") else None
    out = _finish(_train(env, tmp_path / "fourth", f"{URL}/runs/other"), code=1)
    last = out.splitlines()[-1]
    assert last.startswith(f"pspo_jax.train: error: {URL}/runs/other/") and "cannot be written (Forbidden: " in last


def _beat(place, done):
    """Renew the newest lease twice a second, as this process's own thread does every 20 seconds."""
    number, found = lease._newest(place)
    for beats in range(1000):
        if done.wait(0.5):
            return
        buckets.write(lease._path(place, number), json.dumps(found | {"beats": 1000 + beats}).encode())


@pytest.mark.slow
def test_processes_of_one_run_share_a_bucket(child_env, server, store, tmp_path):
    """Two processes of two devices write their shards to the bucket, and give what they give on a disk."""
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    url, fields = f"{URL}/runs/run", FIELDS | mesh | {"optimizer__schedule": "constant"}
    finish_all(tmp_path / "local", launch(child_env, tmp_path / "local", 2, 2, **fields))
    (tmp_path / "home").mkdir()
    env = child_env | server.env | {"HOME": str(tmp_path / "home")}
    for steps in (2, 4):
        started = launch(env, tmp_path / "run", 2, 2, **(fields | {"run__dir": url, "run__steps": steps}))
        finish_all(tmp_path / "run", started)
        shutil.rmtree(tmp_path / "home" / ".cache" / "pspo_jax" / "runs")
    assert _metrics(store.read("runs/run/metrics.jsonl"))[-1]["step"] == 4
    assert store.names("runs/run/checkpoints/4/state/ocdbt.process_1/")
    ours, theirs = (read_params(place / "checkpoints", 4)[0] for place in (tmp_path / "local", epath.Path(url)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
