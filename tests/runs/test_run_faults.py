"""Faults of the machine under real runs: nothing is lost, nothing is silent, and the same command carries on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from tests.checkpoint.trees import fill, small_disk
from tests.runs.processes import finish, metrics, params, start

FIELDS = {"sft__steps": 0, "run__steps": 24, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def whole(child_env, tmp_path_factory):
    """A run that met no fault."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    finish(start(child_env, folder, **FIELDS))
    return folder


def wait_for(process, condition, seconds=200):
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def same_end(folder, whole):
    assert metrics(folder) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, params(folder), params(whole))


def test_a_second_process_is_refused_and_spoilt_files_lose_nothing(child_env, whole, tmp_path):
    """The first one is killed; config, logs, prompts' hashes and the newest checkpoint are spoilt; it carries on."""
    folder = tmp_path / "run"
    first = start(child_env, folder, **FIELDS)
    wait_for(first, lambda: (folder / "checkpoints" / "4" / "files.json").exists())
    first.send_signal(signal.SIGSTOP)
    assert first.poll() is None and not (folder / "summary.json").exists()
    out = finish(start(child_env, folder, **FIELDS), code=2)
    assert re.search(rf"run.dir=.*held by process {first.pid} on ", out) and out.count("\n") == 1, out
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (folder / "config.yaml").write_bytes(b"\xff\xferun: [")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    (folder / "run.lock").write_bytes(b"\xff\x00")
    (folder / "summary.json").write_text("{")
    for path in (folder / "prompts").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    newest = max((p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert int(newest.name) >= 4
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    out = finish(start(child_env, folder, **FIELDS))
    assert f"checkpoint {newest.name} is damaged (state/manifest.ocdbt has 0 of" in out, out
    assert "config.yaml: is damaged" in out and "Traceback" not in out, out
    assert (folder / "checkpoints.damaged" / newest.name).exists()
    same_end(folder, whole)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_the_same_command_carries_on(child_env, whole, tmp_path):
    with small_disk(tmp_path / "disk", 20_000) as disk:
        folder = disk / "run"
        process = start(child_env, folder, **FIELDS)
        wait_for(process, lambda: (folder / "checkpoints" / "2" / "files.json").exists())
        filler = fill(disk)
        out = finish(process, code=1)
        last = out.strip().splitlines()[-1]
        assert "No space left on device" in last and "free" in last and "Traceback" not in out, out
        out = finish(start(child_env, folder, **FIELDS), code=1)
        assert "Traceback" not in out and "No space left on device" in out, out
        filler.unlink()
        finish(start(child_env, folder, **FIELDS))
        same_end(folder, whole)


@pytest.mark.slow
def test_a_full_disk_is_waited_for_if_told_to(child_env, whole, tmp_path):
    with small_disk(tmp_path / "disk", 20_000) as disk:
        folder = disk / "run"
        process = start(child_env, folder, **FIELDS, checkpoint__on_error="retry", checkpoint__retry_minutes=5)
        wait_for(process, lambda: (folder / "checkpoints" / "0" / "files.json").exists())
        filler = fill(disk)
        time.sleep(3)
        filler.unlink()
        out = finish(process)
        assert "tried again" in out, out
        same_end(folder, whole)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_and_other_rates(child_env, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = (folder / "config.yaml").read_bytes()
    out = finish(start(child_env, folder, **FIELDS | {"run__steps": 3}), code=2)
    assert "run.steps=3" in out and "has done 24 steps already" in out and out.count("\n") == 1
    out = finish(start(child_env, folder, **FIELDS, optimizer__b2=0.5), code=2)
    assert "optimizer.b2=0.95 there, 0.5 now" in out and (folder / "config.yaml").read_bytes() == before
    out = finish(start(child_env, folder, **FIELDS | {"run__steps": 26}, optimizer__learning_rate=1e-4))
    assert "run.steps: 24 up to step 24, 26 from here on" in out and "optimizer.learning_rate: 0.0008" in out
    assert [line["step"] for line in metrics(folder)] == list(range(27))
    assert json.loads((folder / "summary.json").read_text())["steps"] == 26
    assert [json.loads(x)["field"] for x in (folder / "changes.jsonl").read_text().splitlines()] == [
        "run.steps",
        "optimizer.learning_rate",
    ]


@pytest.mark.slow
def test_a_run_without_its_checkpoints_is_not_begun_over_silently(child_env, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.move(folder / "checkpoints", folder / "checkpoints.damaged")
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix != ".lock"}
    out = finish(start(child_env, folder, **FIELDS), code=2)
    assert "metrics.jsonl reaches step 24" in out and "--run.start_over true" in out and out.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix != ".lock"} == before
    out = finish(start(child_env, folder, **FIELDS, run__start_over=True))
    assert (folder / "set_aside" / "1" / "checkpoints.damaged" / "24").exists()
    same_end(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_at_any_time_leaves_what_the_same_command_carries_on(child_env, whole, tmp_path, number):
    """During the start, the compilation, the first evaluation, and steps."""
    for after in ("run.lock", "config.yaml", "metrics.jsonl"):
        folder = tmp_path / after
        process = start(child_env, folder, **FIELDS)
        wait_for(process, (folder / after).exists)
        process.send_signal(number)
        out = finish(process)
        assert "the same command" in out or "held-out greedy" in out, out
        finish(start(child_env, folder, **FIELDS))
        same_end(folder, whole)


@pytest.mark.slow
def test_a_cold_start_that_is_stopped_carries_on_to_the_bit(child_env, tmp_path):
    fields = FIELDS | {"sft__steps": 3000, "sft__batch": 4, "sft__share": False, "run__steps": 2}
    one, other = tmp_path / "one", tmp_path / "other"
    finish(start(child_env, one, **fields))
    process = start(child_env, other, **fields)
    wait_for(process, (other / "config.yaml").exists)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out = finish(process)
    assert "stopped during the cold start, saved" in out, out
    assert (other / "cold_start.progress" / "settings.json").exists()
    finish(start(child_env, other, **fields))
    assert not (other / "cold_start.progress").exists()
    same_end(other, one)
