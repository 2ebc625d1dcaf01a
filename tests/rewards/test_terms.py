"""Rewards by name and weight."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import RewardConfig
from pspo_jax.config.text_fields import TERMS, interval, parse_terms
from pspo_jax.rewards import shaping
from pspo_jax.rewards.terms import ShapingInputs, shaping_term, user_functions, weighted_sum

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("accuracy", {"accuracy": 1.0}),
        ("format=1, cosine=2", {"format": 1.0, "cosine": 2.0}),
        ("accuracy = 0.5,my.rewards:f=-2", {"accuracy": 0.5, "my.rewards:f": -2.0}),
        ("accuracy=", {"accuracy": 1.0}),
        ("length=0", {"length": 0.0}),
        ("m:a.b,accuracy=1e-3", {"m:a.b": 1.0, "accuracy": 1e-3}),
    ],
)
def test_terms_and_weights(text, weights):
    found = parse_terms(RewardConfig(terms=text))
    assert found == weights and list(found) == list(weights)
    assert user_functions(RewardConfig(terms=text)) == tuple(name for name in weights if ":" in name)


@pytest.mark.parametrize(
    ("fields", "start", "why"),
    [
        ({"terms": "acuracy"}, "reward.terms='acuracy': ", "'acuracy' is not a reward term; choose among accuracy, "),
        ({"terms": ""}, "reward.terms='': ", "'' is not a reward term"),
        ({"terms": "accuracy,"}, "reward.terms='accuracy,': ", "'' is not a reward term"),
        ({"terms": "=1"}, "reward.terms='=1': ", "'' is not a reward term"),
        ({"terms": ":f"}, "reward.terms=':f': ", "':f' is not a reward term"),
        ({"terms": "m:"}, "reward.terms='m:': ", "'m:' is not a reward term"),
        ({"terms": "format, format=2"}, "reward.terms='format, format=2': ", "format appears twice"),
        ({"terms": "format=much"}, "reward.terms='format=much': ", "'much' is not a number"),
        ({"terms": "format=nan"}, "reward.terms='format=nan': ", "the weight 'nan' is out of range"),
        ({"terms": "format=inf"}, "reward.terms='format=inf': ", "the weight 'inf' is out of range"),
        ({"terms": "format=1=2"}, "reward.terms='format=1=2': ", "'1=2' is not a number"),
        ({"cosine_right": "1"}, "reward.cosine_right='1': ", "must be two numbers"),
        ({"cosine_wrong": "0,1,2"}, "reward.cosine_wrong='0,1,2': ", "must be two numbers"),
        ({"cosine_wrong": "a,b"}, "reward.cosine_wrong='a,b': ", "must be two numbers"),
    ],
)
def test_errors_name_the_field_in_a_line(fields, start, why):
    with pytest.raises(ConfigError) as error:
        parse_terms(RewardConfig(**fields))
    text = str(error.value)
    assert text.startswith(start) and why in text and "\n" not in text


def test_interval():
    assert interval("-0.5, 0.0", "reward.cosine_wrong") == (-0.5, 0.0)


def test_sum_by_weight():
    terms = {"a": np.float32([[1, 0]]), "b": np.float32([[0.5, -1]])}
    total = weighted_sum(terms, {"a": 2.0, "b": -1.0}, np.float32([[1, 0]]))
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, [[1.5, 1.0]])


def test_sum_without_a_verdict_is_none():
    """Another term's None is left out; all None, or no verdict, is no reward, whether or not accuracy is a term."""
    right = np.float32([[1, 1, NAN, 0]])
    terms = {"accuracy": right, "f": np.float32([[NAN, 0.5, 0.5, NAN]])}
    np.testing.assert_array_equal(weighted_sum(terms, {"accuracy": 1.0, "f": 2.0}, right), [[1, 2, NAN, 0]])
    np.testing.assert_array_equal(weighted_sum({"f": terms["f"]}, {"f": 2.0}, right), [[NAN, 1, NAN, NAN]])


values = st.sampled_from((0.0, 1.0, 0.5, -1.0, NAN))


@given(st.data())
def test_sum_against_a_loop(data):
    n = data.draw(st.integers(1, 5))
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    terms = {name: data.draw(st.lists(values, min_size=n, max_size=n)) for name in names}
    weights = {name: data.draw(st.sampled_from((0.0, 1.0, -0.5, 2.0))) for name in names}
    right = data.draw(st.lists(values, min_size=n, max_size=n))
    want = []
    for j in range(n):
        known = [weights[name] * terms[name][j] for name in names if not math.isnan(terms[name][j])]
        want.append(NAN if math.isnan(right[j]) or not known else sum(known))
    found = weighted_sum({k: np.float32([v]) for k, v in terms.items()}, weights, np.float32([right]))
    np.testing.assert_allclose(found, [want], rtol=1e-6)


TEXTS = [
    ["", "x" * 100, "<think>\na\n</think>\n<answer>\nb\n</answer>"],
    ["y" * 1500, "Step 1: go. Step 2: come.", "é" * 1000],
]
RIGHT = np.float32([[1, 0, 1], [1, 0.5, NAN]])
LENGTHS = np.int32([[0, 20, 30], [64, 50, 10]])
SHAPE = ShapingInputs(RIGHT, LENGTHS, TEXTS, 64)


def cosine(right, length, most, bounds, clamp):
    """One completion's reward, in plain Python."""
    if math.isnan(right):
        return NAN
    low, high = bounds[0] if right >= 1 else bounds[1]
    share = min(length / most, 1.0) if clamp else length / most
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def rows(call):
    return [[call(i, j) for j in range(3)] for i in range(2)]


def test_released_cosine_counts_characters():
    """It ends at 1,000 characters and turns back beyond, whatever the lengths in tokens are."""
    config = RewardConfig(variant="published_code", cosine_right="0.25,2", cosine_wrong="-1,-0.5", cosine_length=7)
    bounds = ((0.25, 2), (-1, -0.5))
    want = rows(lambda i, j: cosine(float(RIGHT[i, j]), len(TEXTS[i][j]), 1000, bounds, clamp=False))
    found = shaping_term("cosine", config, SHAPE)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_array_equal(
        found, shaping_term("cosine", config, SHAPE._replace(lengths=LENGTHS + 5, max_length=3))
    )
    assert found[0, 0] == 2 and found[1, 0] == pytest.approx(1.125)  # 1,500 characters pay as 500 do


@pytest.mark.parametrize("length", [0, 32])
def test_cosine_counts_tokens(length):
    want = rows(
        lambda i, j: cosine(float(RIGHT[i, j]), int(LENGTHS[i, j]), length or 64, ((0.5, 1), (-0.5, 0)), clamp=True)
    )
    np.testing.assert_allclose(shaping_term("cosine", RewardConfig(cosine_length=length), SHAPE), want, atol=1e-7)


@pytest.mark.parametrize(("cache", "used"), [(0, 12), (20, 20), (500, 64)])
def test_overlong_cache(cache, used):
    found = shaping_term("overlong", RewardConfig(overlong_cache=cache), SHAPE)
    np.testing.assert_array_equal(found, shaping.soft_overlong(LENGTHS, 64, used))


def test_text_terms_are_those_of_each_text():
    config = RewardConfig(repetition_ngram=2, repetition_penalty=-0.5)
    calls = {
        "format": shaping.format_open_r1,
        "tag_count": shaping.tag_count,
        "reasoning_steps": shaping.reasoning_steps,
        "repetition": lambda text: shaping.repetition(text, 2, -0.5),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(shaping_term(name, config, SHAPE), rows(lambda i, j, call=call: call(TEXTS[i][j])))
    visual = shaping_term("format", RewardConfig(format="geo3k"), SHAPE)
    np.testing.assert_array_equal(visual, rows(lambda i, j: shaping.format_geo3k(TEXTS[i][j])))
    np.testing.assert_array_equal(shaping_term("geo3k", config, SHAPE), shaping.geo3k(RIGHT, TEXTS))
    released = shaping_term("format", RewardConfig(format="open_rs"), SHAPE)
    np.testing.assert_array_equal(released, rows(lambda i, j: shaping.format_open_rs(TEXTS[i][j])))
    np.testing.assert_array_equal(shaping_term("length", config, SHAPE), shaping.length_kimi(RIGHT, LENGTHS))


def test_every_term_has_a_shape_and_a_type():
    for name in TERMS[1:]:
        found = shaping_term(name, RewardConfig(), SHAPE)
        assert found.shape == (2, 3) and found.dtype == np.float32
