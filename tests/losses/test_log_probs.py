"""Chunked log-probs: equal to the whole, in values and gradients, without [tokens, vocab]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.schema import ModelConfig
from pspo_jax.losses.log_probs import chunked_log_probs, compact_rows, completion_log_probs
from pspo_jax.model import built_in, transformer
from pspo_jax.model.interface import Model
from tests.helpers import slow_except, tiny_policy


def head_policy(vocab):
    """A policy that is only a head."""
    return Model(None, None, lambda p, h: h @ p["head"], None, None, vocab)


def whole(params, hidden, targets, temperature):
    logits = hidden @ params["head"] / temperature
    log_probs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_equal_the_whole(temperature):
    r, t, d, v = 3, 7, 8, 50_000
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (r, t, d))
    params = {"head": jax.random.normal(keys[1], (d, v)) * 0.3}
    targets = jax.random.randint(keys[2], (r, t), 0, v)

    def ours(params, hidden):
        # 1 MiB holds one column of these rows: seven chunks.
        return chunked_log_probs(head_policy(v), params, hidden, targets, temperature, logits_mib=1)

    got, want = ours(params, hidden), whole(params, hidden, targets, temperature)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    np.testing.assert_allclose(got[1], want[1], atol=2e-4)
    g = jax.grad(lambda p, h: (ours(p, h)[0] ** 2).sum(), argnums=(0, 1))(params, hidden)
    w = jax.grad(lambda p, h: (whole(p, h, targets, temperature)[0] ** 2).sum(), argnums=(0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), g, w)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_never_materialise(tied, skips):
    """Gradient of Qwen2.5-1.5B's head in chunks of 1,024 tokens: logits of 64 rows of 4,096 would need 159 GB.

    What it takes is a chunk's logits and the head's gradient, whatever the number of rows, and whether or not chunks
    may be left out; and not the latter of a head that is frozen.
    """
    t, d, v = 4096, 1536, 151_936
    spec = jax.ShapeDtypeStruct
    shape = ModelConfig(layers=1, width=d, heads=2, kv_heads=2, head_dim=64, mlp_width=64, tied=tied)
    model, head = transformer(built_in(shape, v)), spec((v, d) if tied else (d, v), jnp.float32)

    def loss(hidden, head, targets):
        params, mib = {"embed" if tied else "head": head}, 4 * 1024 * v // 2**20 + 1
        live = targets > 0 if skips else None
        return chunked_log_probs(model, params, hidden, targets, logits_mib=mib, valid=live)[0].sum()

    def compiled(rows, frozen=False):
        args = spec((rows, t, d), jnp.float32), head, spec((rows, t), jnp.int32)
        return jax.jit(jax.value_and_grad(loss, argnums=0 if frozen else (0, 1))).lower(*args).compile()

    few, many, frozen = compiled(8), compiled(64), compiled(8, frozen=True)
    assert few.memory_analysis().temp_size_in_bytes <= 1.7e9
    assert many.memory_analysis().temp_size_in_bytes == pytest.approx(
        few.memory_analysis().temp_size_in_bytes, rel=0.02
    )
    products = [program.cost_analysis()["flops"] for program in (few, frozen)]
    # Forward pass, logits again, and two gradients; of the frozen head, forward pass and one gradient.
    assert products[1] == pytest.approx(0.5 * products[0], rel=0.02)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("t", slow_except([13], [12, 13]))
def test_gradients_of_chunks_are_autodiffs(t, entropy_gradient):
    """Of log-probs and entropies, whether chunks divide the columns or not, and with columns that nobody needs."""
    rng, v = np.random.default_rng(0), 20_000  # four columns of three rows are a MiB
    hidden = jnp.asarray(rng.normal(size=(3, t, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, v, (3, t)))
    params = {"head": jnp.asarray(0.3 * rng.normal(size=(8, v)), jnp.float32)}
    weight = jnp.asarray(rng.normal(size=(2, 3, t)), jnp.float32)
    live = jnp.arange(t) < jnp.asarray([[5], [3], [6]])

    def plain(params, hidden):
        log_p = jax.nn.log_softmax(hidden @ params["head"] / 0.7)
        entropy = -(jnp.exp(log_p) * log_p).sum(axis=-1)
        entropy = entropy if entropy_gradient else jax.lax.stop_gradient(entropy)
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return jnp.where(live, jnp.stack([chosen, entropy]) * weight, 0).sum()

    def chunked(params, hidden, live_columns):
        found = chunked_log_probs(head_policy(v), params, hidden, targets, 0.7, 1, entropy_gradient, live_columns)
        return jnp.where(live, jnp.stack(found) * weight, 0).sum()

    want = jax.value_and_grad(plain, argnums=(0, 1))(params, hidden)
    for columns in (None, live):
        got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden, columns)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), got, want)
        frozen = jax.jit(jax.value_and_grad(chunked, argnums=1))(params, hidden, columns)
        frozen_want = want[0], want[1][1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), frozen, frozen_want)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_compact_rows(p, t, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, p + 1, 3)
    prompts = rng.integers(0, 9, (3, p))
    completions = rng.integers(10, 19, (3, t))
    packed = np.asarray(compact_rows(jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(completions)))
    for row, n, prompt, completion in zip(packed, lengths, prompts, completions, strict=True):
        assert row[: n + t].tolist() == [*prompt[:n], *completion]


def test_padding_changes_nothing():
    """A row's log-probs depend on its own tokens alone, wherever the prompt's padding ends."""
    model, params, _ = tiny_policy()
    rng = np.random.default_rng(0)
    prompt, completion = rng.integers(0, 13, (1, 5)), rng.integers(0, 13, (1, 6))
    got = []
    for p in (5, 9):
        padded = np.full((1, p), 14)
        padded[:, :5] = prompt
        log_probs, _ = completion_log_probs(model, params, jnp.asarray(padded), jnp.array([5]), jnp.asarray(completion))
        got.append(np.asarray(log_probs))
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)
