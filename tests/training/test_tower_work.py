"""The tower's products in the compiled updates of a step: once for each prompt and iteration, whatever shares it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from pspo_jax.arrays.groups import empty_groups
from pspo_jax.arrays.images import empty_images
from pspo_jax.distributed.mesh import make_mesh, params_shardings
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
    config = tiny_config(**{"rollout__prompts": B, "rollout__max_new_tokens": T, "mesh__data": 1} | fields)
    model, a, weights = policy()
    optimizer, mesh = optax.sgd(0.5), make_mesh(config, a)
    longest = batch().tokens.shape[1]
    room = empty_images(1, longest, 5, VISION.patch_numbers, VISION.layout)

    def start(weights, prompts, key):
        state = init_state(weights, optimizer, build(config), config, 40, longest, key, images=room)
        groups = empty_groups(B, config.rollout.group_size, longest, T).replace(prompts=prompts)
        return state, rows_of(groups, jnp.int32(0), config)

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
    """The products of one pass over a batch, by arithmetic; attention within windows and over images in every block."""
    v, patches = VISION, B * 5 * VISION.layout.patches
    block = 4 * v.width**2 + 3 * v.width * v.mlp_width + 2 * v.width * (5 + 1) * v.layout.patches
    merged = v.width * v.layout.merge**2
    units = patches // v.layout.merge**2
    return 2 * (patches * (v.patch_numbers * v.width + v.layers * block) + units * (merged**2 + merged * 32))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rollout__group_size": 6, "loss__microbatch_rows": 4}, id="larger groups, six microbatches"),
        pytest.param({"rollout__group_size": 6}, id="larger groups", marks=pytest.mark.slow),
        pytest.param(
            {"rollout__group_size": 4, "loss__packing": True, "loss__minibatches": 2, "loss__top_entropy": 0.5},
            id="packed, two minibatches, entropies",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_tower_runs_once_for_each_prompt(fields):
    """Forward, forward again, each block once more, and twice as much backward: five passes, whatever shares them."""
    tower, others = flops(**ONCE)
    found = flops(**fields)
    assert found[0] == tower
    assert tower == pytest.approx(5 * forward_flops(), rel=0.02)
    assert found[1] != others


@pytest.mark.slow
def test_the_tower_runs_again_in_each_iteration():
    assert flops(**ONCE, loss__num_iterations=2)[0] == pytest.approx(2 * flops(**ONCE)[0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh__fsdp": 2, "mesh__context": 2, "mesh__tensor": 2},
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    ],
    ids=str,
)
def test_all_devices_share_the_tower(mesh):
    """Each of eight devices computes an eighth of all products, of which the tower's are more than half."""
    one, each = flops(**ONCE), flops(**ONCE | mesh)
    assert one[0] > one[1]
    assert sum(one) / 8 <= sum(each) < sum(one) / 8 * 1.08
