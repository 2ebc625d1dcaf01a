"""Whole runs with carry-over: equal to plain ones where nothing is carried, and others where something is."""

from __future__ import annotations

import json

import pytest

import pspo_jax as pj
from tests.runs.processes import SMALL, TIMES

FIELDS = SMALL | {
    "model.width": 16,
    "rollout.max_new_tokens": 12,
    "run.steps": 4,
    "run.fingerprint": True,
    "checkpoint.every": 1,
    "sft.steps": 0,
    "eval.every": 0,
    "eval.samples": 1,
    "log.report": False,
    "log.to": "none",
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup": 0,
}


def odd_length(completions, answers):
    """A reward that differs within groups of a policy that has learned nothing."""
    return [float(len(completion) % 2) for completion in completions]


def run(folder, **fields):
    """The lines of metrics.jsonl of a run, without times."""
    values = FIELDS | {"run.dir": str(folder)} | {name.replace("__", "."): value for name, value in fields.items()}
    pj.train(pj.replace(pj.Config(), values), reward=odd_length)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


@pytest.mark.slow
def test_with_a_budget_of_the_longest_completion_a_run_is_a_plain_one_to_the_bit(tmp_path):
    plain = run(tmp_path / "plain")
    whole = run(tmp_path / "whole", rollout__carry=True, rollout__budget=12)
    assert plain[1]["crc/params"] != plain[4]["crc/params"]
    for before, after in zip(plain, whole, strict=True):
        assert {name: after[name] for name in before if name != "crc/replay"} == {
            name: value for name, value in before.items() if name != "crc/replay"
        }
    more = {name: value for name, value in whole[-1].items() if name not in plain[-1]}
    assert more == {
        "rollouts/rounds": 1,
        "carry/versions_mean": 1,
        "carry/versions_max": 1,
        "carry/stale_tokens": 0,
        "carry/age_max": 0,
        "carry/unfinished": 0,
        "carry/waiting": 0,
        "carry/ess": 1,
        "carry/weight_mean": 0,
        "carry/weight_max": 0,
        "carry/capped": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"loss__old_log_probs": "interpolated"}, {"algorithm__name": "pspo"}])
def test_carry_over_acts(tmp_path, fields):
    """Tokens of older policies are trained on, with weights that are not 1, and groups wait."""
    carried = run(tmp_path / "run", rollout__carry=True, rollout__budget=5, **fields)
    assert max(line["rollouts/rounds"] for line in carried[1:]) > 1
    assert any(line["carry/unfinished"] > 0 for line in carried[1:])
    stale = [line for line in carried[1:] if line["carry/stale_tokens"] > 0]
    assert stale and all(line["carry/versions_max"] > 1 and line["carry/age_max"] >= 1 for line in stale)
    if "loss__old_log_probs" not in fields:
        assert any(abs(line["carry/weight_mean"] - 1) > 1e-4 and line["carry/ess"] < 1 for line in stale)
    assert all(line["rollouts/total"] == 32 * line["step"] for line in carried[1:])
