"""The protocol between a policy and everything that uses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""Logit of a token that must never be drawn: exp() of it is 0 in float32, and it is finite, so 0 * MASKED is 0."""


class Model(NamedTuple):
    """A causal language model as pure functions over its params.

    Rows are compact: a prompt, its completion right behind it, then padding. Causal attention alone is therefore
    right for every real token, and positions are 0, 1, 2, ...; nothing needs a padding mask.

    init(key) -> params
        What trains: all weights or, for a policy with adapters, the adapters.
    hidden(params, tokens [R, S], packed=None) -> [R, S, D]
        What `logits` needs at each position; D is the policy's own affair. With `packed`, several rows stand in one;
        only a policy with `packs` is called so, and with `leader` one that `shares`.
    logits(params, hidden [..., D]) -> float32 [..., V]
        Next-token logits, forbidden ids at MASKED. It is called on chunks: [tokens, V] never exists whole in training.
    decoder(params, prompts [B, P], lengths [B], group_size, max_new_tokens) -> (logits [B, V], cache, step)
        Reads the prompts once; `logits` follow each prompt's last token.
        step(cache, tokens [B, G], t) -> (logits [B, G, V], cache) appends the tokens as completion position t, a traced
        scalar counting from 0. Logits are those of `logits`, with the same ids forbidden, so that the sampler's
        log-probs are the ones that the trainer computes.
    axes: pytree like params of logical axis names per dimension, or None to replicate the weights.
    vocab_size: V.
    frozen_axes: the same for weights that do not train; None = there are none. With frozen weights, the three
        functions above take an `Adapted`.
    resize(cache, places) -> cache, or None
        `decoder`'s cache with room for the first `places` tokens of a completion alone, or for more than it had.
    packs: whether `hidden` takes `packed`.
    slots(params, prompts [B, P], lengths [B], (n, s), max_new_tokens) -> (logits [B, V], taken, cache, fill, step)
        Like `decoder`, for n x s slots that take one row after another; prompts are in n equal parts. None = cannot.
        fill(taken, prompt [n, s], fresh [n, s]) -> taken gives the fresh slots a prompt of their part.
        step(taken, cache, tokens [n, s], t [n, s], steps) -> (logits [n, s, V], cache) appends each slot's token as
        place t of its completion; `steps` is a traced scalar that counts the calls.
    shares: whether packed rows may share a prompt.
    """

    init: Callable[..., Any]
    hidden: Callable[..., Any]
    logits: Callable[..., Any]
    decoder: Callable[..., Any]
    axes: Any
    vocab_size: int
    frozen_axes: Any = None
    resize: Callable[..., Any] | None = None
    packs: bool = False
    slots: Callable[..., Any] | None = None
    shares: bool = False


class Packed(NamedTuple):
    """Several rows in one. Each attends to itself and, where rows share a prompt, to the row that holds it."""

    rows: Int[Array, "R S"]
    """Which of the rows each place belongs to; the padding at the end is a row of its own."""
    places: Int[Array, "R S"]
    """Position in that row, from 0; behind a shared prompt, from its length."""
    leader: Int[Array, "R S"] | None = None
    """The row that holds the prompt of each place's row; None = every row holds its own."""
    prompt: Int[Array, "R S"] | None = None
    """The row whose prompt each place is part of; -1 = of none."""


def mask_logits(logits: Float[Array, "*n V"], forbidden: Sequence[int]) -> Float[Array, "*n V"]:
    """float32 logits with the forbidden ids at MASKED."""
    logits = logits.astype(jnp.float32)
    if not forbidden:
        return logits
    first, last = min(forbidden), max(forbidden)
    if last - first + 1 == len(set(forbidden)):  # one run, as the embedding's padding rows are: no lookup
        place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where((place >= first) & (place <= last), MASKED, logits)
    banned = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(forbidden)].set(True)
    return jnp.where(banned, MASKED, logits)
