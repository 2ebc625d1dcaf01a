"""A host whose verifier is slow delays a step by its own work: not the rollouts, and no more if another is slow too."""

import json
import subprocess

import numpy as np
import pytest

from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from tests.conftest import REPO
from tests.distributed.processes import free_port
from tests.runs.test_text_run import command

SECONDS = 4.0
WAITS = """
import time

def waits(prompts, completions, **columns):
    time.sleep({seconds})
    return [0.0] * len(completions)
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a tokenizer of 16 characters and rows."""
    TOKENIZER.to_hf().save_pretrained(tmp_path / "tokenizer")
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {a + b}"} for a in range(10, 40) for b in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def medians(env, place, name, seconds):
    """Median seconds of a step's rollout and of its verification in a run of one process for each verifier."""
    address = f"127.0.0.1:{free_port()}"
    started = []
    for number, slow in enumerate(seconds):
        where = place / f"{name}-{number}"
        where.mkdir()
        (where / "my_waits.py").write_text(WAITS.format(seconds=slow))
        fields = {
            "run__steps": 4,
            "rollout__prompts": 2,
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
def test_a_slow_verifier_delays_a_step_by_its_own_work_alone(child_env, place):
    rollout, verify = medians(child_env, place, "one-slow", (0, SECONDS))
    assert rollout < SECONDS / 2
    assert SECONDS <= verify < 1.75 * SECONDS
    rollout, verify = medians(child_env, place, "both-slow", (SECONDS, SECONDS))
    assert rollout < SECONDS / 2
    assert SECONDS <= verify < 1.75 * SECONDS
