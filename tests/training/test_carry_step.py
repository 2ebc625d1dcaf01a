"""The loss of tokens that several policies drew, against NumPy: weights of tokens, and pi_old by a pass or not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.groups import empty_groups
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.losses.policy_loss import compute_loss, denominators
from pspo_jax.training.algorithm import build
from pspo_jax.training.metrics import importance_statistics
from pspo_jax.training.scoring import rows_of, with_log_probs
from pspo_jax.training.step import init_state
from tests.helpers import random_prompts, tiny_config, tiny_policy

B, G, P, T, BUDGET, STEP = 8, 4, 9, 12, 5, 7
CARRY = {"rollout__carry": True, "rollout__budget": BUDGET}


@functools.cache
def drawn():
    """Groups whose three segments have the versions of the steps 5, 6 and 7, or some of these; and log-probs of pi."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, (B, G))
    begun = np.arange(3) * BUDGET < lengths.max(axis=1)[:, None]
    versions = np.sort(rng.integers(5, STEP + 1, (B, 3)), axis=1)
    versions[0] = STEP
    mask = np.arange(T) < lengths[..., None]
    shape = (B, G, T)
    groups = dataclasses.replace(
        empty_groups(B, G, P, T),
        prompts=random_prompts(B, P),
        tokens=jnp.asarray(rng.integers(0, 13, shape), jnp.int32),
        mask=jnp.asarray(mask),
        log_probs=jnp.asarray(np.where(mask, -2 + 0.3 * rng.normal(size=shape), 0), jnp.float32),
        advantages=jnp.asarray(rng.normal(size=(B, G)), jnp.float32),
        ended=jnp.ones((B, G), bool),
        step=jnp.full(B, STEP, jnp.int32),
        counted=jnp.ones(B, bool),
        versions=jnp.asarray(np.where(begun, versions, -1), jnp.int32),
    )
    current = jnp.asarray(-2 + 0.3 * rng.normal(size=(B * G, T)), jnp.float32)
    return groups, current


def numpy_ages(groups):
    """Steps since each token was drawn, token by token."""
    versions, mask = np.asarray(groups.versions), np.asarray(groups.mask)
    ages = np.zeros((B, G, T), int)
    for b, g, t in np.argwhere(mask):
        ages[b, g, t] = STEP - versions[b, t // BUDGET]
    return ages.reshape(B * G, T)


def numpy_loss(groups, current, old, config):
    """The decoupled loss of DAPO's aggregation, and its gradient in the log-probs of pi."""
    flat = [np.asarray(x, np.float64).reshape(B * G, T) for x in (groups.log_probs, groups.mask)]
    mu, mask = flat[0], flat[1] > 0
    advantage = np.asarray(groups.advantages, np.float64).reshape(-1, 1)
    low, high = 1 - config.loss.clip_low, 1 + config.loss.clip_high
    loss, grad = 0.0, np.zeros((B * G, T))
    for r, t in np.argwhere(mask):
        weight = min(np.exp(old[r, t] - mu[r, t]), config.loss.importance_cap)
        ratio, a = np.exp(current[r, t] - old[r, t]), advantage[r, 0]
        cut = ratio > high if a > 0 else ratio < low
        loss -= weight * (min(max(ratio, low), high) if cut else ratio) * a / mask.sum()
        grad[r, t] = 0.0 if cut else -weight * ratio * a / mask.sum()
    return loss, grad


@pytest.mark.parametrize("source", ["sampler", "interpolated"])
def test_loss_and_gradient_are_numpys(source):
    groups, current = drawn()
    config = tiny_config(**CARRY, loss__old_log_probs=source)
    model, params, _ = tiny_policy(config)
    state = init_state(params, optax.sgd(1.0), build(config), config, 40, P, jax.random.key(0))
    one = jnp.float32(1)

    @jax.jit
    def both(state, groups, current):
        rows = with_log_probs(model, state, rows_of(groups, jnp.int32(STEP), config), one, config)
        found = jax.value_and_grad(
            lambda x: compute_loss(x, jnp.zeros_like(x), rows, config.loss, denominators(rows), T), has_aux=True
        )(current)
        scored = completion_log_probs(model, state.weights, rows.prompts, rows.lengths, rows.tokens, one)[0]
        return rows, found, scored

    rows, ((loss, _), grad), scored = both(state, groups, current)
    ages, mu = numpy_ages(groups), np.asarray(groups.log_probs, np.float64).reshape(B * G, T)
    now, mask = np.asarray(current, np.float64), np.asarray(rows.mask)
    np.testing.assert_array_equal(np.asarray(rows.stale) & mask, ages > 0)
    if source == "sampler":
        old = np.where(ages > 0, np.asarray(scored, np.float64), mu)
    else:
        old = mu + ages / (ages + 1) * (now - mu)
    expected = numpy_loss(groups, now, old, config)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=2e-4, atol=1e-6)
    fresh = mask & (ages == 0)
    assert fresh.any() and (mask & (ages == 2)).any()
    # A token of the current policy has an importance weight of exactly 1.
    np.testing.assert_array_equal(np.asarray(rows.old_log_probs)[fresh], np.asarray(rows.behaviour_log_probs)[fresh])
    if source == "sampler":
        w = np.exp(old - mu)[mask & (ages > 0)]
        found = importance_statistics(rows, config)
        np.testing.assert_allclose(found.ess, w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-4)
        np.testing.assert_allclose([found.mean, found.max], [w.mean(), w.max()], rtol=1e-4)
        np.testing.assert_allclose(found.capped, (w > 2).mean(), atol=1e-6)
