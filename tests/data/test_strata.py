"""Shares of difficulty of the training prompts: exact, deterministic, and without effect on held-out prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import TaskConfig
from pspo_jax.config.text_fields import parse_strata
from pspo_jax.config.validation import validate
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.strata import apportioned, chosen_rows, labels_of, stratum_of
from pspo_jax.data.synthetic.arithmetic import arithmetic, generate, noisy_totals, write_responses
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.evaluation.heldout import evaluate
from pspo_jax.rewards.task import make_char_tokenizer, make_task
from pspo_jax.selection.metadata import load_metadata
from tests.conftest import DATA
from tests.helpers import tiny_config

TOKENIZER = str(DATA / "tokenizers" / "qwen2.5-small")
EASY_AND_HARD = "0=0.8, 3+=0.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture
def made(folder):
    def make(**fields):
        values = {"task__cache": str(folder), "rollout__prompts": 4, "rollout__max_new_tokens": 31}
        text = "task__mixture" in fields or fields.get("task__name", "arithmetic") not in ("arithmetic", "characters")
        if text:
            values["model__tokenizer"] = TOKENIZER
        else:
            values.pop("task__cache")
        if fields.get("task__name") == "characters":
            fields["task__name"] = "countdown"
        config = tiny_config(**(values | fields))
        validate(config)
        return make_task(config, load_tokenizer(config, None, None) if text else make_char_tokenizer(config))

    return make


def carries(prompt: str) -> int:
    """Operations of an arithmetic prompt that carry or borrow."""
    total, n = int(prompt[:2]), 0
    for op in re.findall(r"[+-]\d", prompt):
        n += not 0 <= total % 10 + int(op) <= 9
        total += int(op)
    return n


def prompts_of(dataset, tokenizer):
    return [tokenizer.decode(t[:n].tolist()) for t, n in zip(dataset.tokens, dataset.lengths, strict=True)]


# --- the field ---


def test_a_stratum_is_a_number_a_range_or_a_least_number():
    found = parse_strata("0=0.5, 1-2=0.2, 3 - 4.5=0.1, 5+=0.2")
    assert [(s.name, s.low, s.high, s.share) for s in found] == [
        ("0", 0, 0, 0.5),
        ("1-2", 1, 2, 0.2),
        ("3-4.5", 3, 4.5, 0.1),
        ("5+", 5, float("inf"), 0.2),
    ]
    assert parse_strata("") == () and tiny_config(task__strata={"0": 0.8, "3+": 0.2}).task.strata == EASY_AND_HARD
    numbers = np.array([0, 1, 2, 2.5, 4, 9, np.nan])
    assert stratum_of(numbers, found).tolist() == [0, 1, 1, -1, 2, 3, -1]
    assert labels_of(numbers[[0, 3, 5]], found) == ["difficulty_0", "difficulty_other", "difficulty_5+"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strata": "0"}, ["task.strata='0': '0' is not difficulty=share", '"0=0.8, 3+=0.2"']),
        ({"strata": "0=0.5,0=0.5"}, ["'0=0.5' is not difficulty=share", "each difficulty once"]),
        ({"strata": "0=0.5,1=1.5"}, ["'1=1.5' is not", "in (0, 1]"]),
        ({"strata": "hard=1"}, ["'hard' is no difficulty; write a number (0), a range (1-2)"]),
        ({"strata": "3-1=1"}, ["'3-1' ends before it begins; write 1-3"]),
        ({"strata": "0-2=0.5,2+=0.5"}, ["0-2 and 2+ overlap; change one"]),
        ({"strata": "0=0.5,1=0.2"}, ["the shares sum to 0.7; change them so that they sum to 1"]),
        ({"strata": "0=0.8,7+=0.2"}, ["task.strata='0=0.8, 7+=0.2': 7+ takes 8 prompts, and there are 0", "lower"]),
        ({"strata": "0=0.995,1=0.005"}, ["1 has no prompt of 40; raise its share, or task.train_prompts"]),
        ({"strata": "5=1", "name": "characters"}, ["no problem of task.numbers=3,4 has difficulty 5", "change one"]),
        ({"strata": "1-4=1", "name": "text_suite", "kinds": "brackets"}, ["1-4 takes 40 prompts, and there are 0"]),
        ({"wrong_labels": 1.5}, ["task.wrong_labels=1.5: must be at most 1"]),
        ({"difficulty_column": "x"}, ["task.difficulty_column=x: task.name=arithmetic does not read it"]),
        (
            {"wrong_labels": 0.5, "name": "reasoning_gym", "dataset": "gcd"},
            ["task.wrong_labels=0.5: task.name=reasoning_gym does not read it; drop it, or set task.name"],
        ),
        (
            {"strata": "1=1", "mixture": json.dumps([{"name": "countdown"}, {"name": "text_suite"}])},
            ["task.strata=1=1: task.mixture=", "does not read it; drop it"],
        ),
        (
            {"mixture": json.dumps([{"name": "countdown", "strata": "3=1"}, {"name": "text_suite"}])},
            ["task.mixture: task.strata=3=1: a mixture does not read it; drop it"],
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(fields, words, made):
    with pytest.raises(ConfigError) as error:
        made(**{f"task__{name}": value for name, value in fields.items()})
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


# --- shares ---


@given(st.integers(0, 5000), st.lists(st.integers(1, 100), min_size=1, max_size=12))
def test_parts_are_whole_and_next_to_the_exact_share(total, percents):
    shares = [percent / 100 for percent in percents]  # those that differ do so by more than rounding
    parts = apportioned(total, shares)
    exact = [share / sum(shares) * total for share in shares]
    assert sum(parts) == total
    assert all(abs(part - want) < 1 + 1e-6 for part, want in zip(parts, exact, strict=True))
    larger = max(range(len(shares)), key=shares.__getitem__)
    assert parts[larger] == max(parts)


@given(st.lists(st.integers(0, 4), min_size=30, max_size=200), st.integers(0, 20))
def test_the_first_rows_of_each_stratum_are_chosen(difficulty, total):
    strata = parse_strata("0=0.5, 1=0.25, 2-3=0.25")
    numbers = np.array(difficulty)
    there = [int((numbers == 0).sum()), int((numbers == 1).sum()), int(((numbers == 2) | (numbers == 3)).sum())]
    try:
        rows = chosen_rows(numbers, strata, total)
    except ConfigError as error:
        small = total or 4
        assert any(n < w for n, w in zip(there, apportioned(small, [0.5, 0.25, 0.25]), strict=True)) or (
            0 in apportioned(small, [0.5, 0.25, 0.25]) or min(there) == 0
        ), error
        return
    counts = np.bincount(stratum_of(numbers[rows], strata), minlength=3).tolist()
    assert counts == apportioned(len(rows), [0.5, 0.25, 0.25]) and len(rows) in ({total} if total else {len(rows)})
    for stratum, count in enumerate(counts):
        here = np.flatnonzero(stratum_of(numbers, strata) == stratum)
        assert set(here[:count]) <= set(rows.tolist())
    if not total:  # one more prompt would be too many for a stratum
        more = apportioned(len(rows) + 1, [0.5, 0.25, 0.25])
        assert any(n < w for n, w in zip(there, more, strict=True))


# --- the tasks ---


@pytest.mark.parametrize("strata", [EASY_AND_HARD, "0=0.2, 1=0.2, 2=0.2, 3=0.2, 4=0.1, 5+=0.1"])
def test_arithmetic_has_these_shares_and_the_same_held_out_prompts(strata, made):
    plain, task, again = made(), made(task__strata=strata), made(task__strata=strata)
    wanted = apportioned(40, [stratum.share for stratum in parse_strata(strata)])
    texts = prompts_of(task.train, task.tokenizer)
    found = [carries(text) for text in texts]
    assert Counter(task.train.labels) == {
        f"difficulty_{stratum.name}": n for stratum, n in zip(parse_strata(strata), wanted, strict=True)
    }
    assert labels_of(np.array(found), parse_strata(strata)) == list(task.train.labels)
    assert task.train.difficulty.tolist() == found
    assert [eval(text[:-1]) for text in texts] == [int(a) for a in task.train.answers]
    assert len(set(texts)) == 40 and not set(texts) & set(prompts_of(task.heldout, task.tokenizer))
    assert task.heldout.fingerprint() == plain.heldout.fingerprint() and plain.heldout.labels is None
    assert again.train.fingerprint() == task.train.fingerprint() != plain.train.fingerprint()
    assert made(task__strata=strata, task__seed=1).train.fingerprint() != task.train.fingerprint()
    blocks = [next(t.demonstrations(0, 50)) for t in (plain, task)]
    assert all(np.array_equal(a, b) for a, b in zip(*blocks, strict=True))


def test_without_strata_the_prompts_are_those_of_before():
    """Fingerprints that the task had before it knew strata."""
    task = arithmetic(TaskConfig(), 16)
    assert (task.train.fingerprint(), task.heldout.fingerprint()) == ("26c7bc74042b23df", "17124c22e687fcc4")


GYM = {"task__dataset": "chain_sum, gcd", "task__difficulty_column": "num_terms"}


@pytest.mark.parametrize(
    ("name", "strata", "fields"),
    [
        ("characters", "3=0.75, 4=0.25", {}),
        ("countdown", "3=0.75, 4=0.25", {}),
        ("text_suite", "1-4=0.75, 10+=0.25", {}),
        pytest.param(
            *("reasoning_gym", "2-3=0.75, 5+=0.25", GYM),
            marks=pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"),
        ),
    ],
)
def test_tasks_that_generate_prompts_have_shares_too(name, strata, fields, made):
    plain = made(task__name=name, **{k: v for k, v in fields.items() if k == "task__dataset"})
    task = made(task__name=name, task__strata=strata, **fields)
    assert np.bincount(stratum_of(task.train.difficulty, parse_strata(strata))).tolist() == [30, 10]
    assert task.heldout.fingerprint() == plain.heldout.fingerprint()
    assert list(task.heldout.texts) == list(plain.heldout.texts)
    assert list(task.heldout.answers) == list(plain.heldout.answers)
    assert len(set(task.train.texts)) == 40 and not set(task.train.texts) & set(task.heldout.texts)
    assert made(task__name=name, task__strata=strata, **fields).train.fingerprint() == task.train.fingerprint()
    if name in ("characters", "countdown"):
        assert task.train.difficulty.tolist() == [len(json.loads(e)["numbers"]) for e in task.train.extras]
    if name == "reasoning_gym":
        assert task.train.difficulty.tolist() == [_terms(json.loads(e)) for e in task.train.extras]
    if name != "text_suite":  # whose labels are its kinds
        assert Counter(task.train.labels).most_common() == [
            (f"difficulty_{stratum.name}", n) for stratum, n in zip(parse_strata(strata), (30, 10), strict=True)
        ]


def _terms(extra):
    """The number of terms of the entry from which a worker verifies a question."""
    import reasoning_gym

    return reasoning_gym.create_dataset(extra["dataset"], **extra["options"])[extra["index"]]["metadata"]["num_terms"]


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_a_gym_without_that_number_names_the_numbers_that_it_has(made):
    with pytest.raises(ConfigError, match=r"^task.difficulty_column=None: .*; chain_sum has num_terms, num_digits$"):
        made(task__name="reasoning_gym", task__dataset="chain_sum", task__strata="2=1")


def test_rows_of_files_have_the_shares_of_a_column(tmp_path, made):
    rows = [{"problem": f"What is {i} + {i}?", "answer": f"{2 * i}", "grade": f"Level {i % 3}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"task__name": "math", "task__train_data": str(tmp_path / "rows.jsonl"), "task__heldout_prompts": 6}
    shares = {"task__strata": "0=0.75, 2=0.25", "task__difficulty_column": "grade"}
    plain, task = made(**fields), made(**fields, **shares, task__train_prompts=20)
    assert list(task.train.texts) == [
        row["problem"] for i, row in enumerate(rows) if (i % 3 == 0 and i < 45) or (i % 3 == 2 and i < 15)
    ]
    assert task.heldout.fingerprint() == plain.heldout.fingerprint()
    whole = made(**fields, **shares, task__train_prompts=0)  # 18 rows of level 0 are left
    assert Counter(whole.train.labels) == {"difficulty_0": 18, "difficulty_2": 6}
    assert Counter(task.heldout.labels) == dict.fromkeys(["difficulty_0", "difficulty_2", "difficulty_other"], 2)
    with pytest.raises(ConfigError, match=r"^task.difficulty_column=None: task.strata='0=1' needs a column of numbers"):
        made(**fields, task__strata="0=1", task__train_prompts=20)
    with pytest.raises(ConfigError, match=r"0 takes 20 prompts, and there are 18 of this difficulty; lower its"):
        made(**fields, **shares | {"task__strata": "0=1"}, task__train_prompts=20)


# --- what they do ---


def test_selectors_read_the_strata(made):
    task = made(task__strata=EASY_AND_HARD)
    config = tiny_config(selection__quotas="difficulty_0=0.25", task__strata=EASY_AND_HARD)
    names, metadata = load_metadata(config, task.train)
    assert names == ("difficulty_0", "difficulty_3+") and np.bincount(metadata.task_ids).tolist() == [32, 8]
    _, metadata = load_metadata(tiny_config(algorithm__name="curriculum"), task.train)
    assert metadata.difficulty.tolist() == task.train.difficulty.tolist()


def test_the_demonstrator_solves_the_easy_stratum_and_not_the_hard_one(made):
    """So that most groups of a model that learnt from it teach nothing."""

    def solved(strata):
        task = made(task__strata=strata, task__train_prompts=400)
        texts = prompts_of(task.train, task.tokenizer)
        start = np.array([int(text[:2]) for text in texts])
        deltas = [[int(op) for op in re.findall(r"[+-]\d", text)] for text in texts]
        length = np.array([len(row) for row in deltas])
        problems = generate(np.random.default_rng(0), 400)._replace(start=start, length=length)
        problems.delta[:] = 0
        for i, row in enumerate(deltas):
            problems.delta[i, : len(row)] = row
        tokens, lengths = write_responses(problems, noisy_totals(problems, np.random.default_rng(1)))
        ended = np.ones((400, 1), bool)
        batch = CompletionBatch(task.train, np.arange(400), tokens[:, None], lengths[:, None], ended, 0)
        return task.reward_fn(batch)().reward.mean()

    assert solved("0=1") > 0.95 and solved("3+=1") < 0.15
    assert 0.75 < solved(EASY_AND_HARD) < 0.85


def test_held_out_accuracy_is_reported_by_stratum():
    """Of a policy that solves what has no carry, and of the rest nothing."""
    config = tiny_config(task__strata="0=0.5, 3+=0.5", rollout__max_new_tokens=8, eval__samples=1)
    task = make_task(config, make_char_tokenizer(config))
    assert isinstance(task.tokenizer, CharTokenizer)

    def sample(params, prompts, key, settings):
        rows = np.asarray(prompts.ids)
        texts = [f"={task.heldout.answers[i] if task.heldout.difficulty[i] == 0 else 10}$" for i in rows]
        tokens = jnp.asarray([[task.tokenizer.encode(text.ljust(4, "_"))] for text in texts])
        lengths = jnp.asarray([[len(text)] for text in texts])
        zero, ended = jnp.zeros(tokens.shape), jnp.ones(lengths.shape, bool)
        return Rollouts(prompts, tokens, zero > 0, zero, zero, lengths, ended, jnp.float32(1))

    def place(prompts):
        return jax.tree.map(jnp.asarray, prompts)

    scores = evaluate(sample, None, task, config, jax.random.key(0), 8, place)
    labels = ("difficulty_0", "difficulty_3+", "difficulty_other")
    assert set(task.heldout.labels) == set(labels)
    assert [scores[f"greedy/{label}"] for label in labels] == [1, 0, 0]
    assert [scores[f"sampled/{label}"] for label in labels] == [1, 0, 0]
