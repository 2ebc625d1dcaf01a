"""Runs with carry-over in processes of their own: killed and resumed to the bit, on one device and on eight."""

from __future__ import annotations

import json
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests.helpers import relative
from tests.runs.processes import finish, metrics, params, start, wait_for_step

pytestmark = pytest.mark.slow

CARRY = {
    "algorithm__name": "pspo",
    "rollout__carry": True,
    "rollout__budget": 6,
    "loss__minibatches": 2,
    "run__steps": 24,
    "checkpoint__every": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of run folders: siblings share their cold start."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(child_env, runs):
    """A finished reference run that has trained on tokens of older policies."""
    folder = runs / "reference"
    finish(start(child_env, folder, **CARRY))
    lines = metrics(folder)[1:]
    assert sum(line["carry/stale_tokens"] for line in lines) > 0 and any(line["carry/unfinished"] for line in lines)
    return folder


@pytest.mark.timeout(1800)
def test_killed_twenty_times_and_resumed_to_the_bit(child_env, uninterrupted, runs):
    """SIGKILL at random moments, each after one more step; then the run may end."""
    rng, folder = random.Random(0), runs / "killed"
    for kills in range(20):
        process = start(child_env, folder, **CARRY)
        assert wait_for_step(process, folder, at_least=kills)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    out = finish(start(child_env, folder, **CARRY))
    assert "resuming at step" in out
    assert metrics(folder) == metrics(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, params(folder), params(uninterrupted))


@pytest.mark.timeout(900)
def test_eight_devices_equal_one(child_env, uninterrupted, runs):
    """Prompts, tokens and pending groups are equal; weights but for rounding."""
    one, eight = runs / "one", runs / "eight"
    fields = CARRY | {"run__steps": 6, "loss__minibatches": 1}
    finish(start(child_env, one, **fields))
    finish(start(child_env, eight, devices=8, mesh__data=8, **fields))
    names = (
        "crc/prompt_ids",
        "crc/tokens",
        "carry/stale_tokens",
        "carry/unfinished",
        "carry/waiting",
        "rollouts/rounds",
    )
    for before, after in zip(metrics(one)[1:], metrics(eight)[1:], strict=True):
        assert [before[name] for name in names] == [after[name] for name in names], json.dumps([before, after])
    assert relative(params(eight)["params"], params(one)["params"]) < 1e-4


def test_changed_data_are_refused(child_env, uninterrupted):
    """Unfinished groups hold prompts of the data before."""
    more = {"task__train_prompts": 44, "task__allow_change": True, "run__steps": 25}
    out = finish(start(child_env, uninterrupted, **(CARRY | more)), code=2)
    assert "rollout.carry=true keeps unfinished groups of the prompts before" in out
