"""Completions whose loss is exactly 0 are left out of the update, and nothing that is computed changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.presets import LOSSES
from pspo_jax.distributed.mesh import batch_sharding, make_mesh
from pspo_jax.losses.policy_loss import denominators, rows_with_gradient
from pspo_jax.training.algorithm import build
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.update import loss_gradient
from tests.helpers import random_prompts, relative, slow_except, tiny_config, tiny_policy
from tests.training.test_packing import P, R, T, rows_with

AGGREGATIONS = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo", "token_sum")


def with_advantages(rows, kept):
    """The rows without a reference, and with an advantage of 0 but for those that are kept."""
    advantages = jnp.asarray(np.where(np.isin(np.arange(R), np.asarray(kept, int)), rows.advantages, 0))
    return rows.replace(reference_log_probs=None, advantages=advantages)


def gradients(rows, computed, **fields):
    """What `loss_gradient` returns where these rows are computed; None = all of them, the oracle."""
    return gradient_of(tiny_config(**{"loss__microbatch_rows": 4} | fields))(tiny_policy()[1], rows, computed)


@functools.cache
def gradient_of(config):
    """A compiled function of params, rows and the rows that are computed, None = all."""
    model = tiny_policy()[0]

    def run(params, rows, computed):
        total = denominators(rows, count_masked=config.loss.count_masked, computed=computed)
        return loss_gradient(model, lambda w, _: w, params, rows, jnp.float32(0.9), config, total, computed)

    return jax.jit(run)


def same(rows, packing, **fields):
    """Compare the gradient with and without the rows left out; returns both results."""
    config = tiny_config(loss__packing=packing, **fields)
    kept = rows_with_gradient(rows, config.loss)
    some, every = (gradients(rows, x, loss__packing=packing, **fields) for x in (kept, None))
    if any(np.asarray(x).any() for x in jax.tree.leaves(every[0])):
        # VESPO's weights of rows so far from the old policy are near 0, and so is what is left of the sum.
        assert relative(some[0], every[0]) < (1e-5 if config.loss.surrogate == "vespo" else 1e-6)
    else:
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(some[0]))
    for name in ("loss", "kl", "low", "high", "low_min", "high_max"):
        np.testing.assert_allclose(getattr(some[1], name), getattr(every[1], name), rtol=1e-6, atol=1e-7, err_msg=name)
    return some, every


KEPT = [0, 2, 3, 4, 5, 6, 7, 13, 21]


@pytest.mark.parametrize("packing", slow_except([True], [True, False]), ids=["packed", "padded"])
@pytest.mark.parametrize("name", slow_except(["gspo"], sorted(LOSSES)))
def test_every_loss_is_that_of_all_rows(name, packing):
    rows = with_advantages(rows_with(masked=(5,)), KEPT)
    some, every = same(rows, packing, loss__name=name)
    assert int(some[3].computed) < int(every[3].computed) * (1 if packing else 0.6)


@pytest.mark.parametrize("aggregation", slow_except(["dapo"], AGGREGATIONS))
def test_every_denominator_counts_all_rows(aggregation):
    same(with_advantages(rows_with(1), KEPT), True, loss__aggregation=aggregation, loss__dual_clip=3.0)


@pytest.mark.parametrize("packing", slow_except([True], [True, False]), ids=["packed", "padded"])
@pytest.mark.parametrize("count", slow_except([], [0, 1, R]))
def test_any_number_of_rows_may_be_left_out(count, packing):
    """With all left out nothing is computed."""
    rows = with_advantages(rows_with(2), range(count))
    some, every = same(rows, packing)
    computed = [int(x[3].computed) for x in (some, every)]
    assert computed[0] == {0: 0, R: computed[1]}.get(count, computed[0]) and computed[1] > 0
    assert np.isnan(some[1].entropy) == (count == 0)


def test_the_entropy_is_that_of_the_rows_that_are_computed():
    rows = with_advantages(rows_with(), KEPT)
    alone = rows.replace(mask=rows.mask & (rows.advantages != 0)[:, None])
    some, _ = same(rows, True)
    np.testing.assert_allclose(some[1].entropy, gradients(alone, None)[1].entropy, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.booleans(), min_size=R, max_size=R))
def test_which_rows_are_left_out_does_not_matter(kept):
    same(with_advantages(rows_with(3), np.flatnonzero(kept)), False)


@pytest.mark.parametrize(
    "fields", [{"loss__entropy_coef": 0.01}, {"loss__surrogate": "mine:surrogate"}], ids=["entropy", "own surrogate"]
)
def test_a_loss_that_may_not_be_0_without_an_advantage_leaves_nothing_out(fields):
    rows = with_advantages(rows_with(), KEPT)
    loss = dataclasses.replace(tiny_config().loss, **{k.removeprefix("loss__"): v for k, v in fields.items()})
    assert rows_with_gradient(rows, loss) is None
    assert rows_with_gradient(rows_with(), tiny_config(loss__kl_coef=0.1).loss) is None
    assert rows_with_gradient(rows, tiny_config().loss).tolist() == [i in KEPT for i in range(R)]


@pytest.mark.slow
def test_devices_agree_on_how_many_parts_there_are():
    rows = with_advantages(rows_with(), KEPT)
    want = gradients(rows, None)
    kept = rows_with_gradient(rows, tiny_config().loss)
    with jax.set_mesh(make_mesh(tiny_config(mesh__data=4), devices=jax.devices()[:4])) as mesh:
        spread = jax.device_put(rows, batch_sharding(jax.sharding.get_mesh() if mesh is None else mesh))
        for packing in (True, False):
            found = gradients(spread, kept, loss__packing=packing)
            assert relative(found[0], want[0]) < 1e-5
            assert int(found[3].computed) <= 3 * 4 * (P + T)


def rollouts_of(config):
    """Random completions of four tokens or more."""
    rng = np.random.default_rng(0)
    b, g, t = config.rollout.prompts, config.rollout.group_size, config.rollout.max_new_tokens
    lengths = rng.integers(4, t + 1, (b, g)).astype(np.int32)
    mask = np.arange(t) < lengths[..., None]
    log_probs = jnp.asarray(np.where(mask, -rng.gamma(2.0, 0.7, (b, g, t)), 0), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 13, (b, g, t)), jnp.int32)
    ended = jnp.asarray(lengths < t)
    prompts = random_prompts(b, P)
    return Rollouts(
        prompts, tokens, jnp.asarray(mask), log_probs, log_probs, jnp.asarray(lengths), ended, jnp.float32(1)
    )


@functools.cache
def step_of(config, optimizer):
    """(algorithm, train step) of a config."""
    algorithm = build(config)
    return algorithm, make_train_step(tiny_policy(config)[0], optimizer, algorithm, config)


SGD = optax.sgd(0.5)


@pytest.mark.parametrize("effective", [0, 3])
def test_a_step_computes_the_groups_that_teach(effective):
    config = tiny_config(algorithm__name="grpo", loss__microbatch_rows=4)
    _, params, _ = tiny_policy(config)
    algorithm, step = step_of(config, SGD)
    rollouts = rollouts_of(config)
    rewards = np.zeros((config.rollout.prompts, config.rollout.group_size), np.float32)
    rewards[:effective, 0] = 1
    before = jax.tree.map(np.asarray, params)
    state = init_state(params, SGD, algorithm, config, 40, P, jax.random.key(0))
    state, metrics = step(state, rollouts, jnp.asarray(rewards))
    assert float(metrics["update/completions"]) == effective * config.rollout.group_size
    drawn = np.asarray(rollouts.mask)
    assert float(metrics["entropy"]) == pytest.approx(-float(np.asarray(rollouts.log_probs)[drawn].mean()), rel=1e-5)
    if effective:
        assert relative(state.params, before) > 1e-6 and float(metrics["update/useful_tokens"]) > 0
    else:
        jax.tree.map(np.testing.assert_array_equal, state.params, before)
        assert np.isnan(float(metrics["update/useful_tokens"])) and np.isnan(float(metrics["update/entropy"]))
