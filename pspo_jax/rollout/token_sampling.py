"""One token per row from float32 logits; temperature, top-k and top-p are traced values.

The draw inverts the cumulative distribution with one uniform number per row, in two levels (block, then token in the
block). A categorical draw by Gumbel noise needs one random number per vocabulary entry; on CPU it took 15 times as
long, and longer than the rest of a decoding step of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BITS_OF_ONE = 0x3F800000  # float32 1.0 as an integer
_BLOCK = 128
"""Tokens of a block of the vocabulary in the search for the smallest weight that top-k and top-p keep."""
_SEARCHED_BLOCKS = 128
"""Number of blocks that are searched first."""


def draw_tokens(
    logits: Float[Array, "*n V"],
    uniform: Float[Array, "*n"],
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> tuple[Int[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
    """Tokens, their log-probs under the model at this temperature, and their log-probs under the sampling distribution.

    Args:
      logits: logits with forbidden ids at MASKED.
      uniform: one uniform number in [0, 1) per row.
      temperature: divisor of the logits; 0 = greedy, and the log-probs are then those at temperature 1.
      top_k: number of most probable tokens that are kept, and all that tie with the last of them; 0 = all.
      top_p: share of the remaining probability. The smallest set of most probable tokens that reaches it is kept, and
        all that tie with the last of them; 1 = all.
    """
    temperature, k, p = jnp.asarray(temperature, jnp.float32), jnp.asarray(top_k), jnp.asarray(top_p)
    greedy = temperature == 0
    sharpness = 1 / jnp.where(greedy, 1.0, temperature)
    top = logits.max(axis=-1, keepdims=True)
    weight = jnp.exp((logits - top) * sharpness)
    log_total = jnp.log(weight.sum(axis=-1))

    truncated = ((k > 0) | (p < 1)) & ~greedy
    # The threshold crosses the cond and not the weights, because results of a cond are copied.
    threshold = jax.lax.cond(truncated, lambda w: _threshold(w, k, p), lambda w: jnp.zeros(w.shape[:-1]), weight)
    kept = jnp.where(weight >= threshold[..., None], weight, 0.0)
    token, kept_total = jax.lax.cond(
        greedy,
        lambda w, u: (_most_probable(w), jnp.ones_like(u)),
        _invert,
        kept,
        uniform,
    )
    chosen = (jnp.take_along_axis(logits, token[..., None], axis=-1) - top)[..., 0] * sharpness
    # A difference may be fused with the product before it, which rounds once instead of twice; whether the compiler
    # does so depends on the number of rows, and the results must not.
    chosen, log_total, log_kept = jax.lax.optimization_barrier((chosen, log_total, jnp.log(kept_total)))
    log_prob = chosen - log_total
    # Without truncation both log-probs are the same to the last bit, and not two sums in different orders.
    sampling = jnp.where(truncated, chosen - log_kept, log_prob)
    return token, log_prob, sampling


def _invert(weight: Float[Array, "*n V"], uniform: Float[Array, "*n"]) -> tuple[Int[Array, "*n"], Float[Array, "*n"]]:
    """The token whose cumulative interval holds uniform x total, never one of weight 0; and the total."""
    v = weight.shape[-1]
    size = max(1, 2 ** round(math.log2(max(v, 2)) / 2))
    blocks = -(-v // size)
    padded = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, blocks * size - v)])
    padded = padded.reshape(*weight.shape[:-1], blocks, size)
    upto = jnp.cumsum(padded.sum(axis=-1), axis=-1)
    total = upto[..., -1]
    goal = (uniform * total)[..., None]
    block = _first(upto > goal)
    below = jnp.where(block[..., None] > 0, jnp.take_along_axis(upto, jnp.maximum(block[..., None] - 1, 0), -1), 0)
    inside = jnp.take_along_axis(padded, block[..., None, None], axis=-2)[..., 0, :]
    live = inside > 0
    reached = live & (below + jnp.cumsum(inside, axis=-1) > goal)
    # Rounding can leave the running sum of the block just short of the goal; then the block's last live token is taken.
    last_live = size - 1 - _first(live[..., ::-1])
    within = jnp.where(reached.any(axis=-1), _first(reached), last_live)
    return (block * size + within).astype(jnp.int32), total


def _most_probable(weight: Float[Array, "*n V"]) -> Int[Array, "*n"]:
    """The first token of the largest weight, by three vectorised passes; on CPU, argmax took as long as forty of them.

    The largest weight is 1, or next to 1: where a model ends with a product, such as a factor of its logits, the
    product may be fused with the difference of a logit and the largest one, which then is not exactly 0.
    """
    place = jax.lax.broadcasted_iota(jnp.int32, weight.shape, weight.ndim - 1)
    largest = weight.max(axis=-1, keepdims=True)
    return jnp.where(weight >= largest, place, weight.shape[-1] - 1).min(axis=-1)


def _first(hit: Bool[Array, "*n k"]) -> Int[Array, "*n"]:
    """Index of the first True; 0 if there is no True."""
    return jnp.argmax(hit, axis=-1)


def _threshold(weight: Float[Array, "*n V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "*n"]:
    """The smallest weight that top-k and then top-p keep. Weights are in [0, 1], and the largest is 1.

    In a large vocabulary the search looks at the blocks with the largest weights alone. Its result is exact if it is
    larger than every weight elsewhere; rows for which it is not, those with a flat distribution, are searched again as
    a whole. A row's result does not depend on the other rows.
    """
    v, total = weight.shape[-1], weight.sum(axis=-1)
    blocks = -(-v // _BLOCK)
    if blocks <= _SEARCHED_BLOCKS:
        return _search(weight, total, top_k, top_p)[0]
    padded = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, blocks * _BLOCK - v)])
    padded = padded.reshape(*weight.shape[:-1], blocks, _BLOCK)
    largest, places = jax.lax.top_k(padded.max(axis=-1), _SEARCHED_BLOCKS + 1)
    searched = jnp.take_along_axis(padded, places[..., :-1, None], axis=-2).reshape(*weight.shape[:-1], -1)
    found, least = _search(searched, total, top_k, top_p)
    exact = least > largest[..., -1]
    whole = jax.lax.cond(exact.all(), lambda _: found, lambda w: _search(w, total, top_k, top_p)[0], weight)
    return jnp.where(exact, found, whole)


def _search(
    weight: Float[Array, "*n v"], total: Float[Array, "*n"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """The smallest weight that is kept, and the smallest that the search relies on having seen all larger ones of.

    Args:
      weight: weights of a row; those that are left out are smaller.
      total: sum of all weights of a row, with those that are left out.
    """
    zeros = jnp.zeros_like(total)

    def of_count(w: Float[Array, "*n v"]) -> Float[Array, "*n"]:
        return _largest_threshold(w, lambda w: (w > 0).sum(axis=-1), jnp.minimum(top_k, weight.shape[-1]))

    def of_mass(w: Float[Array, "*n v"], mass: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return _largest_threshold(w, lambda w: w.sum(axis=-1), top_p * mass)

    by_count = jax.lax.cond(top_k > 0, of_count, lambda _: zeros, weight)
    kept = jnp.where(weight >= by_count[..., None], weight, 0.0)
    mass = jnp.where(top_k > 0, kept.sum(axis=-1), total)
    by_mass = jax.lax.cond(top_p < 1, of_mass, lambda *_: zeros, kept, mass)
    found = jnp.maximum(by_count, by_mass)
    return found, jnp.where(top_k > 0, by_count, found)


def _largest_threshold(
    weight: Float[Array, "*n V"], measure: Callable[[Array], Array], enough: Array
) -> Float[Array, "*n"]:
    """The largest threshold at which `measure` of the weights not below it is at least `enough`.

    Positive floats have the order of their bit patterns, so bisection over 30 bits finds the threshold exactly, in 31
    passes and without a sort of the vocabulary.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        ok = measure(jnp.where(weight >= threshold[..., None], weight, 0.0)) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low = jnp.zeros(weight.shape[:-1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, _BITS_OF_ONE)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
