"""The built-in model against plain formulas, and its table of weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config, ModelConfig
from pspo_jax.distributed.mesh import constrain, make_mesh
from pspo_jax.model.architecture import Rotary, plain_frequencies
from pspo_jax.model.attention import xla
from pspo_jax.model.interface import Packed
from pspo_jax.model.mixed_precision import einsum_lowp
from pspo_jax.model.rotary import rope, rotation
from pspo_jax.model.weights import table, weight_axes
from tests.helpers import slow_except, tiny_policy


def plain_forward(a, params, tokens):
    """One row, float64 numpy, a loop over heads and positions."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + a.norm_eps) * w

    def rotate(x, position):
        half = len(x) // 2
        angle = position * np.array(a.rotaries[0].frequencies)
        u, v = x[:half], x[half:]
        return np.concatenate([u * np.cos(angle) - v * np.sin(angle), v * np.cos(angle) + u * np.sin(angle)])

    x = p["embed"][tokens]
    for layer in range(a.layers):
        w = {k: v[layer] for k, v in p["layers"].items()}
        y = norm(x, w["attn_norm"])
        q, k, v = (np.einsum("sd,dnh->snh", y, w[name]) for name in "qkv")
        if a.biases:
            q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
        if a.qk_norm == "head":
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        out = np.zeros_like(x)
        for head in range(a.heads):
            kv = head // (a.heads // a.kv_heads)
            for s in range(len(tokens)):
                query = rotate(q[s, head], s)
                scores = np.array([query @ rotate(k[t, kv], t) for t in range(s + 1)]) / np.sqrt(a.head_dim)
                weights = np.exp(scores - scores.max())
                mixed = (weights / weights.sum()) @ v[: s + 1, kv]
                out[s] += mixed @ w["o"][head]
        x = x + out
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    head = p["embed"].T if a.tied else p["head"]
    return norm(x, p["final_norm"]) @ head


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": True},
        {"qkv_bias": True, "kv_heads": 4},
        {"qk_norm": True, "kv_heads": 1},
        {"remat": "full"},
    ],
)
def test_forward_equals_plain_numpy(shape):
    model, params, a = tiny_policy(**shape)
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape), params)
    tokens = np.array([3, 1, 4, 1, 5, 9, 2])
    got = model.logits(params, model.hidden(params, jnp.asarray(tokens)[None]))[0]
    want = plain_forward(a, params, tokens)
    np.testing.assert_allclose(got[:, :14], want[:, :14], atol=1e-4)


REMAT = ("none", "dots", "full", "offload")


@pytest.fixture(scope="module")
def gradients():
    """By model.remat: the compiled gradient of a loss over 8 layers, and its value."""
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, 14)
    found = {}
    for remat in REMAT:
        model, params, _ = tiny_policy(layers=8, width=64, mlp_width=192, scan_unroll=1, remat=remat)

        def loss(params, model=model):
            return (model.hidden(params, tokens) ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        found[remat] = compiled, compiled(params)
    return found


@pytest.mark.parametrize("remat", REMAT[1:])
def test_remat_changes_no_gradient(gradients, remat):
    want, got = gradients["none"][1], gradients[remat][1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), want, got)


def test_remat_keeps_less(gradients):
    """Each value of model.remat keeps less than the one before; offload has the blocks' inputs in the host's memory."""
    size = {name: compiled.memory_analysis().temp_size_in_bytes for name, (compiled, _) in gradients.items()}
    assert size["none"] > size["dots"] > size["full"]


def test_offloaded_inputs_go_to_the_host():
    """What the CPU's compiler drops, as it has one memory: every block's input is copied out and back."""
    model, params, _ = tiny_policy(layers=8, scan_unroll=1, remat="offload")
    tokens = jnp.zeros((2, 8), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, tokens).sum()))(params))
    assert "<host>" in text and "<host>" not in text.replace("f32<host>", "")


def several_rows(s):
    """Rows of random lengths in one; rows 1 and 2 share the first 50 places of row 1."""
    rows = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, s)), axis=1))
    first = (rows[:, :, None] == rows[:, None]).argmax(axis=-1)
    places = jnp.arange(s) - first + jnp.where(rows == 2, 50, 0)
    return Packed(rows, places, jnp.where(rows == 2, 1, rows), jnp.where((rows == 1) & (places < 50), 1, -1))


@pytest.mark.parametrize("window", slow_except([300], [None, 300]))
@pytest.mark.parametrize("packed", slow_except([True], [False, True]))
def test_blocks_of_queries_change_nothing(window, packed, monkeypatch):
    """Long rows in blocks against the whole square: results and gradients."""
    s = 1100
    q, k, v = (jax.random.normal(jax.random.key(i), (2, s, n, 8)) for i, n in enumerate((4, 2, 2)))
    several = several_rows(s) if packed else None
    window = None if window is None else jnp.int32(window)

    def both(q, k, v):
        return jax.value_and_grad(
            lambda *args: (xla.attend(*args, 0.3, window, several) ** 2).sum(), argnums=(0, 1, 2)
        )(q, k, v)

    in_blocks = jax.jit(both)(q, k, v)
    assert xla.block_size(s, 1) == 138 and xla.block_size(1023, 1) == 1023
    assert xla.block_size(s, 2) == s and xla.block_size(1152, 2) == 144
    monkeypatch.setattr(xla, "BLOCKWISE_FROM_TOKENS", 10_000)
    whole = jax.jit(lambda *args: both(*args))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), in_blocks, whole)


def test_blocks_of_queries_along_context_change_nothing(monkeypatch):
    """Each device takes its places in blocks: no device ever has scores of all of its places."""
    s = 1152
    q, k, v = (jax.random.normal(jax.random.key(i), (2, s, n, 8)) for i, n in enumerate((4, 2, 2)))
    several = several_rows(s)

    def both(q, k, v):
        q = constrain(q, "rows", "length", None, None)
        return jax.value_and_grad(lambda *args: (xla.attend(*args, 0.3, None, several) ** 2).sum(), argnums=(0, 1, 2))(
            q, k, v
        )

    mesh = make_mesh(replace(Config(), {"mesh.data": 2, "mesh.context": 4}))
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(q, k, v).compile()
        in_blocks = jax.device_get(compiled(q, k, v))
    biggest = max(
        int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    )
    assert biggest <= 4 * s // 4 // xla.QUERY_BLOCKS * s * 2
    monkeypatch.setattr(xla, "BLOCKWISE_FROM_TOKENS", 10_000)
    whole = jax.jit(both)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), in_blocks, whole)


def test_the_default_model_has_108864_parameters():
    model, params, _ = tiny_policy(layers=2, width=64, heads=8, kv_heads=8, head_dim=8, mlp_width=192, tied=False)
    assert sum(x.size for x in jax.tree.leaves(params)) == 108_864
    assert ModelConfig().width == 64 and model.vocab_size == 16


def test_table_init_and_axes_are_one_tree():
    model, params, a = tiny_policy(qkv_bias=True, qk_norm=True)
    weights = table(a)
    flat = jax.tree.leaves(weights, is_leaf=lambda x: hasattr(x, "axes"))
    assert jax.tree.structure(params) == jax.tree.structure(
        weight_axes(weights), is_leaf=lambda x: isinstance(x, tuple)
    )
    for w, value in zip(flat, jax.tree.leaves(params), strict=True):
        assert value.shape == w.shape and len(w.axes) == len(w.shape)
    assert model.axes == weight_axes(weights)


def test_rope_keeps_relative_positions():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [
            rope(x, rotation(jnp.array([[n]]), Rotary(plain_frequencies(8, 100.0)))).ravel()
            for x, n in ((q, i), (k, j))
        ]
        return float(at[0] @ at[1])

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-4)


def test_weights_depend_on_name_and_key_alone():
    _, a, _ = tiny_policy()
    _, b, _ = tiny_policy(qkv_bias=True)
    np.testing.assert_array_equal(a["layers"]["o"], b["layers"]["o"])
    assert float(jnp.abs(a["layers"]["q"] - a["layers"]["k"].mean()).max()) > 0


@pytest.mark.parametrize("spec", ["rsd,dnh->rsnh", "rsnh,nhd->rsd", "nd,vd->nv"])
def test_gradient_of_the_product_is_autodiffs(spec):
    sizes = dict(r=2, s=3, d=4, n=5, h=6, v=7)
    keys = jax.random.split(jax.random.key(0), 2)
    left, right = spec.split("->")[0].split(",")
    x, w = (jax.random.normal(k, [sizes[c] for c in part]) for k, part in zip(keys, (left, right), strict=True))
    got = jax.grad(lambda x, w: (einsum_lowp(spec, x, w, jnp.float32, jnp.float32) ** 3).sum(), argnums=(0, 1))(x, w)
    want = jax.grad(lambda x, w: (jnp.einsum(spec, x, w) ** 3).sum(), argnums=(0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


def test_no_product_of_two_float32_matrices_in_a_bfloat16_backward_pass():
    """Autodiff of float32 accumulation would put one there for each projection."""
    model, params, _ = tiny_policy(compute_dtype="bfloat16")
    x = jnp.ones((2, 16), jnp.bfloat16)

    def loss(params, x):
        return model.logits(params, x)[:, :14].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all("bf16" in line.split(":")[-1].split("->")[0] for line in dots), dots
