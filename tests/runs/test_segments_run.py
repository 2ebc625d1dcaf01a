"""Runs of the embedded task with images: they learn to see, are resumed to the bit, and are evaluated and exported."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.distributed.processes import finish_all, launch
from tests.runs.processes import finish, lines_of, metrics, params, start, wait_for_step

SEGMENTS = {
    "task__name": "segments",
    "sft__steps": 60,
    "run__steps": 8,
    "checkpoint__every": 1,
    "eval__every": 4,
}
STATES = {
    "popo": {"algorithm__name": "popo", "rollout__chunks": 2, "loss__minibatches": 2, "loss__kl_coef": 0.01},
    "dapo": {"algorithm__name": "dapo", "rollout__slots": 8, "task__image_widths": "24,32"},
    "aper": {"algorithm__name": "aper", "loss__packing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_killed_and_resumed_to_the_bit(child_env, tmp_path, name):
    fields = SEGMENTS | STATES[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out = finish(start(child_env, whole, **fields))
    assert "parameters, cold start" in out
    process = start(child_env, killed, **fields)
    assert wait_for_step(process, killed, at_least=3)
    process.kill()
    process.wait()
    process.stdout.close()
    assert lines_of(killed) < 9
    finish(start(child_env, killed, **fields))
    assert metrics(killed) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, params(killed), params(whole))
    control = [line["eval/greedy_other_images"] for line in metrics(whole) if "eval/greedy" in line]
    assert len(control) == 3
    lines = (whole / "completions" / "step_000004.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines[:2])
    assert "[image 3x3]" in first["prompt"] or "[image 4x3]" in first["prompt"]
    assert len(first["images"]) == 1 and second["images"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "within", [{"mesh__data": 4, "mesh__fsdp": 2}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}]
)
def test_two_slices_of_four_devices_equal_one_device(child_env, tmp_path, within):
    fields = SEGMENTS | STATES["popo"] | {"run__steps": 6, "log__completions_every": 0, "rollout__prompts": 32}
    one, eight = tmp_path / "one", tmp_path / "eight"
    finish(start(child_env, one, **fields))
    finish(start(child_env, eight, devices=8, mesh__slices=2, **within, **fields))
    for a, b in zip(metrics(one), metrics(eight), strict=True):
        assert all(a.get(name) == b.get(name) for name in ("crc/prompt_ids", "crc/tokens"))
    for a, b in zip(jax.tree.leaves(params(one)), jax.tree.leaves(params(eight)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh__data": 2, "mesh__fsdp": 2}, {"mesh__data": 2, "mesh__context": 2}])
def test_four_devices_equal_one(child_env, tmp_path, mesh):
    fields = SEGMENTS | STATES["popo"] | {"run__steps": 6, "log__completions_every": 0}
    one, four = tmp_path / "one", tmp_path / "four"
    finish(start(child_env, one, **fields))
    finish(start(child_env, four, devices=4, **mesh, **fields))
    for a, b in zip(metrics(one), metrics(four), strict=True):
        assert all(a.get(name) == b.get(name) for name in ("crc/prompt_ids", "crc/tokens"))


@pytest.mark.slow
def test_two_processes_do_what_one_does(child_env, tmp_path):
    fields = SEGMENTS | STATES["popo"] | {"run__steps": 4, "log__completions_every": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(child_env, one, **fields))
    finish_all(two, launch(child_env, two, processes=2, devices=1, **fields))
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in ("crc/prompt_ids", "crc/tokens", "eval/greedy", "eval/greedy_other_images"):
            assert a.get(name) == b.get(name), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_policy_learns_to_see(child_env, tmp_path):
    """The defaults, with half of the cold start and of the steps."""
    words = {"task.name": "segments", "algorithm.name": "grpo", "run.dir": tmp_path / "run", "run.steps": 40}
    flags = [str(word) for k, v in (words | {"sft.steps": 900}).items() for word in (f"--{k}", v)]

    def call(module, *words):
        line = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(line, env=child_env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    call("pspo_jax.train", *flags)
    lines = [line for line in metrics(tmp_path / "run") if "eval/greedy" in line]
    assert lines[-1]["eval/greedy"] > lines[0]["eval/greedy"] + 0.15
    assert max(line["eval/greedy_other_images"] for line in lines) < 0.15
    out = tmp_path / "out"
    call("pspo_jax.evaluate", "--run", tmp_path / "run", "--samples", 1, "--temperature", 0, "--out", out)
    problems = [json.loads(line) for line in (out / "step_40" / "segments.jsonl").read_text().splitlines()[1:]]
    right = np.mean([problem["right"][0] for problem in problems])
    np.testing.assert_allclose(right, lines[-1]["eval/greedy"], atol=1e-6)
    assert "data:image/png;base64," in (tmp_path / "run" / "report.html").read_text()
