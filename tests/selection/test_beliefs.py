"""Beliefs: the chance of a mixed group, forgetting, drift toward the population, and the population itself."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.per_prompt import last_of_each
from pspo_jax.config.strategies import ForgettingConfig
from pspo_jax.selection.beliefs import (
    Beliefs,
    Population,
    current,
    discount,
    init_beliefs,
    p_mixed,
    update_beliefs,
    update_population,
)

FIXED = ForgettingConfig(mode="fixed", discount=0.9)
MOVEMENT = ForgettingConfig(mode="policy_drift")
NOBODY = Population(jnp.float32(0), jnp.float32(0))
COUNTED, LAST_OF_EACH = jax.jit(update_population), jax.jit(last_of_each)


def beliefs(a, b, drift=0.0):
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return Beliefs(a, b, jnp.full(a.shape, drift, jnp.float32))


@pytest.mark.parametrize(("p", "want"), [(0.02, 0.149), (0.05, 0.337), (0.1, 0.570), (0.2, 0.832), (0.5, 0.992)])
def test_p_mixed_of_a_known_probability(p, want):
    for share in (p, 1 - p):
        assert float(p_mixed(jnp.float32(1e6 * share), jnp.float32(1e6 * (1 - share)), 8)) == pytest.approx(
            want, abs=1e-3
        )


@given(a=st.floats(0.2, 20), b=st.floats(0.2, 20), group=st.integers(1, 16), seed=st.integers(0, 2**32))
@settings(max_examples=15, derandomize=True)
def test_p_mixed_is_the_share_of_mixed_groups(a, b, group, seed):
    draws, rng = 100_000, np.random.default_rng(seed)
    right = rng.binomial(group, rng.beta(a, b, draws))
    got = float(p_mixed(jnp.float32(a), jnp.float32(b), group))
    share = ((right > 0) & (right < group)).mean()
    assert abs(got - share) <= 4 * math.sqrt(max(got * (1 - got), 0) / draws) + 1e-5


def beta_function(a, b):
    return Fraction(math.factorial(a - 1) * math.factorial(b - 1), math.factorial(a + b - 1))


@given(a=st.integers(1, 40), b=st.integers(1, 40), group=st.integers(1, 32))
def test_p_mixed_of_whole_counts_equals_fractions(a, b, group):
    edges = beta_function(a + group, b) + beta_function(a, b + group)
    want = float(1 - edges / beta_function(a, b))
    assert float(p_mixed(jnp.float32(a), jnp.float32(b), group)) == pytest.approx(want, abs=2e-6)


def test_a_group_of_one_is_never_mixed():
    np.testing.assert_allclose(p_mixed(jnp.array([0.3, 1, 50]), jnp.array([1.0, 1, 2]), 1), 0, atol=1e-6)


def test_a_fixed_discount_does_not_see_movement():
    np.testing.assert_allclose(discount(FIXED, jnp.array([0.0, 0.05, 3])), [0.9] * 3, rtol=1e-6)


def test_movement_halves_the_past_each_half_life_between_its_limits():
    drift = jnp.array([0.0, 0.002, 0.006, 0.011, 0.06, 5])
    want = [0.96, 0.96, 2**-0.1, 2 ** -(0.011 / 0.06), 0.875, 0.875]
    np.testing.assert_allclose(discount(MOVEMENT, drift), want, rtol=1e-6)
    wide = ForgettingConfig(mode="policy_drift", half_life=0.5, low=0.0, high=1.0)
    np.testing.assert_allclose(discount(wide, jnp.array([0.0, 0.5, 1, 2])), [1, 0.5, 0.25, 0.0625], rtol=1e-6)


@pytest.mark.parametrize("config", [FIXED, MOVEMENT])
def test_a_group_adds_its_counts_to_what_is_left_of_the_past(config):
    before = beliefs([5, 5], [3, 3], drift=0.1)
    drift = jnp.float32(0.11)
    rho = 0.9 if config is FIXED else 2 ** -(0.01 / 0.06)
    new = update_beliefs(config, before, NOBODY, jnp.array([3.0, 0]), jnp.array([1.0, 4]), drift)
    np.testing.assert_allclose(new.a, [1 + rho * 4 + 3, 1 + rho * 4], rtol=1e-5)
    np.testing.assert_allclose(new.b, [1 + rho * 2 + 1, 1 + rho * 2 + 4], rtol=1e-5)
    np.testing.assert_allclose(new.policy_drift, 0.11)
    spo = update_beliefs(config, before, None, jnp.array([3.0, 0]), jnp.array([1.0, 4]), drift, toward_prior=False)
    np.testing.assert_allclose(spo.a, [rho * 5 + 3, rho * 5], rtol=1e-5)
    np.testing.assert_allclose(spo.b, [rho * 3 + 1, rho * 3 + 4], rtol=1e-5)


@pytest.mark.parametrize("toward_prior", [True, False])
@pytest.mark.parametrize("config", [FIXED, MOVEMENT, ForgettingConfig(mode="fixed", shrinkage=0.2)])
def test_no_verdict_leaves_a_belief_as_it_is(config, toward_prior):
    before = beliefs([5, 1, 0.3], [3, 1, 9], drift=0.1)
    new = update_beliefs(
        config, before, Population(3.0, 5.0), jnp.zeros(3), jnp.zeros(3), jnp.float32(0.7), toward_prior
    )
    jax.tree.map(np.testing.assert_array_equal, new, before)


def test_without_drift_a_belief_stays_whatever_its_age():
    before = beliefs([5, 1], [3, 1])
    after = current(FIXED, before, Population(3.0, 5.0), jnp.array([0, -1]), jnp.int32(10**6))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@given(
    drift=st.floats(0.001, 0.999),
    prior=st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
    total=st.floats(0, 50),
    now=st.integers(0, 200),
)
@settings(max_examples=20)
def test_drift_equals_a_simulation_of_every_step(drift, prior, total, now):
    config = ForgettingConfig(mode="fixed", shrinkage=drift, prior_successes=prior[0], prior_failures=prior[1])
    last = np.unique(np.clip([-1, 0, 1, now // 2, now - 3, now - 2, now - 1], -1, now - 1))
    a, b = np.linspace(0.5, 9, len(last)), np.linspace(12, 0.2, len(last))
    share = (total + prior[0]) / (50 + sum(prior))
    a0, b0 = share * sum(prior), (1 - share) * sum(prior)
    got = current(
        config, beliefs(a, b), Population(jnp.float32(total), jnp.float32(50)), jnp.asarray(last), jnp.int32(now)
    )
    for i, step in enumerate(last):
        x, y = (a[i], b[i]) if step >= 0 else (a0, b0)
        # It is as it was learned at the step after the visit.
        for _ in range(step + 2, now + 1):
            x, y = x + drift * (a0 - x), y + drift * (b0 - y)
        assert float(got.a[i]) == pytest.approx(x, rel=2e-4, abs=1e-5)
        assert float(got.b[i]) == pytest.approx(y, rel=2e-4, abs=1e-5)


def test_full_drift_leaves_the_population_after_a_step():
    config = ForgettingConfig(mode="fixed", shrinkage=1.0)
    population = Population(jnp.float32(8), jnp.float32(10))
    got = current(config, beliefs([7, 7, 7], [2, 2, 2]), population, jnp.array([-1, 4, 3]), jnp.int32(5))
    np.testing.assert_allclose(got.a, [1.5, 7, 1.5], rtol=1e-5)
    np.testing.assert_allclose(got.b, [0.5, 2, 0.5], rtol=1e-5)


@given(seed=st.integers(0, 2**32), n=st.sampled_from([3, 10, 200]))
@settings(max_examples=15)
def test_the_population_is_the_sum_over_all_that_were_seen(seed, n):
    rng, batch, seen = np.random.default_rng(seed), 6, set()
    stored, population = init_beliefs(FIXED, n)
    a, b = np.array(stored.a), np.array(stored.b)
    for _ in range(30):
        ids = rng.integers(0, n, batch)
        writes = np.array([row not in ids[i + 1 :] for i, row in enumerate(ids)])
        np.testing.assert_array_equal(LAST_OF_EACH(ids)[0], writes)
        new_a, new_b = rng.uniform(0.1, 9, (2, batch)).astype(np.float32)
        first = np.array([row not in seen for row in ids.tolist()])
        population = COUNTED(population, beliefs(a[ids], b[ids]), beliefs(new_a, new_b), first, writes)
        seen |= set(ids.tolist())
        a[ids[writes]], b[ids[writes]] = new_a[writes], new_b[writes]
        rows = sorted(seen)
        assert float(population.seen) == len(rows)
        assert float(population.total) == pytest.approx(sum(a[r] / (a[r] + b[r]) for r in rows), rel=1e-4)
