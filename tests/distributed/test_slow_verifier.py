"""A host whose verifier is slow delays a step by its own work: rollouts go on, and delays of two hosts do not add up."""

import json
import subprocess

import numpy as np
import pytest

from tests.conftest import REPO
from tests.distributed.processes import free_port
from tests.runs.test_text_run import command, place  # noqa: F401

SECONDS = 4.0
WAITS = """
import time

def waits(prompts, completions, **columns):
    time.sleep({seconds})
    return [0.0] * len(completions)
"""


def medians(env, place, name, seconds):  # noqa: F811
    """Median seconds of a step's rollout and of its verification in a run of one process for each verifier."""
    address = f"127.0.0.1:{free_port()}"
    started = []
    for number, slow in enumerate(seconds):
        where = place / f"{name}-{number}"
        where.mkdir()
        (where / "my_waits.py").write_text(WAITS.format(seconds=slow))
        fields = {
            "run__steps": 4,
            "reward__terms": "accuracy=1, my_waits:waits=1",
            "checkpoint__every": 10,
            "distributed__coordinator": address,
            "distributed__processes": len(seconds),
            "distributed__process": number,
        }
        words = command(place, name, **fields)
        env = env | {"PYTHONPATH": str(REPO)}
        started.append(
            subprocess.Popen(words, env=env, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 1]
    return [float(np.median([line[f"time/{phase}"] for line in steps])) for phase in ("rollout", "verify")]


@pytest.mark.slow
def test_a_slow_verifier_delays_a_step_by_its_own_work_alone(child_env, place):  # noqa: F811
    rollout, verify = medians(child_env, place, "one-slow", (0, SECONDS))
    assert rollout < SECONDS / 2
    assert SECONDS <= verify < 1.5 * SECONDS
    rollout, verify = medians(child_env, place, "both-slow", (SECONDS, SECONDS))
    assert rollout < SECONDS / 2
    assert SECONDS <= verify < 1.5 * SECONDS
