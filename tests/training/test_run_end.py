"""Ends of a run before run.steps: by accuracy, by patience, by hours; and the trace of some of its steps."""

from __future__ import annotations

import gzip
import json
import logging
import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pspo_jax as pj
from pspo_jax.commands.train import main
from pspo_jax.config.run_stages import EvalConfig
from pspo_jax.report import main as report
from pspo_jax.training.run_end import OUT_OF_TIME, early_end
from tests.runs.processes import SMALL, flags, lines_of

scores = st.lists(st.one_of(st.none(), st.sampled_from([math.nan, 0.0, 0.25, 0.5, 0.75, 1.0])), max_size=12)


@given(scores, st.integers(0, 4), st.sampled_from([None, 0.5, 0.75]))
def test_the_rule_of_patience_and_target(found, patience, target):
    """Against the definition: the last `patience` evaluations are none of them above the best before them."""
    known = [-math.inf if x is None or math.isnan(x) else x for x in found]
    reached = target is not None and any(x >= target for x in known)
    before, after = known[: len(known) - patience], known[len(known) - patience :]
    tired = patience > 0 and len(known) >= patience and max(after) <= max(before, default=-math.inf)
    line = early_end(EvalConfig(patience=patience, target=target), [(10 * i, x) for i, x in enumerate(found)])
    assert (line is not None) == (reached or tired)
    assert line is None or line.startswith("eval.target=" if reached else "eval.patience=")


def small(folder, **fields):
    values = SMALL | {"run.dir": str(folder), "run.steps": 4, "sft.steps": 0, "eval.samples": 1, "eval.every": 1}
    return pj.replace(pj.Config(), values | {k.replace("__", "."): v for k, v in fields.items()})


@pytest.mark.slow
def test_patience_ends_a_run_and_more_of_it_goes_on_with_a_trace(tmp_path, caplog, capsys):
    """An untrained policy answers nothing right, so the first evaluation after that of step 0 is no better."""
    caplog.set_level(logging.INFO, "pspo_jax")
    result = pj.train(small(tmp_path, eval__patience=1))
    assert (result.step, result.finished, result.ended_by) == (1, True, "eval.patience")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1
    assert "ended after step 1 of 4, saved: eval.patience=1: " in caplog.text
    again = pj.train(small(tmp_path, eval__patience=1))
    assert again.finished and again.ended_by == "eval.patience" and again.scores == result.scores
    assert "leave eval.patience out to train on" in caplog.text and lines_of(tmp_path) == 2
    more = pj.train(small(tmp_path, run__profile="2:3", run__profile_memory=True))
    assert (more.step, more.finished, more.ended_by) == (4, True, "run.steps")
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = Counter(event.get("name") for event in events)
    assert {event["args"]["step_num"] for event in events if event.get("name") == "step"} == {"2", "3"}
    assert all(names[name] >= 2 for name in ("select", "rollout", "verify", "update"))
    memory = tmp_path / "profile" / "memory_000003.prof"
    assert gzip.decompress(memory.read_bytes())
    assert report([str(tmp_path), "--out", str(tmp_path / "pages" / "r.html")]) == 0
    page = (tmp_path / "pages" / "r.html").read_text()
    for path in (trace, memory):
        assert f'"../{path.relative_to(tmp_path).as_posix()}"' in page


@pytest.mark.slow
def test_hours_stop_a_run_in_time_and_more_hours_go_on(tmp_path):
    ends, began = [], time.monotonic()

    def slow(step, metrics):
        time.sleep(0.5)
        ends.append(time.monotonic() - began)

    result = pj.train(small(tmp_path, run__steps=1000, run__hours=15 / 3600, eval__every=0), callbacks=[slow])
    assert (result.finished, result.ended_by) == (False, "run.hours") and result.step == len(ends)
    assert max(ends, default=0.0) < 15  # A machine that is slow to compile may leave no time for any step.
    steps = result.step + 1
    done = pj.train(small(tmp_path, run__steps=steps, run__hours=1.0, eval__every=0))
    assert (done.step, done.ended_by) == (steps, "run.steps")
    assert lines_of(tmp_path) == steps + 1


def test_the_exit_code_of_a_run_that_is_out_of_time(tmp_path, capsys):
    assert main(flags(tmp_path, run__hours=1e-6, sft__steps=0)) == OUT_OF_TIME == 75
    assert "run.hours: stopped before anything was begun; the same command begins again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("run.profile", "12:10", "must be steps from 1 on in order, such as 10:12 or 10"),
        ("run.profile", "0:3", "must be steps from 1 on in order"),
        ("run.profile", "3:5", "step 5 is after the last one, run.steps=4"),
        ("run.hours", 0.0, "must be greater than 0"),
        ("eval.target", 1.5, "must be at most 1"),
        ("eval.patience", -1, "must be at least 0"),
        ("log.to", "wandbb", "is no logger; choose among tensorboard, wandb, trackio, mlflow"),
        ("log.to", "wandb,wandb", "wandb appears twice"),
        ("log.project", "mine", "add wandb, trackio or mlflow to log.to"),
        ("run.profile_memory", True, "set run.profile"),
    ],
)
def test_bad_values_get_one_line(tmp_path, field, value, words):
    with pytest.raises(pj.ConfigError, match=f"^{field}=") as refused:
        pj.train(pj.replace(small(tmp_path), {field: value}))
    assert words in str(refused.value) and "\n" not in str(refused.value)
