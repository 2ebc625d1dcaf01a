"""MaxRL: its expectation is the truncated gradient of log p, negative rewards are refused, and it acts in a step."""

import itertools
import math
import statistics
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.advantages import maxrl_advantages
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate
from pspo_jax.data.task import RewardResult
from pspo_jax.runs import verdicts
from tests.training.test_step import setup

NAN = math.nan
REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0, NAN]), min_size=5, max_size=5)


@pytest.mark.parametrize("group", [2, 4, 7])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_expected_gradient_is_that_of_log_p_cut_after_group_less_one_terms(group, p):
    """Every group that a policy of one Bernoulli draw, with log-odds as its parameter, can give; grad p = p (1 - p)."""
    draws = np.array(list(itertools.product([0.0, 1.0], repeat=group)))
    chance = (p**draws * (1 - p) ** (1 - draws)).prod(axis=1)
    found = (np.asarray(maxrl_advantages(jnp.asarray(draws, jnp.float32))) * (draws - p)).mean(axis=1)
    want = sum((1 - p) ** (k - 1) for k in range(1, group)) * p * (1 - p)
    assert chance @ found == pytest.approx(want, rel=1e-5)


@given(REWARDS)
def test_equals_a_plain_loop(rewards):
    judged = [r for r in rewards if not math.isnan(r)]
    mean = statistics.fmean(judged) if judged else 0.0
    want = [0.0 if mean == 0 or math.isnan(r) else (r - mean) / mean for r in rewards]
    got = np.asarray(maxrl_advantages(jnp.asarray([rewards], jnp.float32)))[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    if len(set(judged)) < 2:
        assert not got.any()


def test_groups_without_a_success_or_with_a_negative_reward_are_worth_nothing():
    got = maxrl_advantages(jnp.array([[0.0, 0, 0], [1, 1, 1], [NAN, 1, NAN], [2, -1, 1], [NAN] * 3, [0, 0, 0.3]]))
    assert not np.asarray(got)[:5].any()
    np.testing.assert_allclose(got[5], [-1, -1, 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"reward.terms": "accuracy, overlong=0.5"}, "reward.terms='accuracy, overlong=0.5' may give -0.5"),
        ({"reward.terms": "accuracy, format=-2"}, "may give -2"),
        ({"reward.terms": "cosine"}, "may give -0.5"),
        ({"reward.terms": "accuracy, repetition", "reward.repetition_penalty": -3.0}, "may give -3"),
        ({"loss.kl_coef": 0.1, "loss.kl_in": "reward"}, "set loss.kl_in=loss"),
    ],
)
def test_rewards_below_zero_are_refused_before_the_run(fields, reason):
    text = {"task.name": "math", "task.train_data": "rows.jsonl", "model.tokenizer": "x"}
    values = {"algorithm.name": "maxrl", **text, **fields}
    with pytest.raises(ConfigError) as error:
        validate(replace(Config(), values))
    assert str(error.value).startswith("advantage.name=maxrl: ") and reason in str(error.value)
    validate(replace(Config(), values | {"algorithm.name": "grpo"}))


@pytest.mark.parametrize("terms", ["accuracy", "accuracy, format=0.5", "accuracy, mine:reward", "mine:penalty=-1"])
def test_terms_that_are_not_known_to_be_negative_are_taken(terms):
    text = {"task.name": "math", "task.train_data": "rows.jsonl", "model.tokenizer": "x"}
    validate(replace(Config(), {"algorithm.name": "maxrl", "reward.terms": terms, **text}))


def test_a_negative_reward_of_ones_own_stops_the_run():
    config = resolve(replace(Config(), {"algorithm.name": "maxrl"}))

    def scores(*rewards):
        values = np.float32([rewards])
        return RewardResult(values, {"accuracy": values}, values, [[None] * len(rewards)], Counter(), ())

    verdicts.check_sign(scores(0, 1, NAN), 1, config)
    with pytest.raises(ConfigError) as error:
        verdicts.check_sign(scores(0, 1, -0.25, NAN), 3, config)
    assert str(error.value).startswith("advantage.name=maxrl: ") and "step 3 has -0.25; change" in str(error.value)
    verdicts.check_sign(scores(0, 1, -0.25), 3, resolve(replace(Config(), {"algorithm.name": "grpo"})))


def test_a_step_trains_on_these_advantages():
    rewards = np.zeros((8, 4), np.float32)
    for row in range(8):
        rewards[row, : row % 5] = 1
    _, _, state, step, sample = setup(algorithm__name="maxrl")
    before = jax.device_get(state.params)
    state, metrics = step(state, sample(state.params, 0), jnp.asarray(rewards))
    # One of four right: 3, -1, -1, -1. Two: 1 each. Three: -1 and three times 1/3. These rows come 2, 2 and 1 times.
    assert float(metrics["advantages/abs_mean"]) == pytest.approx((2 * 6 + 2 * 4 + 2) / 32)
    assert metrics["groups/effective"] == 5
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params))
    assert max(jax.tree.leaves(moved)) > 1e-4
