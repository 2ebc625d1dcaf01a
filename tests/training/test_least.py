"""The least memory and time of a step: below what the compiler takes, and equal to arithmetic done by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pspo_jax.arrays.state import TrainState
from pspo_jax.config.command_line import parse
from pspo_jax.config.presets import resolve
from pspo_jax.distributed.devices import DeviceSpec
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.model import built_in, transformer
from pspo_jax.model.architecture import Lora
from pspo_jax.model.weights import init_weights, table, weight_axes
from pspo_jax.planning import memory as plan
from pspo_jax.planning import roofline
from pspo_jax.training.optimizer import adamw
from pspo_jax.training.setup import prepare

L, D, H, K, F, V, P, T, B, G = 3, 32, 4, 2, 48, 50, 20, 300, 8, 4
WIDTH = 8  # of a head
ONE = DeviceSpec(memory=1e9, flops=1.0, bandwidth=1.0, link=1.0)
"""A device of one operation and one byte a second: its times are counts."""
BLOCK = D * (H + 2 * K) * WIDTH + H * WIDTH * D + 3 * D * F
"""Numbers in a block's matrices."""


def setup_of(lora=None, **fields):
    """As much of a `Setup` as the arithmetic reads, on one device."""
    shape = {"layers": L, "width": D, "heads": H, "kv_heads": K, "head_dim": WIDTH, "mlp_width": F}
    values = {f"model.{k}": v for k, v in shape.items()}
    values |= {"rollout.prompts": B, "rollout.group_size": G, "rollout.max_new_tokens": T, "mesh.data": 1}
    values |= {k.replace("__", "."): v for k, v in fields.items()}
    config = resolve(parse([w for k, v in values.items() for w in (f"--{k}", str(v))], "train", ""))
    a = dataclasses.replace(built_in(config.model, V), lora=lora)
    model, mesh = transformer(a), make_mesh(config, a, jax.devices()[:1])

    def placed(tree, axes):
        found = params_shardings(mesh, tree, axes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, found)

    params = placed(jax.eval_shape(model.init, jax.random.key(0)), model.axes)
    base = jax.eval_shape(lambda: init_weights(table(a), jax.random.key(0), "float32")) if lora else None
    frozen = placed(base, weight_axes(table(a))) if lora else None
    opt_state = jax.eval_shape(adamw(config.optimizer, 1).init, params)
    state = TrainState(None, params, opt_state, (), (), (), None, frozen=frozen)
    train = SimpleNamespace(tokens=np.zeros((9, P)), lengths=np.array([5, 20, 7]))
    return SimpleNamespace(
        config=config,
        architecture=a,
        model=model,
        mesh=mesh,
        abstract=state,
        task=SimpleNamespace(train=train),
        images=None,
        embeddings=None,
        room=None,
    )


def test_an_update_of_all_weights_takes_three_products_a_matrix():
    bound = roofline.update_lower_bound(setup_of(loss__packing=False), ONE)
    rows, length = B * G, P + T
    attention = L * 3 * 4 * H * WIDTH * length * (length + 1) / 2
    assert bound.products == pytest.approx(rows * (6 * L * BLOCK * length + attention + 6 * V * D * T))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_update_of_adapters_takes_two_products_a_frozen_matrix(remat):
    lora = Lora(2, 4.0, 0.0, ("q", "down"))
    bound = roofline.update_lower_bound(setup_of(lora, loss__packing=False, model__remat=remat), ONE)
    rows, length, again = B * G, P + T, remat == "full"
    adapters = L * (2 * (D + H * WIDTH) + 2 * (F + D))
    first = D * (H + 2 * K) * WIDTH  # below them nothing trains
    blocks = 2 * length * ((2 + again) * L * BLOCK - first + (3 + again) * adapters)
    attention = L * (3 + again) * 4 * H * WIDTH * length * (length + 1) / 2
    assert bound.products == pytest.approx(rows * (blocks + attention + 4 * V * D * T))
    whole = roofline.update_lower_bound(setup_of(loss__packing=False, model__remat=remat), ONE)
    assert bound.products < whole.products and bound.memory < whole.memory


def test_packed_updates_take_less_than_padded_ones():
    packed, padded = (roofline.update_lower_bound(setup_of(loss__packing=x), ONE) for x in (True, False))
    places = B * G * (T - 1) + B * 5  # of the shortest prompt, once a group
    pairs = B * G * (T - 1) * (5 + T / 2)
    wanted = 6 * L * BLOCK * places + 3 * 4 * L * H * WIDTH * pairs + 6 * V * D * B * G * T
    assert packed.products == pytest.approx(wanted)
    assert packed.products < padded.products


def test_a_rollout_computes_logits_of_what_is_drawn_alone():
    bound = roofline.rollout_lower_bound(setup_of(), ONE)
    decoded = B * G * (T - 1)
    pairs = B * P * (P + 1) / 2 + decoded * (5 + T / 2)
    wanted = 2 * L * BLOCK * (B * P + decoded) + 2 * V * D * (B + decoded) + 4 * L * H * WIDTH * pairs
    assert bound.products == pytest.approx(wanted)


def cache(**fields):
    found = plan._details(setup_of(**fields))["rollout"]
    return sum(size for name, size in found.items() if name.startswith("KV cache"))


def test_the_cache_is_that_of_one_part_and_of_its_slots():
    token = 2 * L * K * WIDTH * 4
    assert cache() == token * (B * P + B * G * (T - 1))
    assert cache(rollout__chunks=4) == token * (B * P + B * G * (T - 1)) / 4
    assert cache(rollout__slots=8) == token * (B * P + 8 * (P + T))
    assert cache(algorithm__name="dapo", rollout__oversampling=2) == 2 * cache()


def test_the_caches_of_stages_are_those_of_their_slots_and_of_rows_that_wait():
    """Slots of T and of T/2 tokens take the same memory, with a prompt each; rows wait with T/2 tokens."""
    fields = {"rollout__slots": 12, "rollout__stages": 2, "rollout__max_new_tokens": 128}
    found = plan._details(setup_of(**fields))["rollout"]
    token = 2 * L * K * WIDTH * 4
    assert found["KV cache of a stage's slots and their prompts (4 x 64, 2 x 128)"] == token * 4 * (64 + P)
    waiting = min(B * G, 10 * 128 // 64)
    assert found[f"KV cache of rows between stages ({waiting})"] == token * waiting * 64


def test_what_cannot_be_known_is_left_out_of_the_least():
    """Weights on one device are decoded as they lie; gradients of one microbatch come as activations go."""
    found = plan._details(setup_of(loss__microbatch_rows=0, loss__packing=False))
    assert found["rollout"]["weights as they are decoded"] == found["update"]["gradients"] == 0
    several = plan._details(setup_of(loss__microbatch_rows=4, loss__packing=False))["update"]
    assert several["gradients"] == 4 * sum(x.size for x in jax.tree.leaves(setup_of().abstract.params))
    kept = next(size for name, size in several.items() if name.startswith("activations kept"))
    assert kept == L * 4 * (P + T) * 4 * ((H + 2 * K) * WIDTH + 2 * F + D)


FIELDS = [
    {"rollout.chunks": 4, "loss.microbatch_rows": 4},
    {"rollout.slots": 16, "loss.packing": True, "model.remat": "full"},
    {"mesh.data": 2, "mesh.fsdp": 2, "algorithm.name": "dapo", "rollout.oversampling": 2.0},
    {"model.param_dtype": "bfloat16", "loss.microbatch_rows": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS)
def test_no_compiler_takes_less(fields):
    words = {"model.layers": 2, "rollout.prompts": 16, "rollout.max_new_tokens": 256, "mesh.data": 1} | fields
    words |= {"task.train_prompts": 64, "sft.steps": 0}
    config = parse([w for k, v in words.items() for w in (f"--{k}", str(v))], "train", "")
    setup = prepare(config, weights=False, devices=jax.devices()[:4] if "mesh.fsdp" in fields else jax.devices()[:1])
    peaks = plan._peaks(setup, plan._residents(setup), plan._details(setup))
    for name, peak in peaks.items():
        assert 0.02 * peak.compiled < peak.least <= peak.compiled, name
