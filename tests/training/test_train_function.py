"""`pspo_jax.train` as a library call: own tasks, own rewards, callbacks, errors; and the module of the same name."""

from __future__ import annotations

import importlib
import json
import logging
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import pspo_jax as pj
from pspo_jax.checkpoint.reading import saved_steps
from tests.conftest import REPO
from tests.runs.processes import SMALL

sys.path.insert(0, str(REPO / "examples"))
import own_reward
import own_task

PAGES_SIZES = {"model__width": 16, "model__heads": 2, "model__kv_heads": 2, "model__mlp_width": 32}
PAGES_SIZES |= {"rollout__prompts": 8, "rollout__group_size": 4}
"""Those of the task in docs/extending/task.md, whose programs are then found in the compilation cache."""
SHORT = {"run__steps": 2, "checkpoint__every": 1} | PAGES_SIZES


def small(folder, **fields):
    values = SMALL | {"run.dir": str(folder), "run.steps": 3, "sft.steps": 0, "log.report": False, "eval.samples": 1}
    return pj.replace(pj.Config(), values | {k.replace("__", "."): v for k, v in fields.items()})


def test_an_own_task_is_trained_saved_and_carried_on(tmp_path):
    first = own_task.main(str(tmp_path), **SHORT)
    assert (first.step, first.finished, first.folder) == (2, True, tmp_path)
    assert saved_steps(tmp_path / "checkpoints") and int(first.state.step) == 2
    again = own_task.main(str(tmp_path), **SHORT)
    assert again.finished and again.scores == first.scores
    longer = own_task.main(str(tmp_path), **(SHORT | {"run__steps": 3}))
    assert longer.step == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "name: own\n" in (tmp_path / "config.yaml").read_text()


@pytest.mark.slow
def test_an_own_reward_takes_the_place_of_the_tasks_and_a_callback_stops_the_run(tmp_path, capsys):
    fields = {k.replace(".", "__"): v for k, v in SMALL.items()} | {"sft__steps": 0, "eval__samples": 1}
    result = own_reward.main(str(tmp_path), wanted=0.0, **fields)
    assert (result.step, result.finished) == (1, False)
    assert saved_steps(tmp_path / "checkpoints")[-1] == 1
    assert capsys.readouterr().out.startswith("step 1: reward ")


@pytest.mark.slow
def test_rewards_and_metrics_are_those_of_the_function(tmp_path):
    seen, metrics = [], {}

    def reward(completions, answers):
        seen.append((len(completions), len(answers)))
        return [0.25] * len(completions)

    result = pj.train(small(tmp_path), reward=reward, callbacks=[lambda step, values: metrics.update({step: values})])
    assert (result.finished and result.scores["greedy"] == pytest.approx(0.0)) or result.scores["greedy"] <= 0.25
    assert all(a == b for a, b in seen) and (8 * 4, 8 * 4) in seen
    assert sorted(metrics) == [1, 2, 3] and "eval/greedy" in metrics[3]
    assert max(values["reward"] for values in metrics.values()) <= 0.25


def test_it_prints_nothing_leaves_signal_handlers_alone_and_logs(tmp_path, capfd, caplog):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    inside = []

    def look(step, metrics):
        inside[:] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    with caplog.at_level(logging.INFO, "pspo_jax"):
        pj.train(small(tmp_path, run__steps=1), callbacks=[look])
    assert inside == handlers
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert any("before training" in line for line in caplog.messages)


@pytest.fixture(scope="module")
def library_run(tmp_path_factory):
    """(folder, result) of three steps as a library call."""
    folder = tmp_path_factory.mktemp("library")
    return folder, pj.train(small(folder, run__fingerprint=True))


@pytest.mark.slow
def test_the_loop_is_the_commands(tmp_path, child_env, library_run):
    flags = [w for k, v in SMALL.items() for w in (f"--{k}", str(v))]
    more = ["--run.dir", str(tmp_path / "command"), "--run.steps", "3", "--sft.steps", "0", "--log.report", "false"]
    command = [
        sys.executable,
        "-m",
        "pspo_jax.train",
        *flags,
        *more,
        "--run.fingerprint",
        "true",
        "--eval.samples",
        "1",
    ]
    done = subprocess.run(command, env=child_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    def lines(folder):
        text = (folder / "metrics.jsonl").read_text()
        keep = ("crc/prompt_ids", "crc/tokens", "reward", "eval/greedy", "loss")
        return [{k: v for k, v in json.loads(line).items() if k in keep} for line in text.splitlines()]

    assert lines(library_run[0]) == lines(tmp_path / "command")


def test_errors_are_exceptions(tmp_path):
    with pytest.raises(pj.ConfigError, match=r"run\.steps"):
        pj.train(small(tmp_path / "a", run__steps=-1))
    with pytest.raises(pj.ConfigError, match=r"reward\.terms"):
        config = small(tmp_path / "b", reward__terms="accuracy=1,format=1")
        pj.train(config, reward=lambda completions, answers: [0.0] * len(completions))
    with pytest.raises(pj.ConfigError, match="returned 1 values"):
        pj.train(small(tmp_path / "c"), reward=lambda completions, answers: [0.0])
    with pytest.raises(ZeroDivisionError):
        pj.train(small(tmp_path / "d"), reward=lambda completions, answers: [1 / 0])
    with pytest.raises(pj.NoVerdictError, match="have no verdict"):
        pj.train(small(tmp_path / "e"), reward=lambda completions, answers: [None] * len(completions))
    with pytest.raises(pj.ConfigError, match=r"task\.name=own"):
        pj.train(small(tmp_path / "f", task__name="own", task__train_prompts=0))


@pytest.mark.slow
def test_a_negative_reward_stops_a_run_of_maxrl(tmp_path):
    with pytest.raises(pj.ConfigError, match=r"advantage\.name=maxrl: .* a completion of step 1 has -0\.5"):
        config = small(tmp_path, advantage__name="maxrl")
        pj.train(config, reward=lambda completions, answers: [-0.5] * len(completions))


def test_the_state_is_the_callers(library_run):
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(library_run[1].state.params))


def test_train_is_the_function_whatever_is_imported():
    code = (
        "import pspo_jax\n"
        "assert callable(pspo_jax.train)\n"
        "from pspo_jax.commands.train import main\n"
        "import pspo_jax.training.loop\n"
        "try:\n"
        "    import pspo_jax.train\n"
        "    raise SystemExit('the module was imported')\n"
        "except ImportError as error:\n"
        "    assert 'pspo_jax.train(config)' in str(error)\n"
        "assert pspo_jax.train is pspo_jax.training.loop.train\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)
    with pytest.raises(ImportError, match=r"pspo_jax\.commands\.train\.main"):
        importlib.import_module("pspo_jax.train")
    assert callable(pj.train)


def test_a_short_completion_is_read_without_its_end():
    reward = pj.function_reward(
        lambda texts, golds: [float(t == g) for t, g in zip(texts, golds, strict=True)], TOKENIZER
    )
    task = pj.own_task("t", TOKENIZER, [("ab=", "ba")], [("a=", "a")], lambda texts, golds: [0.0] * len(texts), 8)
    tokens = np.array([[TOKENIZER.encode("ba$_"), TOKENIZER.encode("baba")]])
    batch = pj.CompletionBatch(task.train, np.array([0]), tokens, np.array([[3, 2]]), np.array([[True, False]]), step=1)
    result = reward(batch)()
    np.testing.assert_array_equal(result.reward, [[1, 0]])  # the second was cut off
    np.testing.assert_array_equal(pj.function_reward(lambda t, g: [-1.0, -2.0], TOKENIZER)(batch)().reward, [[-1, -2]])


TOKENIZER = own_task.TOKENIZER


PAGE = (REPO / "docs" / "extending" / "task.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.S), ids=["task", "reward", "callback"])
def test_the_pages_examples_run(code, tmp_path):
    names = {"FOLDER": str(tmp_path)}
    exec(compile(code, "task.md", "exec"), names)
    assert names["result"].step >= 1


@pytest.mark.parametrize("name", ["own_task.py", "own_reward.py"])
def test_examples_are_short(name):
    assert len((REPO / "examples" / name).read_text().splitlines()) <= 60
