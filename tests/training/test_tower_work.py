"""The tower's products in the compiled updates of a step: one pass for each prompt and iteration, whatever shares it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from pspo_jax.arrays.groups import groups_of
from pspo_jax.arrays.images import empty_images
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.scoring import rows_of
from pspo_jax.training.step import init_state
from pspo_jax.training.update import optimize
from tests.distributed.hlo import products
from tests.helpers import tiny_config
from tests.training.test_images import ONE, VISION, B, T, batch, policy

ONCE = {"rollout__group_size": 2}


@functools.cache
def flops(**fields):
    """(those of the tower, all others) on one device, with a loop of unknown length counted as one turn."""
    config = tiny_config(rollout__prompts=B, rollout__max_new_tokens=T, mesh__data=1, **fields)
    model, a, weights = policy()
    optimizer, mesh = optax.sgd(0.5), make_mesh(config, a)
    sample = make_sampler(model, config.rollout.group_size, T, 0)

    def start(weights, prompts, key):
        rollouts = sample(weights, prompts, key, SamplingParams.of(config.rollout, (5,)))
        rewards = jnp.zeros(rollouts.lengths.shape)
        longest = prompts.tokens.shape[1]
        room = empty_images(1, longest, 5, VISION.patch_numbers, VISION.layout)
        state = init_state(weights, optimizer, build(config), config, 40, longest, key, images=room)
        return state, rows_of(groups_of(rollouts, rewards, rewards, jnp.int32(0)), jnp.int32(0), config)

    state, rows = jax.eval_shape(start, weights, batch(), jax.random.key(0))
    split = params_shardings(mesh, weights, model.axes)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, split)
    update = jax.jit(lambda state, rows, images: optimize(model, optimizer, config, state, rows, ONE, images))
    with jax.set_mesh(mesh):
        text = update.lower(state.replace(params=params), rows, batch().images).compile().as_text()
    found = products(text)
    of_tower = sum(p.flops * p.times for p in found if "vision_tower" in p.scope)
    # Nothing of the tower is in the loop over microbatches, whose length is not known to the compiler.
    assert of_tower == sum(p.flops * p.times for p in products(text, unknown=7) if "vision_tower" in p.scope)
    return of_tower, sum(p.flops * p.times for p in found) - of_tower


def forward_flops():
    """The products of weights in one pass over a batch, by arithmetic."""
    v, patches = VISION, B * 5 * VISION.layout.patches
    block = 4 * v.width**2 + 3 * v.width * v.mlp_width
    merged = v.width * v.layout.merge**2
    units = patches // v.layout.merge**2
    return 2 * (patches * (v.patch_numbers * v.width + v.layers * block) + units * (merged**2 + merged * 32))


@pytest.mark.parametrize(
    "fields",
    [
        {"rollout__group_size": 6},
        {"rollout__group_size": 6, "loss__microbatch_rows": 4},
        {"rollout__group_size": 4, "loss__packing": True, "loss__minibatches": 2},
    ],
    ids=str,
)
def test_the_tower_runs_once_for_each_prompt(fields):
    tower, others = flops(**ONCE)
    print(fields, flops(**fields), tower, others, forward_flops())
    assert flops(**fields)[0] == tower
    assert 4 * forward_flops() < tower < 6 * forward_flops()


def test_iterations():
    print(flops(**ONCE), flops(**ONCE, loss__num_iterations=2))


def test_mesh():
    print(flops(**ONCE), flops(**ONCE, mesh__fsdp=2, mesh__context=2, mesh__tensor=2))
