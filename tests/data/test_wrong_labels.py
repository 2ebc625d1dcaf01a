"""Wrong gold answers: an exact share of every stratum, wrong by the verifier, and never among held-out prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.strata import apportioned, wrong_rows
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_char_tokenizer, make_task
from pspo_jax.verifiers.workers.pool import Pool
from tests.conftest import DATA
from tests.helpers import tiny_config

TOKENIZER = str(DATA / "tokenizers" / "qwen2.5-small")
pytestmark = pytest.mark.xdist_group("pool")


@pytest.fixture(scope="module")
def pool():
    with Pool(VerifierConfig(workers=1, deadline=60)) as entered:
        yield entered


@pytest.fixture
def made(tmp_path, pool):
    def make(text, **fields):
        values = {"rollout__prompts": 4, "rollout__max_new_tokens": 31}
        if text:
            values |= {"task__cache": str(tmp_path), "model__tokenizer": TOKENIZER}
        config = tiny_config(**(values | fields))
        validate(config)
        return make_task(config, load_tokenizer(config, None, None) if text else make_char_tokenizer(config), pool)

    return make


def rewards(task, prompts, texts):
    """The verdict on one completion of each prompt."""
    ids = [[*task.tokenizer.encode(text), task.stop_ids[0]] for text in texts]
    lengths = np.array([[len(row)] for row in ids])
    tokens = np.zeros((len(ids), 1, lengths.max()), np.int32)
    for i, row in enumerate(ids):
        tokens[i, 0, : len(row)] = row
    batch = CompletionBatch(prompts, np.arange(len(ids)), tokens, lengths, np.ones((len(ids), 1), bool), 0)
    return task.reward_fn(batch)().verdicts[:, 0]


@given(st.floats(0, 1), st.integers(0, 99), st.lists(st.integers(0, 3), min_size=1, max_size=300))
def test_every_stratum_has_the_same_share(share, seed, stratum):
    sizes = np.bincount(stratum).tolist()
    wrong = wrong_rows(share, seed, len(stratum), np.array(stratum))
    counts = np.bincount(stratum, weights=wrong).astype(int).tolist()
    assert wrong.sum() == round(share * len(stratum)) and counts == apportioned(int(wrong.sum()), sizes)
    assert all(abs(n - share * size) < 1.5 for n, size in zip(counts, sizes, strict=True))
    assert np.array_equal(wrong, wrong_rows(share, seed, len(stratum), np.array(stratum)))


def test_arithmetic_rewards_the_wrong_total_and_not_the_right_one(made):
    fields = {"task__strata": "0=0.8, 3+=0.2", "task__train_prompts": 80}
    plain, task = made(False, **fields), made(False, **fields, task__wrong_labels=0.25)
    np.testing.assert_array_equal(task.train.tokens, plain.train.tokens)
    wrong = np.array([a != b for a, b in zip(task.train.answers, plain.train.answers, strict=True)])
    assert wrong.sum() == 20 and np.bincount(np.array(task.train.difficulty)[wrong] > 0).tolist() == [16, 4]
    assert all(10 <= int(a) <= 99 for a in task.train.answers)
    assert np.array_equal(rewards(task, task.train, [f"={a}" for a in plain.train.answers]), ~wrong)
    assert rewards(task, task.train, [f"={a}" for a in task.train.answers]).all()
    assert (
        task.heldout.fingerprint() == plain.heldout.fingerprint()
        and task.train.fingerprint() != plain.train.fingerprint()
    )
    again = made(False, **fields, task__wrong_labels=0.25)
    assert again.train.answers == task.train.answers
    assert made(False, **fields, task__wrong_labels=1.0).train.answers != task.train.answers


@pytest.mark.parametrize("text", [False, True], ids=["characters", "text"])
def test_countdown_asks_for_another_target_than_its_prompt(text, made):
    fields = {"task__name": "countdown", "task__numbers": "2"}
    plain, task = made(text, **fields), made(text, **fields, task__wrong_labels=0.25)
    wrong = np.array([a != b for a, b in zip(task.train.answers, plain.train.answers, strict=True)])
    assert wrong.sum() == 10 and list(task.train.texts) == list(plain.train.texts)
    solutions = [_solution(json.loads(extra)) for extra in plain.train.extras]
    written = [f"<answer>{s}</answer>" if text else s for s in solutions]
    assert np.array_equal(rewards(task, task.train, written), ~wrong)
    assert rewards(plain, plain.train, written).all()
    assert (
        task.heldout.fingerprint() == plain.heldout.fingerprint()
        and task.train.fingerprint() != plain.train.fingerprint()
    )
    unchanged = task.train.content() == plain.train.content()
    assert np.array_equal(unchanged, ~wrong)


def _solution(extra):
    a, b = extra["numbers"]
    values = {f"{x}{op}{y}": eval(f"{x}{op}{y}") for x, y in ((a, b), (b, a)) for op in "+-*/"}
    return next(text for text, value in values.items() if value == extra["target"])


def test_rows_of_mathematics_get_answers_that_the_verifier_tells_apart(tmp_path, made):
    """Half of the answers are one value in other words."""
    halves = ["1/2", "0.5", "\\frac{1}{2}", "50\\%"]
    rows = [{"problem": f"Question {i}?", "answer": halves[i % 4] if i % 2 else str(i)} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"task__name": "math", "task__train_data": str(tmp_path / "rows.jsonl"), "task__heldout_prompts": 8}
    plain = made(True, **fields)
    task = made(True, **fields, task__wrong_labels=0.5)
    wrong = np.array([a != b for a, b in zip(task.train.answers, plain.train.answers, strict=True)])
    assert wrong.sum() == 20 and list(task.train.texts) == list(plain.train.texts)
    assert np.array_equal(rewards(task, task.train, [f"\\boxed{{{a}}}" for a in plain.train.answers]), ~wrong)
    assert rewards(task, task.train, [f"\\boxed{{{a}}}" for a in task.train.answers]).all()
    assert (
        task.heldout.fingerprint() == plain.heldout.fingerprint()
        and task.train.fingerprint() != plain.train.fingerprint()
    )
    assert made(True, **fields, task__wrong_labels=0.5).train.fingerprint() == task.train.fingerprint()
    assert [json.loads(e) for e in task.train.extras] == [{} if w else {"answer_column": "answer"} for w in wrong]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row | {"answer": "0.5"}) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match=r"^task.wrong_labels=0.5: no other answer is wrong for 20 rows.*'0.5'; lower"
    ):
        made(True, **fields | {"task__train_data": str(tmp_path / "same.jsonl")}, task__wrong_labels=0.5)


def test_questions_of_the_suite_get_answers_of_their_kind(made):
    plain = made(True, task__name="text_suite", task__train_prompts=96)
    task = made(True, task__name="text_suite", task__train_prompts=96, task__wrong_labels=0.5)
    wrong = np.array([a != b for a, b in zip(task.train.answers, plain.train.answers, strict=True)])
    assert wrong.sum() == 48 and list(task.train.labels) == list(plain.train.labels)
    assert np.array_equal(rewards(task, task.train, plain.train.answers), ~wrong)
    assert rewards(task, task.train, task.train.answers).all()


def test_a_wrong_choice_is_another_option(tmp_path, made):
    rows = [{"question": f"Which is {i}?", "answer": "ABC"[i % 3], "choices": ["x", "y", "z"]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "task__name": "multiple_choice",
        "task__train_data": str(tmp_path / "rows.jsonl"),
        "task__train_prompts": 0,
    }
    plain, task = made(True, **fields), made(True, **fields, task__wrong_labels=1.0)
    assert all(a != b and a in "ABC" for a, b in zip(task.train.answers, plain.train.answers, strict=True))
    assert not rewards(task, task.train, plain.train.answers).any()
