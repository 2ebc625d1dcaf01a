"""Selectors: exact draw probabilities, weights as in the paper, epochs without replacement, and that they act."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pspo_jax.config import SelectionConfig
from pspo_jax.selection import pps, uniform
from pspo_jax.selection.pps import PpsState
from pspo_jax.state import Outcome


def outcome(advantages, rewards=None, raw=None):
    a = jnp.asarray(advantages, jnp.float32)
    rewards = jnp.zeros_like(a) if rewards is None else jnp.asarray(rewards, jnp.float32)
    return Outcome(rewards, a, a if raw is None else jnp.asarray(raw, jnp.float32))


@given(st.sampled_from([1, 2, 3, 5, 8, 16, 23]), st.data())  # each pair of sizes compiles anew
def test_uniform_visits_every_prompt_once_an_epoch(n, data):
    b = data.draw(st.integers(1, n))
    selector = uniform()
    state = selector.init(n)
    drawn = []
    for i in range(2 * math.ceil(n / b) + 1):
        ids, weight, state = selector.select(state, jax.random.key(i), jnp.int32(i), b)
        batch = np.asarray(ids).tolist()
        assert len(set(batch)) == b
        assert np.asarray(weight).tolist() == [1.0] * b
        drawn += batch
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_uniform_shuffles_each_epoch():
    selector = uniform()
    state, orders = selector.init(50), []
    for i in range(3):
        ids, _, state = selector.select(state, jax.random.key(i), jnp.int32(i), 50)
        orders.append(np.asarray(ids).tolist())
    assert orders[0] != orders[1] != orders[2]


def successive_pairs(p):
    """Exact probability of each ordered pair in successive draws without replacement."""
    return {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(len(p)), 2)}


def test_pps_draws_with_the_papers_probabilities():
    priority = np.array([1.0, 0.3, 0.05, 2.0])
    p = priority**0.6 / (priority**0.6).sum()
    selector = pps(SelectionConfig(exponent=0.6))
    state = PpsState(jnp.asarray(priority, jnp.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    ids = np.asarray(jax.vmap(lambda k: selector.select(state, k, 0, 2)[0])(keys))
    want = successive_pairs(p)
    got = [np.sum((ids[:, 0] == i) & (ids[:, 1] == j)) for i, j in want]
    assert stats.chisquare(got, np.array(list(want.values())) * len(ids)).pvalue > 1e-3


@given(st.lists(st.floats(1e-6, 10), min_size=5, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_pps_weights_equal_plain_python(priority, exponent, correction):
    selector = pps(SelectionConfig(exponent=exponent, correction=correction))
    state = PpsState(jnp.asarray(priority, jnp.float32))
    ids, weight, _ = selector.select(state, jax.random.key(1), 0, 4)
    n, total = len(priority), sum(p**exponent for p in priority)
    raw = [(1 / (n * priority[i] ** exponent / total)) ** correction for i in np.asarray(ids).tolist()]
    np.testing.assert_allclose(weight, np.array(raw) / max(raw), rtol=1e-3)
    # w (N P)^beta = 1 before normalisation.
    for w, i in zip(raw, np.asarray(ids).tolist(), strict=True):
        assert w * (n * priority[i] ** exponent / total) ** correction == pytest.approx(1)


def test_a_priority_update_changes_the_next_draw():
    selector = pps(SelectionConfig(floor=1e-6))
    state = selector.init(100)
    before, _, _ = selector.select(state, jax.random.key(7), 0, 8)
    # The prompts just drawn turn out to teach nothing.
    state = selector.observe(state, before, outcome(np.zeros((8, 4))), 0)
    after, _, _ = selector.select(state, jax.random.key(7), 0, 8)
    assert not set(np.asarray(before).tolist()) & set(np.asarray(after).tolist())


@pytest.mark.parametrize(("statistic", "want"), [("last", 0.5), ("mean", 1.0), ("max", 2.0)])
def test_pps_statistics(statistic, want):
    selector = pps(SelectionConfig(statistic=statistic, floor=1e-6))
    state = selector.observe(selector.init(3), jnp.array([1]), outcome([[-2.0, 1.0, 0.5, 0.5]]), 0)
    np.testing.assert_allclose(state.priority, [1.0, want + 1e-6, 1.0], rtol=1e-5)


def test_pps_signal_is_raw_or_smoothed():
    seen = outcome([[0.0, 3.0]], raw=[[0.0, 1.0]])
    for signal, want in (("raw", 1.0), ("smoothed", 3.0)):
        selector = pps(SelectionConfig(signal=signal, floor=1e-6))
        state = selector.observe(selector.init(1), jnp.array([0]), seen, 0)
        assert float(state.priority[0]) == pytest.approx(want, abs=1e-5)


def test_a_prompt_without_a_verdict_keeps_its_priority():
    for statistic in ("last", "mean", "max"):
        selector = pps(SelectionConfig(statistic=statistic, initial=0.7))
        seen = outcome(np.zeros((1, 3)), rewards=np.full((1, 3), np.nan))
        state = selector.observe(selector.init(2), jnp.array([1]), seen, 0)
        np.testing.assert_allclose(state.priority, [0.7, 0.7])
