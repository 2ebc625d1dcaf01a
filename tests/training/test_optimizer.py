"""The optimizer: AdamW in float32 for weights of any type, and weight decay on matrices alone."""

from __future__ import annotations

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from pspo_jax.config.schema import PROJECTIONS, OptimizerConfig
from pspo_jax.model import built_in, transformer
from pspo_jax.training.optimizer import adamw, decays, in_float32
from tests.helpers import tiny_config

RATE = 1e-2


def numpy_adam(grads, b1=0.9, b2=0.999, eps=1e-8):
    """(changes, second moment) of Adam after the gradients, in float64: Kingma and Ba, 2015, algorithm 1."""
    m = v = 0.0
    changes = []
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        changes.append(-RATE * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.asarray(changes), v


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_moment_decays_as_numpy_says(dtype):
    """Ten large gradients, then 2,990 small ones: with b2 = 0.999 rounded to 1, the large ones would never fade."""
    grads = np.where(np.arange(3000) < 10, 1.0, 1e-3).astype(np.float32)
    config = OptimizerConfig(learning_rate=RATE, warmup=0, schedule="constant", b2=0.999, clip_norm=1e9)
    optimizer = adamw(config, 3000)
    params = {"w": jnp.ones((1, 1), dtype)}

    @jax.jit
    def run(grads):
        def one(state, g):
            changes, state = optimizer.update({"w": g.astype(dtype)[None, None]}, state, params)
            return state, changes["w"][0, 0]

        return jax.lax.scan(one, optimizer.init(params), grads)

    state, changes = run(jnp.asarray(grads))
    wanted, nu = numpy_adam(jnp.asarray(grads, dtype).astype(jnp.float32))
    assert changes.dtype == jnp.float32
    np.testing.assert_allclose(optax.tree.get(state, "nu")["w"][0, 0], nu, rtol=1e-4)
    assert nu < 1e-3
    np.testing.assert_allclose(changes, wanted, rtol=1e-3)


def test_any_optimizer_keeps_its_state_in_float32():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    optimizer = in_float32(optax.adam(1e-3))
    state = optimizer.init(params)
    changes, after = optimizer.update(params, state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)
    assert optax.tree.get(after, "nu")["w"].dtype == changes["w"].dtype == jnp.float32
    assert optax.apply_updates(params, changes)["w"].dtype == jnp.bfloat16


def decayed(params):
    """Names of the leaves that weight decay is for, without the attribute that holds an array."""
    found = [path for path, yes in jax.tree_util.tree_leaves_with_path(decays(params)) if yes]
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path in found}


def test_weight_decay_moves_matrices_alone():
    optimizer = adamw(OptimizerConfig(weight_decay=0.5, warmup=0, schedule="constant", learning_rate=0.1), 1)
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones((3, 2))}
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(changes["w"], -0.05)
    np.testing.assert_array_equal(changes["norm"], 0)


def test_matrices_of_the_built_in_policy_decay_and_its_stacked_norms_and_biases_do_not():
    config = tiny_config(model__qkv_bias=True, model__qk_norm=True)
    params = jax.eval_shape(transformer(built_in(config.model, 16)).init, jax.random.key(0))
    assert params["layers"]["q_norm"].ndim == 2 and params["layers"]["q_bias"].ndim == 3
    assert decayed(params) == {f"layers/{name}" for name in PROJECTIONS} | {"embed", "head"}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.ln_f = nnx.RMSNorm(4, rngs=rngs)


def test_matrices_of_an_nnx_model_decay_alone():
    params = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    assert decayed(params) == {"embed/embedding", "blocks/0/linear/kernel", "blocks/1/linear/kernel"}


def test_matrices_of_stacked_nnx_blocks_decay_alone():
    params = nnx.state(nnx.eval_shape(lambda: Block(nnx.Rngs(0))), nnx.Param)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), params)
    assert stacked["norm"]["scale"].shape == stacked["linear"]["bias"].shape == (3, 4)
    assert decayed(stacked) == {"linear/kernel"}


def test_matrices_of_a_linen_model_decay_alone():
    class Small(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.LayerNorm()(linen.Embed(5, 4)(x)))

    params = jax.eval_shape(Small().init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert decayed(params) == {"Embed_0/embedding", "Dense_0/kernel"}


def test_leaves_without_names_go_by_their_dimensions():
    Pair = namedtuple("Pair", "weight offset")
    x, m = np.ones(3), np.ones((3, 3))
    assert decays([m, x, (m, x), Pair(m, x)]) == [True, False, (True, False), Pair(True, False)]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("h/ln_1/weight", False),
        ("layers/input_layernorm/weight", False),
        ("layers/mlp/gate_proj/bias", False),
        ("LayerNorm_0/scale", False),
        ("norm2/w", False),
        ("norm_proj/kernel", True),
        ("ada_norm/linear/kernel", True),
        ("unbiased/kernel", True),
        ("layers/q_lora_b", True),
        ("conv/kernel", True),
    ],
)
def test_names_decide_about_arrays_that_may_be_stacked(path, wanted):
    tree = np.ones((2, 3))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(decays(tree)) == [wanted]
