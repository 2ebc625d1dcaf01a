"""The tracked baseline against plain Python, and that groups whose rewards are all equal teach at a revisit."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.advantages import group_advantages, tracked_baseline
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig

NAN = math.nan
FORGETTING = {
    "fixed": ForgettingConfig(mode="fixed", discount=0.7, prior_successes=2.0, prior_failures=0.5),
    "nothing": ForgettingConfig(mode="fixed", discount=1.0),
    "everything": ForgettingConfig(mode="fixed", discount=0.0),
    "policy_drift": ForgettingConfig(mode="policy_drift", half_life=0.06, low=0.1, high=0.9),
}


class PlainTracked:
    """A_i = (r_i - a / (a + b)) / scale, then a <- rho a + s and b <- rho b + f, one prompt at a time."""

    def __init__(self, config, forgetting):
        self.config, self.forgetting, self.beliefs = config, forgetting, {}

    def rho(self, moved):
        f = self.forgetting
        return f.discount if f.mode == "fixed" else min(max(2 ** (-moved / f.half_life), f.low), f.high)

    def visit(self, prompt, rewards, policy_drift):
        values = [r for r in rewards if not math.isnan(r)]
        seen = prompt in self.beliefs
        a, b, when = self.beliefs.get(prompt, (self.forgetting.prior_successes, self.forgetting.prior_failures, 0.0))
        if not values or (len(values) < 2 and not seen):
            got = [None] * len(rewards)
        else:
            baseline = a / (a + b) if seen else statistics.fmean(values)
            got = [None if math.isnan(r) else r - baseline for r in rewards]
        if not values:
            return got, None
        s, rho = sum(min(max(r, 0.0), 1.0) for r in values), self.rho(policy_drift - when)
        return got, (rho * a + s, rho * b + len(values) - s, policy_drift)

    def estimate(self, ids, groups, policy_drift):
        visits = [self.visit(i, rewards, policy_drift) for i, rewards in zip(ids, groups, strict=True)]
        self.beliefs |= {i: belief for i, (_, belief) in zip(ids, visits, strict=True) if belief}
        known = [a for got, _ in visits for a in got if a is not None]
        size = math.sqrt(sum(a * a for a in known) / max(len(known), 1)) + self.config.eps
        by = size if self.config.scale == "batch" else 1.0
        return [[0.0 if a is None else a / by for a in got] for got, _ in visits]


@functools.cache
def compiled(config, forgetting):
    advantage = tracked_baseline(config, forgetting)
    return advantage, jax.jit(advantage.estimate)


def assert_equals_plain_python(config, forgetting, steps):
    (advantage, estimate), plain, policy_drift = compiled(config, forgetting), PlainTracked(config, forgetting), 0.0
    state = advantage.init(4)
    for ids, groups, moves in steps:
        args = jnp.asarray(ids), jnp.asarray(groups, jnp.float32), None, jnp.float32(policy_drift)
        got, state = estimate(state, *args)
        np.testing.assert_allclose(got, plain.estimate(ids, groups, policy_drift), rtol=1e-4, atol=2e-5)
        policy_drift += moves
    assert set(np.flatnonzero(state.seen).tolist()) == set(plain.beliefs)
    for i, belief in plain.beliefs.items():
        np.testing.assert_allclose([x[i] for x in state.beliefs], belief, rtol=1e-4, atol=1e-5)


def batches(ids, verdicts):
    """Steps of three prompts out of four: their ids, their rewards, and how far the policy moves."""
    groups = st.lists(st.lists(verdicts, min_size=4, max_size=4), min_size=3, max_size=3)
    return st.lists(st.tuples(ids, groups, st.sampled_from([0.0, 0.02, 0.1, 0.4])), min_size=1, max_size=6)


DISTINCT = st.permutations(range(4)).map(lambda order: order[:3])
REPEATED = st.lists(st.integers(0, 1), min_size=3, max_size=3)


@pytest.mark.parametrize("scale", ["none", "batch"])
@pytest.mark.parametrize("mode", FORGETTING)
@given(batches(DISTINCT, st.sampled_from([0.0, 0.25, 1.0, -1.0, 2.0, NAN])))
def test_tracked_equals_plain_python(mode, scale, steps):
    assert_equals_plain_python(AdvantageConfig(scale=scale, eps=0.05), FORGETTING[mode], steps)


@pytest.mark.parametrize("mode", ["fixed", "policy_drift"])
@given(batches(REPEATED, st.sampled_from([0.0, 0.5, 1.0])))
def test_repeated_prompts_read_the_old_belief_and_keep_the_last(mode, steps):
    assert_equals_plain_python(AdvantageConfig(scale="batch", ddof=0, eps=0.05), FORGETTING[mode], steps)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_repeated_prompts_keep_the_last_that_has_a_verdict(order):
    groups = [[0.0, 1, 1, 0], [NAN, 0, 0, 1], [NAN] * 4]
    steps = [([2, 2, 2], [groups[i] for i in order], 0.0), ([2, 0, 1], [[1.0, 1, 1, 0]] * 3, 0.0)]
    assert_equals_plain_python(AdvantageConfig(scale="none"), FORGETTING["fixed"], steps)


def after(rewards, scale="none", ids=(0,)):
    advantage = tracked_baseline(AdvantageConfig(scale=scale), FORGETTING["nothing"])
    groups = jnp.asarray([rewards] * len(ids), jnp.float32)
    return advantage, advantage.estimate(advantage.init(4), jnp.asarray(ids), groups)


def test_first_visit_is_against_the_group():
    rewards = [0.0, 0, 0, 1]
    _, (got, _) = after(rewards)
    np.testing.assert_allclose(got, group_advantages(jnp.array([rewards]), "none"), atol=1e-6)


def test_a_groups_deviation_is_refused_as_a_scale():
    with pytest.raises(ConfigError, match=r"advantage\.scale=group"):
        tracked_baseline(AdvantageConfig(scale="group"), FORGETTING["fixed"])


@pytest.mark.parametrize(("reward", "want"), [(1.0, 2 / 3), (0.0, -1 / 3)])
def test_groups_of_equal_rewards_teach_at_a_revisit_alone(reward, want):
    """Prior (1, 1) and one right of four: the baseline is 2 / 6."""
    advantage, (_, state) = after([0.0, 0, 0, 1])
    got, state = advantage.estimate(state, jnp.array([0, 1]), jnp.full((2, 4), reward))
    np.testing.assert_allclose(got, [[want] * 4, [0] * 4], atol=1e-6)
    assert np.asarray(state.seen)[:4].tolist() == [True, True, False, False]


def test_batch_scale_of_a_group_of_equal_rewards_is_finite_and_modest():
    advantage, (_, state) = after([0.0, 0, 0, 1], "batch")
    got, _ = advantage.estimate(state, jnp.array([0, 1]), jnp.array([[1.0, 1, 1, 1], [0, 0, 1, 0]]))
    size = math.sqrt((4 * (2 / 3) ** 2 + 3 * 0.25**2 + 0.75**2) / 8) + 1e-4
    np.testing.assert_allclose(got[0], (2 / 3) / size, rtol=1e-5)
    alone, _ = advantage.estimate(state, jnp.array([0]), jnp.ones((1, 4)))
    np.testing.assert_allclose(alone, 1, rtol=1e-3)


def test_a_single_verdict_counts_against_a_history():
    advantage, (_, state) = after([0.0, 0, 0, 1])
    rewards = jnp.array([[NAN, 1, NAN, NAN]] * 2)
    got, state = advantage.estimate(state, jnp.array([0, 1]), rewards)
    np.testing.assert_allclose(got, [[0, 2 / 3, 0, 0], [0] * 4], atol=1e-6)
    assert np.asarray(state.seen)[:2].all()
    got, _ = advantage.estimate(state, jnp.array([1]), rewards[:1])
    np.testing.assert_allclose(got, [[0, 1 / 3, 0, 0]], atol=1e-6)


def test_a_group_without_verdicts_changes_nothing():
    advantage, (_, state) = after([0.0, 0, 0, 1])
    got, same = advantage.estimate(state, jnp.array([0, 1]), jnp.full((2, 4), NAN), None, 3.0)
    assert np.count_nonzero(got) == 0
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_beliefs_follow_their_prompt_to_changed_data():
    advantage, (_, state) = after([0.0, 0, 0, 1], ids=(0, 2))
    moved = advantage.follow(state, advantage.init(200), jnp.asarray([-1] * 199 + [2]))
    got, _ = advantage.estimate(moved, jnp.array([199, 0]), jnp.ones((2, 4)))
    np.testing.assert_allclose(got, [[2 / 3] * 4, [0] * 4], atol=1e-6)
    assert np.flatnonzero(moved.seen).tolist() == [199]
