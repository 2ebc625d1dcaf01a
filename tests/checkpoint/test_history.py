"""What a run folder keeps of its run: settings that may change, damaged logs, traces without a checkpoint."""

from __future__ import annotations

import json

import pytest
import yaml

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.runs import history
from pspo_jax.runs.access import read_lines, read_summary
from pspo_jax.runs.run_folder import RunLog, write_json
from tests.helpers import tiny_config

CONFIG = tiny_config(run__steps=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"run.steps": 8},
        {"optimizer.learning_rate": 1e-4, "optimizer.warmup": 0},
        {"optimizer.schedule": "constant", "optimizer.final_fraction": 0.5, "optimizer.max_skipped": 50},
        {"model.source": "/moved", "model.tokenizer": "/moved"},
        {"task.train_data": "/moved/rows.jsonl", "task.heldout_data": "/moved/test.jsonl"},
        {"eval.every": 3, "checkpoint.keep": 9, "model.remat": "full"},
    ],
)
def test_what_may_change_is_said_and_noted(tmp_path, fields):
    found = history.changes(tmp_path, history.settings(CONFIG), replace(CONFIG, fields))
    assert {change.field: change.new for change in found} == fields
    lines = history.record(tmp_path, 3, found)
    assert len(lines) == len(fields) and all("up to step 3" in line and "\n" not in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert [(r["step"], r["field"], r["new"]) for r in records] == [(3, c.field, c.new) for c in found]


@pytest.mark.parametrize(
    "fields", [{"optimizer.b2": 0.5}, {"rollout.prompts": 4}, {"task.train_prompts": 50}, {"run.seed": 1}]
)
def test_what_makes_it_another_run_is_refused(tmp_path, fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ConfigError, match=rf"{name}=.* there, {value} now"):
        history.changes(tmp_path, history.settings(CONFIG), replace(CONFIG, fields))


def test_moved_data_of_a_mixture_may_change_and_its_weights_may_not(tmp_path):
    def mixed(path, weight):
        return replace(CONFIG, {"task.mixture": json.dumps([{"name": "gsm8k", "train_data": path, "weight": weight}])})

    saved = history.settings(mixed("/a", 1))
    assert [c.field for c in history.changes(tmp_path, saved, mixed("/b", 1))] == ["task.mixture"]
    with pytest.raises(ConfigError, match=r"task.mixture"):
        history.changes(tmp_path, saved, mixed("/b", 2))


def test_flags_that_are_said_once_are_not_kept(tmp_path):
    told = replace(CONFIG, {"task.allow_change": True, "run.start_over": True})
    history.write_config(tmp_path, told)
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert kept["task"]["allow_change"] is False and kept["run"]["start_over"] is False
    assert history.settings(told) == history.settings(CONFIG)


@pytest.mark.parametrize("trace", ["checkpoints.damaged", "metrics.jsonl", "strategy.jsonl", "summary.json"])
def test_traces_of_a_run_without_a_checkpoint_are_not_begun_over(tmp_path, trace):
    history.refuse_lost(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    history.refuse_lost(tmp_path)
    if trace == "checkpoints.damaged":
        (tmp_path / trace / "3").mkdir(parents=True)
    else:
        (tmp_path / trace).write_text('{"step": 0}\n{"step": 5}\n')
    with pytest.raises(ConfigError, match=rf"{trace}.*--run.start_over true"):
        history.refuse_lost(tmp_path)
    (tmp_path / "cold_start").mkdir()
    aside = history.start_over(tmp_path)
    assert (aside / trace).exists() and (tmp_path / "cold_start").exists()
    history.refuse_lost(tmp_path)
    assert history.start_over(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    assert history.start_over(tmp_path).name == "2" and (tmp_path / "set_aside" / "1" / trace).exists()


def test_garbage_in_a_log_loses_no_other_line(tmp_path):
    lines = [json.dumps({"step": step, "reward": 0.5}).encode() for step in range(6)]
    lines[2] = b'\xff\xfe{"step": 2'
    lines[4] = b'"no record"'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 6, "rew')
    before, said = path.read_bytes(), []
    log = RunLog(tmp_path, 5, tensorboard=False, say=said.append)
    log.metrics(6, {"reward": 0.5})
    assert [record["step"] for record in read_lines(path)[0]] == [0, 1, 3, 5, 6]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert said == [f"{path}: 2 lines are damaged and left out; the file as it was is metrics.jsonl.damaged"]


def test_a_log_that_is_gone_is_said_to_be(tmp_path):
    said = []
    RunLog(tmp_path, 5, tensorboard=False, say=said.append)
    assert "ends at step -1, and the checkpoint is of step 5" in said[0]
    (tmp_path / "strategy.jsonl").write_text('{"step": 3}\n')
    said.clear()
    RunLog(tmp_path, 5, tensorboard=False, say=said.append, strategy_lines=2)
    assert said[1] == f"{tmp_path / 'strategy.jsonl'}: 1 of its 2 lines are lost"


def test_a_damaged_summary_counts_as_none(tmp_path):
    assert read_summary(tmp_path) is None
    whole = {"eval": {"greedy": 0.5, "sampled": 0.4}, "steps": 4, "rollouts": 1, "tokens": 1, "seconds": {}}
    write_json(tmp_path / "summary.json", whole)
    assert read_summary(tmp_path) == whole
    for words in (b"", b"{", b"\xff", b"[]", b"3", b'{"steps": 4}'):
        (tmp_path / "summary.json").write_bytes(words)
        assert read_summary(tmp_path) is None


def test_a_damaged_config_is_known_to_be(tmp_path):
    assert history.config_is_whole(tmp_path)
    for words, whole in ((b"run: {steps: 3}\n", True), (b"run: [1\n", False), (b"\xff\xfe\x00", False), (b"", False)):
        (tmp_path / "config.yaml").write_bytes(words)
        assert history.config_is_whole(tmp_path) == whole


def test_a_rewards_tracebacks_fill_no_disk(tmp_path):
    """A value in the text, half a surrogate pair, many places: each place once, and a megabyte at most."""
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in range(500):
        log.errors(step, [f'Traceback:\n  File "a.py", line 3, in f\nValueError: {step} \ud800'])
    path = tmp_path / "reward_errors.log"
    assert path.read_text().count("ValueError") == 1 and "\\ud800" in path.read_text()
    for line in range(3000):
        log.errors(1, [f'Traceback:\n  File "a.py", line {line}, in g\nKeyError: {"x" * 20000}'])
    assert path.stat().st_size < 2**20 + 200
