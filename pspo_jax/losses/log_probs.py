"""Log-probs and entropies of completions without [tokens, vocab] ever existing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.state import Params
from pspo_jax.distributed.mesh import constrain
from pspo_jax.model.interface import Model


def pack_rows(
    prompts: Int[Array, "R P"], lengths: Int[Array, "R"], completions: Int[Array, "R T"]
) -> Int[Array, "R P+T"]:
    """Compact rows: each completion right behind its prompt, the prompt's padding moved to the end."""
    p = prompts.shape[1]
    t = completions.shape[1]
    place = jnp.arange(p + t)
    in_prompt = place < lengths[:, None]
    joined = jnp.concatenate([prompts, completions], axis=1)
    source = jnp.where(in_prompt, place, place - lengths[:, None] + p)
    return jnp.take_along_axis(joined, jnp.minimum(source, p + t - 1), axis=1)


def completion_log_probs(
    model: Model,
    params: Params,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    completions: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-prob of each completion token given all before it, and the entropy of each of those distributions.

    The head runs on chunks of a few columns of all rows, each recomputed in the backward pass, so the peak is one chunk
    of logits. Chunks are cut along T: rows stay spread over devices.

    Args:
      temperature: divides the logits, as it did in the sampler.
      logits_mib: size of one chunk of float32 logits.
      entropy_gradient: let entropies carry a gradient.
    """
    t = completions.shape[1]
    rows = pack_rows(prompts, lengths, completions)
    hidden = model.hidden(params, rows)
    at = (lengths - 1)[:, None] + jnp.arange(t)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return chunked_log_probs(model, params, hidden, completions, temperature, logits_mib, entropy_gradient)


def chunked_log_probs(
    model: Model,
    params: Params,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
    live: Bool[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """The head of `completion_log_probs`: hidden states in, log-probs and entropies of the targets out.

    Args:
      live: columns in which no row is live are left out, and their results 0; None = all are computed.
    """
    r, t = targets.shape
    columns = max(1, min(t, logits_mib * 2**20 // (4 * model.vocab_size * r)))
    # With columns to leave out, chunks are small enough to leave some.
    columns = columns if live is None else min(columns, -(-t // 8))
    chunks = _count(t, columns)
    columns = -(-t // chunks)
    pad = chunks * columns - t

    def cut(x: Array) -> Array:
        """[R, T, ...] -> [R, chunks, columns, ...]; where chunks divide T, nothing is copied."""
        if pad:
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(r, chunks, columns, *x.shape[2:])

    wanted = jnp.ones(chunks, bool) if live is None else cut(live).any(axis=(0, 2))
    hidden = constrain(cut(hidden), "rows", None, "length", None)
    head, weights = jax.closure_convert(lambda h: model.logits(params, h), hidden[:, 0])
    static = _Static(head, entropy_gradient, live is not None)
    log_probs, entropy = _chunks(static, hidden, cut(targets), jnp.asarray(temperature), wanted, tuple(weights))
    return log_probs.reshape(r, -1)[:, :t], entropy.reshape(r, -1)[:, :t]


def _count(t: int, columns: int) -> int:
    """Chunks of at most so many columns; a few more, if these divide t."""
    least = -(-t // columns)
    return next((n for n in range(least, min(2 * least, t) + 1) if t % n == 0), least)


@dataclass(frozen=True)
class _Static:
    head: Callable[..., Array]
    """(hidden, *weights) -> logits"""
    entropy_gradient: bool
    skips: bool
    """Whether a chunk may be left out."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(
    static: _Static,
    hidden: Float[Array, "R N C D"],
    targets: Int[Array, "R N C"],
    temperature: Float[Array, ""],
    wanted: Bool[Array, "N"],
    weights: tuple[Array, ...],
) -> tuple[Float[Array, "R N C"], Float[Array, "R N C"]]:
    """Log-probs and entropies, one chunk of logits at a time.

    The backward pass computes a chunk's logits again, normalised by the log-sum-exp that the forward pass kept, and
    writes the hidden states' gradient chunk by chunk: no second copy of them exists.
    """
    return _forward(static, hidden, targets, temperature, wanted, weights)[0]


def _logits(static: _Static, h: Array, temperature: Array, weights: tuple[Array, ...]) -> Float[Array, "R C V"]:
    return constrain(static.head(h, *weights) / temperature, "rows", "length", "vocab")


def _forward(static: _Static, hidden: Array, targets: Array, temperature: Array, wanted: Array, weights: Any) -> Any:
    def one(h: Array, ids: Array) -> tuple[Array, Array, Array]:
        logits = _logits(static, h, temperature, weights)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        entropy = log_total - (jnp.exp(logits - log_total[..., None]) * logits).sum(axis=-1)
        return chosen - log_total, entropy, log_total

    def nothing(h: Array, ids: Array) -> tuple[Array, Array, Array]:
        return (jnp.zeros(ids.shape),) * 3

    def body(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        i, ids, run = xs
        h = jax.lax.dynamic_index_in_dim(hidden, i, axis=1, keepdims=False)
        return None, jax.lax.cond(run, one, nothing, h, ids) if static.skips else one(h, ids)

    xs = jnp.arange(hidden.shape[1]), targets.swapaxes(0, 1), wanted
    _, found = jax.lax.scan(body, None, xs)
    log_probs, entropy, log_total = (x.swapaxes(0, 1) for x in found)
    return (log_probs, entropy), (hidden, targets, temperature, wanted, weights, log_total, entropy)


def _backward(static: _Static, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    hidden, targets, temperature, wanted, weights, log_total, entropy = saved
    of_log_prob, of_entropy = cotangents

    def one(h: Array, ids: Array, total: Array, spread: Array, g: Array, e: Array) -> tuple[Array, Any]:
        logits, back = jax.vjp(lambda h, w: _logits(static, h, temperature, w), h, weights)
        log_p = logits - total[..., None]
        p = jnp.exp(log_p)
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == ids[..., None]
        d = g[..., None] * (token - p)
        if static.entropy_gradient:
            d -= e[..., None] * p * (log_p + spread[..., None])
        return back(d)

    def nothing(h: Array, *_: Array) -> tuple[Array, Any]:
        return jnp.zeros_like(h), jax.tree.map(jnp.zeros_like, weights)

    def body(carry: tuple[Array, Any], xs: tuple[Array, ...]) -> tuple[tuple[Array, Any], None]:
        d_hidden, d_weights = carry
        i, run, *rest = xs
        operands = (jax.lax.dynamic_index_in_dim(hidden, i, axis=1, keepdims=False), *rest)
        dh, dw = jax.lax.cond(run, one, nothing, *operands) if static.skips else one(*operands)
        d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, dh, i, axis=1)
        return (d_hidden, jax.tree.map(jnp.add, d_weights, dw)), None

    start = jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, weights)
    parts = (targets, log_total, entropy, of_log_prob, of_entropy)
    xs = (jnp.arange(hidden.shape[1]), wanted, *(x.swapaxes(0, 1) for x in parts))
    (d_hidden, d_weights), _ = jax.lax.scan(body, start, xs)
    return d_hidden, None, jnp.zeros_like(temperature), None, d_weights


_chunks.defvjp(_forward, _backward)
