"""Chunked log-probs: equal to the whole, in values and gradients, without [tokens, vocab]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.objective.log_probs import chunked_log_probs, completion_log_probs, pack_rows
from pspo_jax.policy.base import Policy
from tests.helpers import tiny_policy


def head_policy(vocab):
    """A policy that is only a head."""
    return Policy(None, None, lambda p, h: h @ p["head"], None, None, vocab)


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


def test_logits_never_materialise():
    """Gradient of the head at B=8, T=1024, D=1024, V=151,936 in float32: whole logits need 10 to 12 GiB."""
    r, t, d, v = 8, 1024, 1024, 151_936
    spec = jax.ShapeDtypeStruct

    def loss(params, hidden, targets):
        return chunked_log_probs(head_policy(v), params, hidden, targets)[0].sum()

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .lower({"head": spec((d, v), jnp.float32)}, spec((r, t, d), jnp.float32), spec((r, t), jnp.int32))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * 2**30


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_pack_rows(p, t, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, p + 1, 3)
    prompts = rng.integers(0, 9, (3, p))
    completions = rng.integers(10, 19, (3, t))
    packed = np.asarray(pack_rows(jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(completions)))
    for row, n, prompt, completion in zip(packed, lengths, prompts, completions, strict=True):
        assert row[: n + t].tolist() == [*prompt[:n], *completion]


def test_padding_changes_nothing():
    """A row's log-probs depend on its own tokens alone, wherever the prompt's padding ends."""
    policy, params, _ = tiny_policy()
    rng = np.random.default_rng(0)
    prompt, completion = rng.integers(0, 13, (1, 5)), rng.integers(0, 13, (1, 6))
    got = []
    for p in (5, 9):
        padded = np.full((1, p), 14)
        padded[:, :5] = prompt
        log_probs, _ = completion_log_probs(
            policy, params, jnp.asarray(padded), jnp.array([5]), jnp.asarray(completion)
        )
        got.append(np.asarray(log_probs))
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)
