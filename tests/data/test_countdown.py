"""Countdown problems are solvable, distinct, the same for a seed, and asked for clearly."""

from __future__ import annotations

import ast
import json
import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.validation import validate
from pspo_jax.data.synthetic.countdown import MAX_VALUE, Problem, generate, question, source, write_prompt
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_char_tokenizer, make_task
from pspo_jax.verifiers.countdown import answer_of, expression_value, score
from tests.conftest import DATA
from tests.helpers import tiny_config

TOKENIZER = DATA / "tokenizers" / "qwen2.5-small"


def reachable(values):
    """Every value that + - * / make of all these numbers, by brute force."""
    if len(values) == 1:
        return {values[0]}
    found = set()
    for i, j in combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        results = {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set())
        found |= {v for result in results for v in reachable([*rest, result])}
    return found


def evaluate(text):
    """Exact value; each integer of the text becomes a Fraction first."""
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})


def values_on_the_way(text):
    """Every value of a sub-expression, as Python groups it."""
    return [evaluate(ast.unparse(n)) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.BinOp)]


@pytest.fixture(scope="module")
def problems():
    return generate(0, 2000)


def test_every_solution_is_worth_1(problems):
    for p in problems:
        assert expression_value(p.solution, p.numbers) == p.target
        assert score(p.solution, p.numbers, p.target) == 1


def test_problems_are_within_the_settings(problems):
    assert {len(p.numbers) for p in problems} == {3, 4}
    assert sum(len(p.numbers) == 3 for p in problems) == 1000
    for p in problems:
        assert all(type(n) is int and 1 <= n <= 99 for n in (*p.numbers, p.target))
        assert p.target not in p.numbers
    assert {op for p in problems for op in p.solution} >= set("+-*/()")


@given(st.integers(0, 2**32), st.integers(2, 7), st.sampled_from([99, 9999]))
def test_values_on_the_way_are_positive_integers(seed, size, high):
    for p in generate(seed, 5, (size,), high=high, max_target=20_000):
        assert all(v.denominator == 1 and 1 <= v <= MAX_VALUE for v in values_on_the_way(p.solution)), p
        assert score(p.solution, p.numbers, p.target) == 1


def test_parentheses_are_all_needed(problems):
    seen = 0
    for p in problems:
        # Other numbers, or a pair could look needless by luck, as in (3-2)*1.
        primes = iter((1009, 2003, 3001, 4001))
        text = "".join(str(next(primes)) if part.isdigit() else part for part in re.split(r"(\d+)", p.solution))
        for start in (i for i, c in enumerate(text) if c == "("):
            depth, end = 1, start
            while depth:
                end += 1
                depth += {"(": 1, ")": -1}.get(text[end], 0)
            bare = text[:start] + text[start + 1 : end] + text[end + 1 :]
            assert evaluate(bare) != evaluate(text), p
            seen += 1
    assert seen > 200


def test_brute_force_finds_the_target(problems):
    for p in problems[:40]:
        assert p.target in reachable([Fraction(n) for n in p.numbers]), p


def test_order_of_numbers_is_not_the_solutions(problems):
    same = sum([int(n) for n in re.findall(r"\d+", p.solution)] == list(p.numbers) for p in problems)
    assert 0.05 < same / len(problems) < 0.2  # chance: (1/6 + 1/24) / 2


def test_problems_are_distinct(problems):
    assert len({(tuple(sorted(p.numbers)), p.target) for p in problems}) == len(problems)


def test_seeds(problems):
    assert generate(0, 2000) == problems
    assert generate(0, 50) == problems[:50]
    assert not set(generate(1, 50)) & set(problems[:50])
    assert generate(3, 0) == []


def test_sizes_that_are_used_up_leave_their_turn():
    found = generate(0, 150, (2, 3), 1, 4, 50)
    assert 0 < sum(len(p.numbers) == 2 for p in found) < 30


def test_every_problem_of_a_small_space_is_found():
    space = {
        (pair, target)
        for pair in combinations(range(2, 6), 2)
        for target in reachable([Fraction(n) for n in pair])
        if target.denominator == 1 and 1 <= target <= 10 and target not in pair
    }
    pairs = {(tuple(sorted(p.numbers)), p.target) for p in generate(0, len(space), (2,), 2, 5, 10)}
    assert {key for key in pairs if len(set(key[0])) == 2} <= space
    with pytest.raises(
        ValueError, match=r"^count=500: only \d+ distinct .*; lower count, raise max_target, or widen low"
    ):
        generate(0, 500, (2,), 2, 5, 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"count": -1}, "count=-1"),
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"sizes": (1, 3)}, r"sizes=\(1, 3\)"),
        ({"sizes": (9,)}, r"sizes=\(9,\)"),
        ({"low": 0}, "low=0"),
        ({"low": 9, "high": 8}, "high=8"),
        ({"high": 10_000}, "high=10000"),
        ({"max_target": 0}, "max_target=0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        generate(**({"seed": 0, "count": 5} | settings))
    assert "\n" not in str(caught.value)


def test_question():
    text = question((55, 36, 2, 1), 38)
    assert "55, 36, 2, 1" in text and "equals 38" in text
    assert all(tag in text for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    assert score(answer_of(text), [2, 50, 7], 114) == 1
    assert isinstance(Problem((1, 2), 3, "1+2"), tuple)


# --- the task with one token per character ---


def config(**fields):
    values = {"task__name": "countdown", "task__train_prompts": 60, "rollout__max_new_tokens": 24}
    return tiny_config(**(values | fields))


def made(**fields):
    c = config(**fields)
    validate(c)
    return make_task(c, make_char_tokenizer(c))


def keys(prompts):
    """Numbers, sorted, and target of each prompt."""
    return [(tuple(sorted(e["numbers"])), e["target"]) for e in map(json.loads, prompts.extras)]


def test_prompts_of_the_own_alphabet():
    task = made()
    problems = generate(0, 76)
    for prompts, expected in ((task.train, problems[16:]), (task.heldout, problems[:16])):
        rows = [task.tokenizer.decode(t[:n]) for t, n in zip(prompts.tokens, prompts.lengths, strict=True)]
        assert rows == [write_prompt(p) for p in expected] == list(prompts.texts)
        assert list(prompts.answers) == [str(p.target) for p in expected]
        assert [json.loads(e) for e in prompts.extras] == [
            {"numbers": list(p.numbers), "target": p.target} for p in expected
        ]
        assert all(
            (t[n:] == task.tokenizer.pad_token_id).all() for t, n in zip(prompts.tokens, prompts.lengths, strict=True)
        )
    assert write_prompt(Problem((3, 25, 7), 46, "")) == "3,25,7=46:"
    assert task.train.tokens.shape == (60, 16) and task.heldout.tokens.shape == (16, 16)
    assert not set(keys(task.train)) & set(keys(task.heldout))
    assert task.vocab_size == 24 and task.tokenizer.pad_token_id in task.forbidden
    assert task.encode_prompt("3,4=7:") == task.tokenizer.encode("3,4=7:")
    with pytest.raises(ConfigError, match="no token for"):
        task.encode_prompt("x")


def test_sizes_and_targets_follow_the_config():
    task = made(task__numbers="2, 5", task__max_target=30)
    assert {len(numbers) for numbers, _ in keys(task.train)} == {2, 5}
    assert max(target for _, target in keys(task.train)) <= 30


def test_rewards_without_a_checkpoint():
    task = made()
    known = {write_prompt(p): p for p in generate(0, 76)}
    rows = np.array([0, 5])
    texts = []
    for row in rows:
        p = known[task.train.texts[row]]
        some = "+".join(map(str, p.numbers))
        assert evaluate(some) != p.target
        texts.append(
            [f"{p.solution}$", p.solution, f"{some}$", f"{p.target}$", "$", "3+$", "1/0$", f"({p.solution})*1$"]
        )
    ids = [[task.tokenizer.encode(t) for t in row] for row in texts]
    lengths = np.array([[len(i) for i in row] for row in ids])
    tokens = np.full((*lengths.shape, lengths.max()), task.tokenizer.pad_token_id)
    for b, g in np.ndindex(*lengths.shape):
        tokens[b, g, : lengths[b, g]] = ids[b][g]
    ended = np.array([[t.endswith("$") for t in row] for row in texts])
    scores = task.reward_fn(CompletionBatch(task.train, rows, tokens, lengths, ended, 0))()
    expected = np.array([[1, 0, 0.1, 0.1, 0, 0, 0, 0.1]] * 2, np.float32)
    np.testing.assert_array_equal(scores.reward, expected)
    np.testing.assert_array_equal(scores.terms["accuracy"], expected)
    np.testing.assert_array_equal(scores.verdicts, expected == 1)
    assert [row[:5] for row in scores.answers] == [[t.removesuffix("$") or None for t in row[:5]] for row in texts]
    assert not scores.reasons


def test_demonstrations_are_expressions_of_the_right_numbers():
    task = made(task__heldout_prompts=300)
    (block,) = task.demonstrations(0, 600)
    assert [len(column) for column in block[:4]] == [600] * 4 and block.prompts.shape[1] == task.train.tokens.shape[1]
    held, right = set(keys(task.heldout)), 0
    for prompt, n, completion, m in zip(*block[:4], strict=True):
        question, text = task.tokenizer.decode(prompt[:n]), task.tokenizer.decode(completion[:m])
        numbers = [int(x) for x in question.partition("=")[0].split(",")]
        target = int(question.partition("=")[2].removesuffix(":"))
        assert text.endswith("$") and sorted(map(int, re.findall(r"\d+", text))) == sorted(numbers)
        assert (tuple(sorted(numbers)), target) not in held
        right += score(text.removesuffix("$"), numbers, target) == 1
    assert 0.25 < right / 600 < 0.45
    again = next(task.demonstrations(0, 600))
    assert all(np.array_equal(a, b) for a, b in zip(block, again, strict=True))
    assert not np.array_equal(next(task.demonstrations(1, 600)).prompts, block.prompts)


def test_demonstrations_repeat_where_there_are_few_problems():
    task = made(task__numbers="2", task__max_target=5, task__train_prompts=20, task__heldout_prompts=10)
    (block,) = task.demonstrations(0, 3000)
    assert [len(column) for column in block[:4]] == [3000] * 4
    texts = {task.tokenizer.decode(p[:n]) for p, n in zip(block.prompts, block.prompt_lengths, strict=True)}
    assert 300 < len(texts) < 1500 and not texts & set(task.heldout.texts)


def test_fingerprint_follows_the_problems():
    prints = [made(**f).train.fingerprint() for f in ({}, {}, {"task__seed": 1}, {"task__max_target": 50})]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    small, large = made(task__train_prompts=50).train.content(), made().train.content()
    np.testing.assert_array_equal(small, large[:50])
    assert len(set(large.tolist())) == 60


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"numbers": "x"}, "task.numbers='x': must be numbers from 2 to 6"),
        ({"numbers": ""}, "task.numbers=''"),
        ({"numbers": "1,3"}, "task.numbers='1,3'"),
        ({"numbers": "7"}, "task.numbers='7'"),
        ({"numbers": "3,,4"}, "task.numbers='3,,4'"),
        ({"max_target": 1}, "task.max_target=1: must be at least 2"),
        ({"train_prompts": 0}, "task.train_prompts=0"),
        ({"numbers": "2", "max_target": 2, "train_prompts": 900}, "task.train_prompts=900: count=916: only "),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(ConfigError) as error:
        made(**{f"task__{k}": v for k, v in fields.items()})
    assert str(error.value).startswith(words) and "\n" not in str(error.value), error.value


# --- the task as text ---


def test_source_of_text():
    c = config(task__numbers="3")
    found = source(c, 5, 20)
    problems = generate(5, 20, (3,))
    questions = [found.convert(r) for r in found.records]
    assert [q.text for q in questions] == [question(p.numbers, p.target) for p in problems]
    assert [q.extra for q in questions] == [{"numbers": list(p.numbers), "target": p.target} for p in problems]
    assert [q.answer for q in questions] == [str(p.target) for p in problems] and not any(q.reason for q in questions)


def test_task_of_text(tmp_path):
    c = config(model__tokenizer=str(TOKENIZER), task__cache=str(tmp_path), task__train_prompts=20)
    validate(c)
    tokenizer = load_tokenizer(c, None, None)
    task = make_task(c, tokenizer)
    texts = [question(p.numbers, p.target) for p in generate(0, 36)]
    assert list(task.train.texts) == texts[:20] and list(task.heldout.texts) == texts[20:]
    assert set(task.train.kinds) == {"countdown"} and json.loads(task.train.extras[0]) == task.train.columns(0)
    assert tokenizer.decode(task.train.tokens[3, : task.train.lengths[3]]).count(texts[3]) == 1
    assert make_task(c, tokenizer).train.fingerprint() == task.train.fingerprint()
