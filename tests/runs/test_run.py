"""Real runs in real processes: resume to the bit, stop on signals, one device equals eight, bad input."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from pspo_jax.commands.train import main
from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.model import built_in, transformer
from pspo_jax.report import main as report
from tests.helpers import relative, slow_except
from tests.runs.processes import SMALL, finish, flags, lines_of, metrics, params, start, wait_for_step


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of run folders: siblings share their cold start."""
    return tmp_path_factory.mktemp("runs")


WHOLE = {
    "log__to": "tensorboard",
    "algorithm__name": "popo",
    "selection__name": "pps",
    "advantage__name": "ers",
    "replay__memory": "pinned_host",
    "loss__num_iterations": 2,
    "loss__minibatches": 2,
}
"""All that has a state, and several updates in a step: checkpoints are taken between steps, never inside a batch."""


@pytest.fixture(scope="module")
def uninterrupted(child_env, runs):
    """A finished reference run in which some groups were mixed and some were replayed."""
    folder = runs / "reference"
    out = finish(start(child_env, folder, **WHOLE))
    seconds = re.search(r"compiled in ([\d.]+) s, ([\d.]+) of them waited for: .*\bstep ", out)
    assert seconds and float(seconds[2]) < float(seconds[1])  # it went on beside the cold start
    assert sum(line.get("groups/effective", 0) for line in metrics(folder)) >= 3
    assert sum(line.get("replay/share", 0) for line in metrics(folder)) > 0
    return folder


@pytest.mark.parametrize("times", slow_except([1], [1, 10]))
def test_killed_at_random_moments_and_resumed_to_the_bit(child_env, uninterrupted, runs, times):
    """SIGKILL, at random moments and in the middle of saves, and a SIGTERM; then let it end."""
    rng = random.Random(0)
    folder, kills, during_save = runs / f"killed-{times}", 0, 0
    while kills < times:
        process = start(child_env, folder, **WHOLE, checkpoint__every=1)
        seen = wait_for_step(process, folder, at_least=kills)
        if kills % 2:
            during_save += _wait_for_partial_save(process, folder)
        else:
            time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills += 1
        assert seen
    logged = lines_of(folder)
    process = start(child_env, folder, **WHOLE, checkpoint__every=1000)
    assert wait_for_step(process, folder, at_least=max(logged, kills + 2))
    process.terminate()
    out = finish(process)
    if "stopped after step" in out:
        assert re.search(r"stopped after step \d+, saved", out)
        assert "resuming at step" in finish(start(child_env, folder, **WHOLE))
    assert during_save >= times // 5
    assert metrics(folder) == metrics(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, params(folder), params(uninterrupted))


def _wait_for_partial_save(process, folder):
    """Until a checkpoint is half written; False if none was caught within two seconds."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and process.poll() is None:
        if any("tmp" in name for name in os.listdir(folder / "checkpoints")):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_cleanly(child_env, uninterrupted, runs, number):
    folder = runs / f"stopped-{number}"
    process = start(child_env, folder, **WHOLE, checkpoint__every=1000)
    assert wait_for_step(process, folder, at_least=2)
    process.send_signal(number)
    out = finish(process, code=0)
    if "stopped after step" in out:
        assert re.search(r"stopped after step \d+, saved", out)
        assert "resuming at step" in finish(start(child_env, folder, **WHOLE, checkpoint__every=1000))
    assert metrics(folder) == metrics(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("pspo", {}),
        ("aper", {"replay__memory": "pinned_host"}),
        ("dapo", {"rollout__oversampling": 1.5, "replay__name": "popo"}),
    ],
)
def test_two_iterations_resume_at_the_step_boundary(child_env, uninterrupted, runs, algorithm, more):
    """Checkpoints are taken between steps, never inside a batch: the documented boundary. What is stored and what waits
    is in them."""
    fields = {
        "algorithm__name": algorithm,
        "loss__num_iterations": 2,
        "loss__minibatches": 2,
        "run__steps": 6,
        "checkpoint__every": 2,
        **more,
    }
    whole, killed = runs / f"two-whole-{algorithm}", runs / f"two-killed-{algorithm}"
    finish(start(child_env, whole, **fields))
    process = start(child_env, killed, **fields)
    assert wait_for_step(process, killed, at_least=3)
    process.kill()
    process.wait()
    process.stdout.close()
    finish(start(child_env, killed, **fields))
    assert metrics(killed) == metrics(whole)
    assert algorithm == "pspo" or sum(line.get("replay/share", 0) for line in metrics(whole)) > 0
    jax.tree.map(np.testing.assert_array_equal, params(killed), params(whole))


@pytest.mark.parametrize(
    ("algorithm", "mesh"),
    [
        pytest.param("popo", {"mesh__data": 2, "mesh__fsdp": 2, "mesh__context": 2}, marks=pytest.mark.slow),
        pytest.param("popo", {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow),
        pytest.param("pspo", {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow),
        pytest.param("pspo", {"mesh__fsdp": 4, "rollout__weights": "split"}, marks=pytest.mark.slow),
        pytest.param("pspo", {"mesh__data": 8}, marks=pytest.mark.slow),
        pytest.param("popo", {"mesh__data": 8}, marks=pytest.mark.slow),
        pytest.param("aper", {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow),
        pytest.param("dapo", {"mesh__data": 4, "mesh__tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_one_device_equals_eight(child_env, runs, algorithm, mesh):
    """Same prompt ids and tokens for 20 steps, parameters to 1e-5 relative, on one device and on a mesh of eight."""
    one, other = runs / f"{algorithm}-one", runs / f"{algorithm}-{'-'.join(f'{k}{v}' for k, v in mesh.items())}"
    shared = {"run__steps": 20, "algorithm__name": algorithm, "log__completions_every": 0}
    if algorithm == "popo":  # all that has a state, in one run
        shared |= {"selection__name": "pps", "advantage__name": "ers"}
    if not one.exists():
        finish(start(child_env, one, **shared))
    finish(start(child_env, other, devices=8, **mesh, **shared))
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("crc/prompt_ids", "crc/tokens", "reward", "replay/share"):
            assert a.get(key) == b.get(key), (a["step"], key)
    assert relative(params(one)["params"], params(other)["params"]) < 1e-5


@pytest.mark.slow
def test_damaged_checkpoint_falls_back_to_the_one_before(child_env, uninterrupted, runs):
    folder = shutil.copytree(uninterrupted, runs / "damaged")
    step = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    files = [p for p in (folder / "checkpoints" / str(step) / "state").rglob("d/*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    largest.write_bytes(bytes(data))
    out = finish(start(child_env, folder, **WHOLE))
    assert f"checkpoint {step} is damaged" in out and "resuming at step" in out
    assert (folder / "checkpoints.damaged" / str(step)).exists()
    assert metrics(folder) == metrics(uninterrupted)


def run_bad(capsys, argv):
    """The one line that bad input gets, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        argv_before, sys.argv = sys.argv, ["train", *map(str, argv)]
        try:
            command_line.run(main, "pspo_jax.train")
        finally:
            sys.argv = argv_before
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run.stepz", "3"], ["run.stepz", "run.steps"]),
        (["--optimiser.learning_rate", "3"], ["optimiser.learning_rate", "optimizer.learning_rate"]),
        (["--run.steps", "many"], ["run.steps", "many"]),
        (["--algorithm.name", "ppo"], ["algorithm.name", "ppo", "pspo"]),
        (["--rollout.prompts", "-4"], ["rollout.prompts=-4", "at least 1"]),
        (["--rollout.top_p", "1.5"], ["rollout.top_p=1.5", "at most 1"]),
        (["--rollout.temperature", "nan"], ["rollout.temperature", "number"]),
        (["--rollout.prompts", "1000"], ["rollout.prompts=1000", "512", "without replacement"]),
        (["--model.kv_heads", "3"], ["model.kv_heads=3", "model.heads=8"]),
        (["--mesh.data", "8", "--rollout.prompts", "12"], ["= 8", "rollout.prompts=12", "4 would"]),
        (["--mesh.tensor", "3"], ["mesh.tensor=3", "devices"]),
        (["--mesh.data", "1", "--mesh.tensor", "3"], ["mesh.tensor=3", "model.heads=8"]),
        (["--mesh.data", "64"], ["mesh.data=64", "there are 8"]),
        (["--optimizer.learning_rate", "inf"], ["optimizer.learning_rate=inf", "finite"]),
        (["--run.dir="], ["run.dir", "folder"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "No such file"]),
        (["--sft.data", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
    ],
)
def test_bad_input_gets_one_line(capsys, tmp_path, argv, words):
    line = run_bad(capsys, ["--run.dir", tmp_path / "r", "--log.progress", "false", *argv])
    for word in words:
        assert word in line, line


def test_bad_yaml_gets_one_line(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {stepz: 3}\n")
    assert "run.steps" in run_bad(capsys, ["--config", path])
    path.write_text("3: 4\n")
    assert "3: there is no such stage" in run_bad(capsys, ["--config", path])
    path.write_text("run: [1\n")
    assert "not YAML" in run_bad(capsys, ["--config", path])


def test_unwritable_folder_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "run.dir=" in run_bad(capsys, ["--run.dir", tmp_path / "file" / "run"])


def test_folder_of_another_config_says_what_differs(capsys, uninterrupted):
    other = {"algorithm__name": "pspo", "replay__name": "popo", "loss__minibatches": 1}
    other |= {"optimizer__b2": 0.5, "eval__every": 3}
    argv = flags(uninterrupted, **WHOLE | other)
    line = run_bad(capsys, argv)
    assert "optimizer.b2=0.95 there, 0.5 now" in line
    assert "algorithm.name=popo there, pspo now" in line
    assert "eval.every" not in line


def test_a_finished_run_says_so(child_env, uninterrupted):
    before = metrics(uninterrupted, drop=("-",))
    out = finish(start(child_env, uninterrupted, **WHOLE))
    assert "is finished; choose another --run.dir" in out and "held-out greedy" in out and "compiled" not in out
    assert metrics(uninterrupted, drop=("-",)) == before


def test_what_a_run_leaves_behind(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert set(summary) == {"eval", "steps", "rollouts", "tokens", "seconds"}
    assert set(summary["eval"]) == {"greedy", "sampled", "no_verdict"}
    phases = {"setup", "load", "compile", "sft", "select", "rollout", "verify", "update", "eval", "total"}
    assert set(summary["seconds"]) == phases
    assert summary["rollouts"] == 12 * 8 * 4
    lines = metrics(uninterrupted, drop=("-",))
    assert [line["step"] for line in lines] == list(range(13))
    for name in ("reward", "entropy", "clip_ratio/region_mean", "completions/clipped_ratio", "num_tokens",
                 "learning_rate", "grad_norm", "frac_reward_zero_std", "rewards/accuracy/mean"):  # fmt: skip
        assert name in lines[1]
    assert list(uninterrupted.glob("events.out.tfevents*"))
    dump = (uninterrupted / "completions" / "step_000004.jsonl").read_text().splitlines()
    line = json.loads(dump[0])
    expected = {"prompt", "answer", "completion", "found", "reward", "rewards/accuracy", "advantage", "weight", "end"}
    assert expected <= set(line) and len(dump) == 4 * 4
    rewards = np.array([json.loads(x)["reward"] for x in dump]).reshape(4, 4)
    advantages = np.array([json.loads(x)["advantage"] for x in dump]).reshape(4, 4)
    assert ((rewards - rewards.mean(1, keepdims=True)) * advantages >= -1e-6).all()
    assert (uninterrupted / "cold_start" / "settings.json").exists()


def test_the_table_of_prompts_adds_up(uninterrupted, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert report(["--prompts", str(uninterrupted)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    rows = parquet.read_table(paths[0]).to_pylist()
    n = yaml.safe_load((uninterrupted / "config.yaml").read_text())["task"]["train_prompts"]
    assert [row["id"] for row in rows] == list(range(n))
    assert sum(row["visits"] for row in rows) == 12 * 8
    for row in rows:
        assert row["text"].endswith("=") and row["task"] == "arithmetic" and row["priority"] > 0
        assert (row["last_step"] < 0) == (row["visits"] == 0) == (row["success"] is None)
    page = paths[1].read_text()
    assert page.count("<tr>") == n + 1 and rows[0]["text"] in page
    for words, complaint in (
        (["--prompts", str(tmp_path)], "config.yaml"),
        (["--prompts", str(uninterrupted), "--step", "7"], "no such checkpoint"),
        (["--prompts", str(uninterrupted), "--out", "x.html"], "--out x.html"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            report(words)


def test_a_table_of_prompts_needs_no_machine_for_the_runs_kernel(uninterrupted, tmp_path, capsys):
    pytest.importorskip("pyarrow.parquet")
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["attention"] = "splash"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert report(["--prompts", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_embedded_policy_exports_too(uninterrupted, tmp_path, child_env):
    """transformers loads it, with its character tokenizer, and continues a prompt as the policy does."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="torch is a test dependency; install '.[test]'")
    out = tmp_path / "out"
    call = [sys.executable, "-m", "pspo_jax.export", "--run", str(uninterrupted), "--out", str(out)]
    done = subprocess.run(call, env=child_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    exported = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("27-4+8-3=")["input_ids"]
    assert tokenizer.decode(ids) == "27-4+8-3=" and tokenizer.eos_token == "$"
    trained = params(uninterrupted)["params"]
    a = built_in(replace(Config(), {k: v for k, v in SMALL.items() if k.startswith("model.")}).model, 16)
    model = transformer(a)
    ours = model.logits(trained, model.hidden(trained, np.array([ids])))
    with torch.no_grad():
        theirs = exported(torch.tensor([ids])).logits
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= 1e-4
    again = subprocess.run(call, env=child_env, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr and again.stderr.count("\n") == 1
