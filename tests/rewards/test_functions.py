"""Users' reward functions in every form that TRL's trainer and open-r1 have them, called as the workers call them."""

import asyncio
import functools
import json
import math
import types

import numpy as np
import pytest

from pspo_jax.verifiers.workers.functions import (
    FunctionRequest,
    escaped,
    is_async,
    line_of,
    score_completions,
    takes_group,
)

TEXTS = ["<think>\nso\n</think>\nIt is 4", "five"]
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]


def asked(messages=None, answer="4", n=2, **columns):
    texts = (TEXTS * n)[:n]
    return FunctionRequest("2+2?", messages, texts, [[1] * (i + 2) for i in range(n)], answer, 7, 20, columns)


@pytest.fixture
def user(monkeypatch):
    """Puts a function into a module that `score_completions` can import; gives its name."""

    def put(function):
        module = types.ModuleType("functions_of_this_test")
        module.f = function
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
        return f"{module.__name__}:f"

    return put


def scores(user, function, ask=None):
    return score_completions(user(function), ask or asked()).scores


class Lengths:
    def __call__(self, completions, **kwargs):
        return [float(len(c)) for c in completions]


class Waits:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)


def weighted(weight, completions, **kwargs):
    return [weight] * len(completions)


def undecorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5 for _ in completions]


async def one_later(completion):
    await asyncio.sleep(0)
    return len(completion)


def generated(completions, **kwargs):
    yield from (1.0 for _ in completions)


async def streamed(completions, **kwargs):
    for _ in completions:
        yield 0.25


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Lengths(), [len(t) for t in TEXTS]),
        (Waits(), [1, 1]),
        (functools.partial(weighted, 3), [3, 3]),
        (functools.partial(weighted, weight=2), [2, 2]),
        (undecorated(lambda completions, **kwargs: [7.0] * len(completions)), [7, 7]),
        (lambda **kwargs: [float(len(c)) for c in kwargs["completions"]], [len(t) for t in TEXTS]),
        (lambda completions, *args, **kwargs: [1] * len(completions), [1, 1]),
        (lambda completions, /, **kwargs: [1] * len(completions), [1, 1]),
        (lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids], [2, 3]),
        (later, [0.5, 0.5]),
        (one_later, [len(t) for t in TEXTS]),
        (generated, [1, 1]),
        (streamed, [0.25, 0.25]),
        (lambda completions: map(len, completions), [len(t) for t in TEXTS]),
        (lambda completions: (1, None), [1, None]),
        (lambda completions: np.array([1, 0], np.bool_), [1, 0]),
        (lambda completions: [np.float16(0.5), np.bool_(True)], [0.5, 1]),
        (lambda completions: [True, -0.0], [1, 0]),
        (lambda completion, *args, **kwargs: 1, [1, 1]),
    ],
)
def test_every_form_of_a_function_is_called(user, function, expected):
    found = scores(user, function)
    assert found == pytest.approx(expected) and not any(math.copysign(1, x) < 0 for x in found if x is not None)


def test_torch_tensors_are_numbers(user):
    torch = pytest.importorskip("torch")
    assert scores(user, lambda completions: torch.tensor([1.0, 0.5])) == [1, 0.5]
    assert scores(user, lambda completion: torch.tensor(2)) == [2, 2]


@pytest.mark.parametrize("messages", [None, CHAT], ids=["text", "conversation"])
def test_open_r1_reads_messages_whatever_the_data_are(user, messages):
    def form(completions, **kwargs):
        return [float(completion[0]["content"].startswith("<think>")) for completion in completions]

    assert scores(user, form, asked(messages)) == [1, 0]


def test_conversational_data_have_conversational_prompts(user):
    def sees(prompts, completions, **kwargs):
        return [float(p == CHAT and c == [{"role": "assistant", "content": t}]) for p, c, t in
                zip(prompts, completions, TEXTS, strict=True)]  # fmt: skip

    assert scores(user, sees, asked(CHAT)) == [1, 1]
    plain = scores(user, lambda prompts, completions: [float(p == "2+2?") for p in prompts])
    assert plain == [1, 1]


def test_what_the_trainer_passes_beside_the_data(user):
    def logs(completions, trainer_state, log_metric, log_extra, level, **kwargs):
        log_metric("level", np.float32(level[0]))
        log_extra("upper", [c.upper() for c in completions])
        return [trainer_state.global_step + trainer_state.max_steps / 100 for _ in completions]

    found = score_completions(user(logs), asked(level=3))
    assert found.scores == [7.2, 7.2] and found.metrics == {"level": [3.0]}
    assert found.columns == {"upper": [t.upper().replace("\x00", "") for t in TEXTS]}


@pytest.mark.parametrize("value", [4, True, ["red", "blue"], {"low": 1, "high": None}, None, 2**70, 0.1, ""])
def test_a_function_gets_the_own_values_of_the_row(user, value):
    def same(completion, answer, tag):
        return float(json.dumps([answer, tag]) == json.dumps([value, value]))

    def all_same(completions, answer, tag, **kwargs):
        return [float(json.dumps(pair) == json.dumps([value, value])) for pair in zip(answer, tag, strict=True)]

    assert scores(user, same, asked(answer=value, tag=value)) == [1, 1]
    assert scores(user, all_same, asked(answer=value, tag=value)) == [1, 1]


def test_arguments_that_are_changed_are_changed_for_one_completion(user):
    def takes(completions, tags, **kwargs):
        return [float(len(own)) + 0 * len(own.pop()) for own in tags]

    def takes_one(completion, tags):
        tags.append("x")
        return len(tags)

    assert scores(user, takes, asked(tags=["a", "b"])) == [2, 2]
    assert scores(user, takes_one, asked(tags=["a", "b"])) == [3, 3]


def test_one_bad_number_costs_one_verdict(user):
    found = score_completions(user(lambda completions: [1.0, math.nan, "1.0", 10**400, None]), asked(n=5))
    assert found.scores == [1, None, None, None, None]
    assert [line and line.partition(":")[0] for line in found.failed] == [
        None,
        "ValueError",
        "TypeError",
        "ValueError",
        None,
    ]


def test_one_coroutine_that_raises_costs_one_verdict(user):
    async def picky(completion):
        await asyncio.sleep(0)
        return {"five": 5}[completion]

    found = score_completions(user(picky), asked())
    assert found.scores == [None, 5] and found.failed[0].startswith("KeyError") and found.failed[1] is None


def test_coroutines_run_at_the_same_time(user):
    """Each waits for the other: one after the other they would never end."""
    met = []

    async def meets(completion):
        met.append(completion)
        while len(met) < 2:
            await asyncio.sleep(0)
        return 1

    assert scores(user, meets) == [1, 1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions: 1.0, "must return a list of 2 numbers, got float"),
        (lambda completions: "11", "must return a list of 2 numbers, got str"),
        (lambda completions: {0: 1.0, 1: 2.0}, "must return a list of 2 numbers, got dict"),
        (lambda completions: {1.0, 2.0}, "must return a list of 2 numbers, got set"),
        (lambda completions: [1.0], "returned 1 rewards for 2 completions"),
        (lambda completions: [1.0] * 3, "returned 3 rewards for 2 completions"),
        (lambda completions: np.ones((2, 1)), "got an array of 2 dimensions"),
        (lambda completions: iter(int, 1), "returned more than 2 rewards"),
        (lambda completions, nowhere: [1.0] * 2, "needs nowhere, which is no column"),
    ],
)
def test_what_is_no_list_of_rewards_is_explained(user, function, words):
    with pytest.raises((TypeError, ValueError)) as error:
        score_completions(user(function), asked())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_forms_are_told_apart():
    assert takes_group(Lengths()) and takes_group(later) and takes_group(functools.partial(weighted, 1))
    assert not takes_group(one_later) and not takes_group(lambda answer: 1) and not takes_group(lambda **kwargs: 1)
    assert is_async(later) and is_async(Waits()) and is_async(functools.partial(one_later)) and not is_async(Lengths())


def test_the_functions_of_trl_work(user):
    rewards = pytest.importorskip("trl.rewards")
    boxed = FunctionRequest(
        "q", None, ["\\boxed{4}", "\\boxed{5}"], [[1] * 90, [1] * 3], "4", 1, 2, {"solution": "$4$"}
    )
    for ask in (boxed, boxed._replace(messages=CHAT)):
        assert score_completions(user(rewards.accuracy_reward), ask).scores == [1, 0]
        assert score_completions(user(rewards.accuracy_reward), ask).columns["solution"] == ["$4$"] * 2
        cosine = rewards.get_cosine_scaled_reward(max_len=180)
        assert score_completions(user(cosine), ask).scores == pytest.approx([0.75, -1], abs=1e-2)
        assert score_completions(user(rewards.reasoning_accuracy_reward), ask).scores == [0, 0]
    assert scores(user, rewards.think_format_reward) == [1, 0]
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert scores(user, overlong, boxed) == [-0.5, 0]
    assert scores(user, rewards.get_repetition_penalty_reward(ngram_size=2), boxed)[0] < -0.9


def test_any_text_can_be_written():
    text = escaped("a\ud800b\x00c\u2028d\n" + "x" * 10_000, 100)
    assert len(text) < 140 and text.encode() and "\\ud800" in text and "\\x00" in text and "\\u2028" in text
    line = line_of(ValueError("half \ud83d of a pair\nand more" + "y" * 5000))
    assert line.startswith("ValueError: half \\ud83d of a pair and more") and len(line) <= 310 and line.encode()
