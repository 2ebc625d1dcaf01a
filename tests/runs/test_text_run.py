"""Text tasks in real processes: chunks, user rewards, runs that must stop, changed data, evaluation that is killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.evaluation.runner import _recover
from pspo_jax.evaluation.statistics import summarise
from pspo_jax.system.progress import Progress
from pspo_jax.training import resume
from pspo_jax.training.setup import place_state, prepare
from tests.checkpoint.records import saved
from tests.helpers import tiny_config
from tests.runs.processes import metrics

FUNCTIONS = '''
import time

def picky(completion, step, question, **rest):
    """Raises on some completions; has no opinion on others."""
    if completion.startswith("7"):
        raise ValueError(f"step {step}: I cannot stand 7")
    return None if completion.startswith("3") else 0.25 * len(question) / len(question)

def loud(completion):
    print("I print", len(completion))
    return 0.0

def lengths(prompts, completions, completion_ids, answer, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == 8
    return [float(len(ids)) for ids in completion_ids]

def asleep(completion):
    time.sleep(60)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer of 16 characters, rows whose answer is 2 or 5, and reward functions.

    Random weights over so few tokens say these now and then. The real tokenizer is test_real_models.py's.
    """
    folder = tmp_path_factory.mktemp("text")
    TOKENIZER.to_hf().save_pretrained(folder / "tokenizer")
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {2 + 3 * (a % 2)}"} for a in range(10, 40) for b in (1, 2)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_rewards.py").write_text(FUNCTIONS)
    return folder


def command(place, name, **fields):
    words = {
        "run.dir": place / name,
        "run.steps": 3,
        "run.fingerprint": True,
        "task.name": "gsm8k",
        "task.train_data": place / "rows.jsonl",
        "task.heldout_prompts": 8,
        "task.cache": place / "cache",
        "prompt.template": "none",
        "model.tokenizer": place / "tokenizer",
        "model.layers": 1,
        "model.width": 32,
        "model.mlp_width": 64,
        "model.compute_dtype": "float32",
        "model.remat": "none",
        "reward.require_end": False,
        "verifier.workers": 2,
        "rollout.prompts": 8,
        "rollout.group_size": 8,
        "rollout.max_new_tokens": 2,
        "rollout.prompt_bucket": 8,
        "eval.every": 0,
        "checkpoint.every": 1,
        "optimizer.learning_rate": 1e-4,
        "log.report": False,
        "log.to": "none",
        "log.completions_every": 1,
        "log.completions": 8,
    } | {k.replace("__", "."): v for k, v in fields.items()}
    return [sys.executable, "-m", "pspo_jax.train", *(w for k, v in words.items() for w in (f"--{k}", str(v)))]


def run(env, place, name, expect=0, **fields):
    done = subprocess.run(
        command(place, name, **fields), env=env, cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


TERMS = "accuracy=1, format=0.5, my_rewards:picky=2, my_rewards:lengths=0.1, my_rewards:loud=1"


@pytest.fixture(scope="module")
def trained(place, child_env):
    """Three steps with two user rewards, one of which raises now and then."""
    done = run(child_env, place, "a", reward__terms=TERMS, reward__format="open_rs", log__completions_format="parquet")
    return place / "a", done.stdout


def test_every_reward_is_logged_and_its_errors_are_kept(trained):
    folder, out = trained
    lines = metrics(folder)[1:]
    for name in ("accuracy", "format", "my_rewards:picky", "my_rewards:lengths"):
        assert all(np.isfinite(line[f"rewards/{name}/mean"]) for line in lines), name
    # What a term raises on has no reward; None is no opinion.
    assert all(line["rewards/no_verdict"] == line["rewards/my_rewards:picky/no_verdict"] for line in lines)
    assert any(line["rewards/no_verdict"] for line in lines)
    assert all(line["rewards/accuracy/no_verdict"] == 0 for line in lines)
    assert out.count("my_rewards:picky has no value for") == 2  # two kinds: None, and ValueError
    errors = (folder / "reward_errors.log").read_text()
    assert "Traceback" in errors and "I cannot stand 7" in errors and "my_rewards.py" in errors
    assert "a reward raised ValueError: step 1: I cannot stand 7" in out
    for step, line in enumerate(lines, 1):
        dump = pyarrow.parquet.read_table(folder / "completions" / f"step_{step:06d}.parquet").to_pylist()
        assert len(dump) == 8 * 8
        for row in dump:
            accuracy, picky = row["rewards/accuracy"], row["rewards/my_rewards:picky"]
            judged = row["completion"].replace("$", "")  # without the stop token
            assert picky is None if judged.startswith(("3", "7")) else picky == 0.25
            total = accuracy + 2 * (picky or 0) + 0.1 * row["rewards/my_rewards:lengths"]
            assert row["reward"] == (None if judged.startswith("7") else pytest.approx(total))
            assert row["reward"] is not None or row["advantage"] == 0
            assert row["rewards/my_rewards:lengths"] == row["length"]
            assert row["end"] == ("stop" if row["completion"].endswith("$") else "length")
            assert accuracy == 0 or row["found"] == row["answer"]
        assert line["rewards/accuracy/mean"] == pytest.approx(np.mean([row["rewards/accuracy"] for row in dump]))
    assert any(line["rewards/accuracy/mean"] > 0 for line in lines)
    assert "I print" in (folder / "workers.log").read_text() and "I print" not in out


@pytest.mark.slow
def test_chunks_change_nothing(trained, place, child_env):
    run(child_env, place, "chunks", reward__terms=TERMS, reward__format="open_rs", rollout__chunks=4)
    for a, b in zip(metrics(trained[0]), metrics(place / "chunks"), strict=True):
        for name in a:
            if name in ("crc/tokens", "crc/prompt_ids"):
                assert a[name] == b[name]
            elif not name.startswith("crc/"):  # products of other shapes round otherwise
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_a_run_without_verdicts_stops_and_says_why(place, child_env):
    """Its shapes are those of the run that is trained, whose programs thus serve."""
    done = run(
        child_env,
        place,
        "asleep",
        expect=1,
        task__name="python_function",
        task__function="my_rewards:asleep",
        verifier__wall_limit=0.5,
        verifier__workers=16,
        reward__require_end=True,
    )
    assert "100% of the completions have no verdict (64 x deadline: no answer after 0.5 s" in done.stdout
    assert "verifier.max_no_verdict=0.25" in done.stdout


@pytest.mark.slow
def test_changed_data_is_refused_with_what_differs_or_followed(trained, place, child_env):
    rows = (place / "rows.jsonl").read_text().split("\n")
    (place / "other.jsonl").write_text("\n".join([*rows[:20], *rows[21:]]))
    shutil.copytree(trained[0], place / "b")
    (place / "b" / "summary.json").unlink()
    shutil.rmtree(place / "b" / "checkpoints" / "3")
    fields = {"reward__terms": TERMS, "reward__format": "open_rs", "task__train_data": place / "other.jsonl"}
    done = run(child_env, place, "b", expect=2, **fields)
    assert done.stderr.count("\n") == 1 and "52 then, 51 now, 0 new, 1 gone" in done.stderr
    assert "--allow-data-change" in done.stderr
    changed = [*command(place, "b", **fields), "--allow-data-change"]
    done = subprocess.run(changed, env=child_env, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "52 then, 51 now, 0 new, 1 gone" in done.stdout and "resuming at step 2 of 3" in done.stdout
    assert "task.train_data: " in done.stdout and "other.jsonl from here on (noted in changes.jsonl)" in done.stdout


def test_statistics_follow_their_prompts(tmp_path):
    """A checkpoint of 40 prompts, read with other data: each prompt that is still there has its own row again."""
    before = prepare(tiny_config(algorithm__name="pspo", run__dir=str(tmp_path)))
    n = len(before.task.train.lengths)
    with jax.set_mesh(before.mesh):
        state = place_state(before, jax.jit(before.model.init)(jax.random.key(0)))
        marks = np.arange(1, n + 1, dtype=np.float32)
        padded = np.pad(marks, (0, len(state.advantage.mean) - n))
        state = state.replace(
            selector=state.selector._replace(per_prompt=jax.device_put(padded, state.selector.per_prompt.sharding)),
            advantage=state.advantage._replace(mean=jax.device_put(-padded, state.advantage.mean.sharding)),
        )
        resume.save_content(before, tmp_path)
        with saved(before, state, tmp_path) as checkpoints:
            refused = prepare(tiny_config(algorithm__name="pspo", run__dir=str(tmp_path), task__train_prompts=56))
            with pytest.raises(ConfigError, match=r"task.train_prompts=40 there, 56 now"):
                resume.restore(refused, tmp_path, checkpoints, Progress(False))
            assert checkpoints.steps() == [3]
            after = refused._replace(config=replace(refused.config, {"task.allow_change": True}))
            found = resume.restore(after, tmp_path, checkpoints, Progress(False))
    assert found is not None
    old = dict(zip(before.task.train.content().tolist(), marks, strict=True))
    wanted = [old.get(h, 0) for h in after.task.train.content().tolist()]
    assert 0 < sum(w > 0 for w in wanted) < 56
    initial = before.config.selection.initial
    np.testing.assert_array_equal(found.state.selector.per_prompt[:56], [w or initial for w in wanted])
    np.testing.assert_array_equal(found.state.advantage.mean[:56], [-w for w in wanted])


def evaluate(env, place, out, *argv):
    words = [sys.executable, "-m", "pspo_jax.evaluate", "--run", str(place / "a"), "--out", str(out)]
    words += ["--benchmarks", "gsm8k", "--data", f"gsm8k={place / 'rows.jsonl'}", "--limit", "24", "--samples", "4"]
    words += ["--k", "1,4", "--batch", "2", "--temperature", "1", "--top-p", "1", "--task.cache", str(place / "cache")]
    return subprocess.Popen(
        [*words, *argv], env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_evaluation_continues_as_if_it_had_not_been(trained, place, child_env, tmp_path):
    whole = evaluate(child_env, place, tmp_path / "whole", "--steps", "1,3")
    out = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, out
    name = "step_3/gsm8k.jsonl"
    killed = evaluate(child_env, place, tmp_path / "cut", "--steps", "1,3")
    path = tmp_path / "cut" / name
    while killed.poll() is None and not (path.exists() and path.read_text().count("\n") > 5):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    lines = path.read_text().count("\n")
    assert lines < 25, "it finished before it was killed"
    with path.open("a") as file:
        file.write('{"problem": 6, "pro')  # as a write that was cut off leaves it
    again = evaluate(child_env, place, tmp_path / "cut", "--steps", "1,3")
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    for file in (name, "step_1/gsm8k.jsonl", "results.json", "table.md"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()
    records = [json.loads(line) for line in path.read_text().split("\n")[1:-1]]
    assert [r["problem"] for r in records] == list(range(24)) and any(any(r["right"]) for r in records)
    right = np.array([r["right"] for r in records])
    lengths, cut = (np.array([r[k] for r in records]) for k in ("lengths", "truncated"))
    wanted = summarise(right, [r["found"] for r in records], lengths, cut, (1, 4))
    saved = json.loads((tmp_path / "cut" / "results.json").read_text())["step 3"]["gsm8k"]
    assert saved["accuracy"] == wanted.accuracy and saved["pass_at"]["4"] == wanted.pass_at[4] > wanted.accuracy
    table = (tmp_path / "cut" / "table.md").read_text()
    assert f"| step 3 | {100 * wanted.accuracy:.1f} ± {100 * wanted.se_problems:.1f} |" in table
    assert (tmp_path / "cut" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    other = evaluate(child_env, place, tmp_path / "cut", "--steps", "1,3", "--seed", "1")
    out = other.communicate(timeout=300)[0]
    assert other.returncode == 2 and "seed=0 there, 1 now" in out


def test_importing_starts_no_backend(child_env):
    """Verifiers are forked before JAX touches a device; an array made at import would be one."""
    code = (
        "import pspo_jax.commands.train, pspo_jax.evaluate\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


RESULT = {"right": [1.0, None], "found": ["3", None], "lengths": [3, 4], "truncated": [False, True]}


@pytest.mark.parametrize(
    "damage",
    [
        b'{"problem": 2, "ri',
        b"\xff\xfe\x00",
        b"[1, 2]\n",
        json.dumps({"problem": 2}).encode() + b"\n",
        json.dumps({"problem": 2, **RESULT, "right": ["x", 1.0]}).encode() + b"\n",
        json.dumps({"problem": 2, **RESULT, "found": ["x"]}).encode() + b"\n",
        json.dumps({"problem": 1, **RESULT}).encode() + b"\n",
        json.dumps({"problem": 7, **RESULT}).encode() + b"\n",
    ],
)
def test_damaged_results_are_sampled_again(tmp_path, damage):
    header = {"weights": "w", "benchmark": "b", "problems": 4, "samples": 2, "data": "x"}
    good = [json.dumps(x).encode() + b"\n" for x in (header, *({"problem": i, **RESULT} for i in range(2)))]
    path = tmp_path / "b.jsonl"
    path.write_bytes(b"".join(good) + damage)
    assert _recover(path, header) == 2 and path.read_bytes() == b"".join(good)
    with pytest.raises(ConfigError, match="holds results of other data"):
        _recover(path, header | {"data": "y"})


@pytest.mark.parametrize("before", [{"weights": "old"}, {}])
def test_results_of_other_weights_are_set_aside(tmp_path, before):
    """Also those that do not say of which weights they are."""
    rest, said, path = {"benchmark": "b", "problems": 4, "samples": 2, "data": "x"}, [], tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (before | rest, {"problem": 0, **RESULT})))
    assert _recover(path, {"weights": "new"} | rest, said.append) == 0
    assert json.loads(path.read_text()) == {"weights": "new"} | rest
    assert json.loads((tmp_path / "b.jsonl.before").read_text().splitlines()[0]) == before | rest
    assert len(said) == 1 and "results of other weights" in said[0]


def test_results_beyond_the_last_problem_are_dropped(tmp_path):
    header = {"weights": "w", "benchmark": "b", "problems": 2, "samples": 2, "data": "x"}
    lines = [json.dumps(x) + "\n" for x in (header, *({"problem": i, **RESULT} for i in range(3)))]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    assert _recover(tmp_path / "b.jsonl", header) == 2


@pytest.mark.slow
def test_interrupted_evaluation_says_so_in_a_line(trained, place, child_env, tmp_path):
    process = evaluate(child_env, place, tmp_path / "out", "--steps", "3", "--limit", "0")
    path = tmp_path / "out" / "step_3" / "gsm8k.jsonl"
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in out and "the same command carries on" in out, out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run", "nowhere"], "--run nowhere: no such folder"),
        (["--model", "x"], "--out: is missing; name a folder"),
        (["--model", "x", "--out", "o", "--benchmarks", "mathh"], "--benchmarks mathh: choose among gsm8k, math500"),
        (["--model", "x", "--out", "o", "--data", "mathh=f"], "--data mathh=f: must be NAME=FILE"),
        (["--model", "x", "--out", "o", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--model", "x", "--out", "o", "--samples", "2", "--k", "4"], "--k 4: must be from 1 to --samples 2"),
        (["--model", "x", "--out", "o", "--top-p", "0"], "--top-p 0.0: must be"),
        (["--model", "x", "--out", "o", "--temperature", "nan"], "--temperature nan"),
        (["--model", "x", "--out", "o", "--limit", "-3"], "--limit -3: must be at least 0"),
        (["--model", "x", "--out", "o", "--seed", "9" * 20], "must be from 0 to 2147483647"),
        (["--model", "x", "--out", "o", "--prompt.templat", "y"], "prompt.template"),
        ([], "one of the arguments --run --model is required"),
    ],
)
def test_bad_arguments_of_evaluate_get_one_line(argv, words, capsys, monkeypatch):
    from pspo_jax.config import command_line
    from pspo_jax.evaluate import main

    monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main, "pspo_jax.evaluate")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err
