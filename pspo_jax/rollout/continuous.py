"""Rollouts in fewer slots than rows: the slot of a finished row takes the next waiting row (continuous batching).

All prompts are read once, at the start. Then a fixed number of slots decodes. Between chunks of a few tokens, each slot
whose row has ended takes the next pending row, and that row's prompt keys and values are copied into the slot. A slot's
own keys and values are a ring over time: all slots write the same column in a step, and the age of a column decides
whether a slot may see it, so rows at different positions need no scatter. Each device refills its slots from its own
rows.

Letters: n shards of the batch, s slots of a shard, r rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.state import Params, Prompts
from pspo_jax.distributed.mesh import ROWS, constrain, size_along
from pspo_jax.model.interface import Model
from pspo_jax.rollout.token_loop import (
    DrawnTokens,
    RolloutShape,
    Samples,
    SamplingParams,
    TokenLoop,
    draw_row_tokens,
    images_of,
    is_stop,
    no_samples,
)

MAX_TOKENS_PER_REFILL = 16
"""Largest number of tokens between two refills, for which an ended row waits; it is also at most 1/32 of T."""


class SlotDecoder(NamedTuple):
    """What stays the same while slots decode."""

    first_logits: Float[Array, "n b V"]
    """Logits of the first token of each prompt, b = r / G prompts of a shard."""
    row_keys: Key[Array, "n r"]
    """Random key of each row."""
    settings: SamplingParams
    limit: Int[Array, ""]
    """Largest number of tokens of a completion."""
    group_size: int
    load_prompt: Callable[[PyTree, Int[Array, "n s"], Bool[Array, "n s"]], PyTree]
    """(prefilled, prompt, is_new) -> prefilled in which new slots hold their prompt; see `Model.slots`."""
    step: Callable[
        [PyTree, PyTree, Int[Array, "n s"], Int[Array, "n s"], Int[Array, ""]], tuple[Float[Array, "n s V"], PyTree]
    ]
    """(prefilled, cache, last, t, steps) -> (logits, cache); see `Model.slots`."""

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, r."""
        return self.row_keys.shape[1]


class SlotLoop(NamedTuple):
    """State of the loop over slots."""

    decoding: TokenLoop
    """Token loop of the slots; its samples are those of all rows, [n, r]."""
    row: Int[Array, "n s"]
    """Row of each slot; r = the slot has had none."""
    pending: Int[Array, "n"]
    """First row of each shard that no slot has taken."""
    prefilled: PyTree
    """Keys and values of the prompt of each slot's row."""


def decode_slots(
    model: Model,
    params: Params,
    prompts: Prompts,
    row_keys: Key[Array, "R"],
    settings: SamplingParams,
    slots: int,
    shape: RolloutShape,
) -> Samples:
    """Completions [R] of all rows, R = B x group_size, decoded in `slots` slots.

    Raises:
      ValueError: the model has no `slots`, or the mesh does not divide the slots.
    """
    if model.slots is None:
        raise ValueError("rollout.slots: this model has no `slots`; leave it out")
    shards = size_along(jax.sharding.get_abstract_mesh().shape, ROWS)
    if slots % shards:
        raise ValueError(f"rollout.slots={slots}: must be a multiple of the {shards} devices that share the batch")
    longest = shape.max_new_tokens
    r, s = prompts.tokens.shape[0] * shape.group_size // shards, slots // shards
    logits, prefilled, cache, load_prompt, step = model.slots(
        params, prompts.tokens, prompts.lengths, (shards, s), longest, *images_of(model, prompts)
    )
    decoder = SlotDecoder(
        first_logits=logits.reshape(shards, -1, logits.shape[-1]),
        row_keys=row_keys.reshape(shards, r),
        settings=settings,
        limit=jnp.minimum(settings.max_new_tokens, longest),
        group_size=shape.group_size,
        load_prompt=load_prompt,
        step=step,
    )
    zeros = jnp.zeros((shards, s), jnp.int32)
    decoding = TokenLoop(zeros, zeros, zeros > 0, cache, no_samples((shards, r), longest, shape.pad_id))
    start = SlotLoop(decoding, zeros + r, jnp.zeros(shards, jnp.int32), prefilled)
    start = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)) if x.ndim else x, start)
    chunk = max(1, min(MAX_TOKENS_PER_REFILL, longest // 32))

    def unfinished(loop: SlotLoop) -> Bool[Array, ""]:
        return loop.decoding.alive.any() | (loop.pending < r).any()

    def refill_and_decode(loop: SlotLoop) -> SlotLoop:
        return jax.lax.fori_loop(0, chunk, lambda _, loop: decode_token(decoder, loop), refill(decoder, loop))

    samples = jax.lax.while_loop(unfinished, refill_and_decode, start).decoding.samples
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, samples)


def refill(decoder: SlotDecoder, loop: SlotLoop) -> SlotLoop:
    """The loop after every slot without a live row took a pending row, and the row's first token."""
    decoding, r = loop.decoding, decoder.shard_rows
    wanted = loop.pending[:, None] + jnp.cumsum(~decoding.alive, axis=1) - 1
    is_new = ~decoding.alive & (wanted < r)
    row, at_first = jnp.where(is_new, wanted, loop.row), jnp.zeros_like(decoding.t)

    def load(prefilled: PyTree) -> tuple[PyTree, DrawnTokens]:
        prompt = jnp.minimum(row, r - 1) // decoder.group_size
        first = jax.vmap(lambda logits, i: logits[i])(decoder.first_logits, prompt)
        return decoder.load_prompt(prefilled, prompt, is_new), draw(decoder, first, row, at_first)

    def leave(prefilled: PyTree) -> tuple[PyTree, DrawnTokens]:
        return prefilled, DrawnTokens(at_first, jnp.zeros(row.shape), jnp.zeros(row.shape))

    # What crosses the cond is copied; the slots' own caches do not cross it.
    prefilled, drawn = jax.lax.cond(is_new.any(), load, leave, loop.prefilled)
    pending = loop.pending + is_new.sum(axis=1, dtype=jnp.int32)
    return append(decoder, SlotLoop(decoding, row, pending, prefilled), drawn, is_new, at_first)


def decode_token(decoder: SlotDecoder, loop: SlotLoop) -> SlotLoop:
    """The loop after one decoding step: every live slot has another token."""
    decoding = loop.decoding
    samples, t = decoding.samples, decoding.t
    logits, cache = decoder.step(loop.prefilled, decoding.cache, decoding.last, t, samples.steps)
    decoding = decoding._replace(cache=cache, samples=samples._replace(steps=samples.steps + 1))
    drawn = draw(decoder, logits, loop.row, t + 1)
    return append(decoder, loop._replace(decoding=decoding), drawn, decoding.alive, t + 1)


def draw(
    decoder: SlotDecoder, logits: Float[Array, "n s V"], row: Int[Array, "n s"], t: Int[Array, "n s"]
) -> DrawnTokens:
    """Token t of each slot's row."""
    r = decoder.shard_rows
    row_keys = decoder.row_keys[jnp.arange(decoder.row_keys.shape[0])[:, None], jnp.minimum(row, r - 1)]
    return draw_row_tokens(logits, row_keys, t, decoder.settings)


def append(
    decoder: SlotDecoder, loop: SlotLoop, drawn: DrawnTokens, where: Bool[Array, "n s"], t: Int[Array, "n s"]
) -> SlotLoop:
    """The loop after each slot in `where` got token t of its row."""
    decoding = loop.decoding
    samples = decoding.samples
    shard = jnp.arange(loop.row.shape[0])[:, None]
    row = jnp.where(where, loop.row, decoder.shard_rows)  # this row is out of bounds, so that writes to it are dropped
    stop = is_stop(drawn.token, decoder.settings.stop_ids)

    def put(array: Array, value: Array) -> Array:
        return array.at[shard, row, t].set(value, mode="drop")

    samples = samples._replace(
        tokens=put(samples.tokens, drawn.token),
        log_probs=put(samples.log_probs, drawn.log_prob),
        sampling_log_probs=put(samples.sampling_log_probs, drawn.sampling_log_prob),
        lengths=samples.lengths.at[shard, row].set(t + 1, mode="drop"),
        ended=samples.ended.at[shard, row].set(stop, mode="drop"),
    )
    decoding = TokenLoop(
        t=jnp.where(where, t, decoding.t),
        last=jnp.where(where, drawn.token, decoding.last),
        alive=jnp.where(where, ~stop & (t + 1 < decoder.limit), decoding.alive),
        cache=decoding.cache,
        samples=samples,
    )
    return loop._replace(decoding=decoding)
