"""The learning rate scaled by the effective sample size: its share in plain NumPy, and what it does to an update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.strategies import LossConfig
from pspo_jax.losses.ratios import effective_share, log_importance_weight
from tests.training.test_replay_step import mixed, replayed, setup, stepper

R, T = 5, 7


def share_of(old, behaviour, mask, importance="token_truncate"):
    config = LossConfig(importance=importance)
    old, behaviour, mask = jnp.asarray(old, jnp.float32), jnp.asarray(behaviour, jnp.float32), jnp.asarray(mask)
    return float(effective_share(log_importance_weight(old, behaviour, mask, config), mask, config))


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 2.0]), st.booleans())
def test_the_share_equals_plain_numpy(seed, spread, by_sequence):
    rng = np.random.default_rng(seed)
    old = -rng.gamma(1.0, 1.0, (R, T)).astype(np.float32)
    behaviour = old + rng.normal(0, spread, (R, T)).astype(np.float32)
    mask = np.arange(T) < rng.integers(0, T + 1, R)[:, None]
    gap = (old - behaviour).astype(np.float64)
    w = np.exp([gap[r][mask[r]].sum() for r in range(R) if mask[r].any()] if by_sequence else gap[mask])
    want = w.sum() ** 2 / (len(w) * (w**2).sum()) if len(w) else 1.0
    got = share_of(old, behaviour, mask, "sequence_mask" if by_sequence else "token_truncate")
    assert got == pytest.approx(want, rel=1e-4)
    if len(w):
        assert 1 / len(w) - 1e-5 <= got <= 1 + 1e-5
    if spread == 0:
        assert got == 1


def test_weights_that_are_not_finite_have_a_share():
    """Two of four completions whose products are e^700 beside two of e^-700."""
    old = np.repeat([[100.0], [-100.0]], 2, axis=0) * np.ones((4, T))
    assert share_of(old, np.zeros((4, T)), np.ones((4, T), bool), "sequence_truncate") == pytest.approx(0.5)


def change(before, after):
    return np.concatenate([np.ravel(b - a) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)])


def test_an_update_on_old_groups_is_scaled_and_one_on_fresh_groups_is_not():
    found = {}
    for scaling in ("none", "linear"):
        made, state, _, (second, rewards) = replayed(loss__ess_scaling=scaling)
        first = jax.device_get(state.params)
        state, metrics = stepper(made)(state, second, rewards)
        found[scaling] = first, change(first, jax.device_get(state.params)), metrics
    assert "update/rate_factor" not in found["none"][2]
    # The first step has no old groups: the factor is 1, and the weights are the same to the last bit.
    jax.tree.map(np.testing.assert_array_equal, found["none"][0], found["linear"][0])
    factor = float(found["linear"][2]["update/rate_factor"])
    assert 0.2 < factor < 0.999
    # With plain gradient descent the change is the factor times the change without it.
    np.testing.assert_allclose(found["linear"][1], factor * found["none"][1], rtol=1e-3, atol=1e-6)
    # The gradient itself is not scaled.
    assert float(found["linear"][2]["grad_norm"]) == pytest.approx(float(found["none"][2]["grad_norm"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"loss__minibatches": 2}, {"loss__num_iterations": 2}, {"replay__name": "filter"}])
def test_the_square_root_is_between_the_share_and_one(fields):
    factor = {}
    for scaling in ("sqrt", "linear"):
        made = setup(algorithm__name="popo", loss__ess_scaling=scaling, loss__old_log_probs="trainer", **fields)
        state, step = made[4], stepper(made)
        for i in range(3):
            rewards = mixed(i)
            rewards[2 * i] = 1
            state, metrics = step(state, made[5](state.params, i), rewards)
        factor[scaling] = float(metrics["update/rate_factor"])
    assert factor["linear"] <= factor["sqrt"] <= 1 + 1e-6
