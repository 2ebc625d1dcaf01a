"""Scripts start and say what they should; what they measure is not tested."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from scripts._bench import SHAPES, Work
from tests.conftest import REPO


def run(child_env, *argv, **more):
    done = subprocess.run(
        [sys.executable, *argv],
        env=child_env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_least_times_of_two_targets(child_env):
    out = run(child_env, "scripts/roofline.py", "v5e-4", "h100x2", "--", "--mesh.fsdp", "2")
    head, _, tpu, gpu = out.strip().splitlines()
    assert "bound by" in head and tpu.startswith("| v5e-4 | 2 x 2 x 1 x 1 |") and gpu.startswith("| h100x2 | 1 x 2 x")
    done = subprocess.run(
        [sys.executable, "scripts/roofline.py"], env=child_env, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "name at least one target" in done.stderr


@pytest.mark.parametrize("role", ["rollout", pytest.param("update", marks=pytest.mark.slow)])
def test_a_ragged_contender_answers(child_env, role):
    work = Work(SHAPES["tiny"], "float32", 2, 4, 8, 32, 4, slots=2, packing=True, mean_tokens=10)
    out = run(child_env, "scripts/bench_ragged.py", "--worker", role, json.dumps(asdict(work)), input="1\n")
    about, calls = (json.loads(line) for line in out.splitlines())
    assert "jax" in about["about"]
    assert 0 < calls["calls"][0]["useful"] <= 1
