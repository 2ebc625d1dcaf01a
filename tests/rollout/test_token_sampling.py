"""Sampled token frequencies match exact probabilities, with each truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pspo_jax.model.interface import MASKED
from pspo_jax.rollout import token_sampling
from pspo_jax.rollout.token_sampling import draw_tokens

LOGITS = np.array([2.0, 1.5, 1.0, 0.3, -0.5, -1.0, MASKED, 0.9, 0.2, -3.0], np.float32)


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities by sorting, in float64."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.zeros(len(p), bool)
    keep[order[: top_k or len(p)]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        order = np.argsort(-p)
        count = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        keep = np.zeros(len(p), bool)
        keep[order[:count]] = True
        p = np.where(keep, p, 0) / p[keep].sum()
    return p


def draw(logits, n, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    u = jax.random.uniform(jax.random.key(seed), (n,))
    rows = jnp.broadcast_to(jnp.asarray(logits), (n, len(logits)))
    return jax.jit(draw_tokens)(rows, u, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_k": 6, "top_p": 0.7},
    ],
)
def test_frequencies(settings):
    n = 40_000
    tokens, log_probs, sampling = map(np.asarray, draw(LOGITS, n, **settings))
    p = exact(LOGITS, **settings)
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3
    np.testing.assert_allclose(sampling, np.log(p[tokens]), atol=1e-5)
    plain = exact(LOGITS, temperature=settings.get("temperature", 1.0))
    np.testing.assert_allclose(log_probs, np.log(plain[tokens]), atol=1e-5)


def test_greedy():
    tokens, log_probs, sampling = draw(LOGITS, 5, temperature=0.0)
    assert np.asarray(tokens).tolist() == [0] * 5
    np.testing.assert_allclose(log_probs, np.log(exact(LOGITS)[0]), atol=1e-5)
    np.testing.assert_array_equal(log_probs, sampling)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=70),
    st.floats(0, 1, exclude_max=True, width=32),
    st.integers(0, 80),
    st.floats(0.0009765625, 1, width=32),
)
def test_a_draw_is_always_allowed(logits, u, top_k, top_p):
    """Whatever the uniform number, the token is one that the truncation keeps; one of weight 0 is never drawn."""
    logits = np.array(logits + [MASKED] * (72 - len(logits)), np.float32)
    token, _, sampling = draw_tokens(
        jnp.asarray(logits)[None], jnp.array([u]), jnp.float32(1), jnp.int32(top_k), jnp.float32(top_p)
    )
    token = int(token[0])
    assert logits[token] > MASKED / 2
    assert float(sampling[0]) <= 1e-5
    if top_k:
        assert (logits > logits[token]).sum() < top_k


@pytest.mark.parametrize("last", [lambda x: x * 1.7, lambda x: x / 0.3, lambda x: 30 * jnp.tanh(x / 30)])
def test_greedy_takes_the_largest_logit_whatever_the_model_ends_with(last):
    """A product before the draw is compiled with it, and must not move the largest logit off its own maximum."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 97)) * 3, jnp.float32)
    greedily = jax.jit(lambda x: draw_tokens(last(x), jnp.zeros(64), 0.0, 0, 1.0)[:2])
    token, log_prob = greedily(logits)
    np.testing.assert_array_equal(token, last(logits).argmax(axis=-1))
    want = jax.nn.log_softmax(last(logits))[jnp.arange(64), token]
    np.testing.assert_allclose(log_prob, want, atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_ends_of_the_uniform(u):
    logits = np.full((1, 300), MASKED, np.float32)
    logits[0, 7] = logits[0, 250] = 0.0
    token, *_ = draw_tokens(jnp.asarray(logits), jnp.array([u]), jnp.float32(1), jnp.int32(0), jnp.float32(1))
    assert int(token[0]) == (7 if u == 0 else 250)


def kept_by_sorting(weight, top_k, top_p):
    """The smallest weight that is kept, by sorting in float64."""
    order = np.sort(weight.astype(np.float64))[::-1]
    order = order[: top_k or len(order)]
    count = np.searchsorted(np.cumsum(order), top_p * order.sum()) + 1 if top_p < 1 else len(order)
    return order[count - 1]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.93), (50, 1.0), (400, 0.9)])
def test_a_large_vocabulary_is_searched_exactly(top_k, top_p):
    """Rows of every flatness side by side: those of which blocks are enough, and those that are searched as a whole."""
    v = 30_011
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, v)) * np.array([0.1, 0.5, 1, 2, 3, 5, 8, 20])[:, None]
    weight = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    search = jax.jit(token_sampling._threshold)
    found = np.asarray(search(weight, jnp.int32(top_k), jnp.float32(top_p)))
    want = [kept_by_sorting(row, top_k, top_p) for row in weight]
    np.testing.assert_allclose(found, want, rtol=2e-4 if top_p < 1 else 0)
    alone = [np.asarray(search(row[None], jnp.int32(top_k), jnp.float32(top_p)))[0] for row in weight]
    np.testing.assert_array_equal(found, alone)
