"""Rollouts in fewer slots than rows: the slot of a finished row takes the next waiting row (continuous batching).

All prompts are read once, at the start, and the first token of every row is drawn. Then a fixed number of slots
decodes. Between chunks of a few tokens, each slot whose row has ended takes the next row, and that row's prompt keys
and values are copied into the slot. Each device refills its slots from its own rows.

A rollout has one or more stages (rollout/stages.py). A row that has filled the columns of a stage's slots waits, with
its keys and values, for a slot of the next stage, whose slots are longer and fewer. A slot takes a row only if the row
could wait afterwards, so that no row is ever decoded twice. A stage ends when its slots are empty: either all rows have
gone through it, or as many wait as there is room for. After the last stage the rest follows from the first stage on.

Letters: n shards of the batch, s slots of a shard, r rows of a shard, W rows of a shard that can wait, J stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.state import Params, Prompts
from pspo_jax.distributed.mesh import ROWS, constrain, size_along, split_axes
from pspo_jax.model.interface import Model, SlotDecoder
from pspo_jax.rollout.stages import Stage
from pspo_jax.rollout.token_loop import (
    DrawnTokens,
    RolloutShape,
    Samples,
    SamplingParams,
    draw_row_tokens,
    images_of,
    is_stop,
    no_samples,
)

MAX_TOKENS_PER_REFILL = 16
"""Largest number of tokens between two refills, for which an ended row waits; it is also at most 1/32 of T."""


class RowsInSlots(NamedTuple):
    """What stays the same while slots decode."""

    model: SlotDecoder
    row_keys: Key[Array, "n r"]
    """Random key of each row."""
    settings: SamplingParams
    limit: Int[Array, ""]
    """Largest number of tokens of a completion."""
    group_size: int
    chunk: int
    """Tokens that are drawn between two refills."""

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, r."""
        return self.row_keys.shape[1]


class Queue(NamedTuple):
    """Rows that wait for a stage, the first that came before the others, in a circular buffer for each shard."""

    row: Int[Array, "n W"]
    head: Int[Array, "n"]
    """Place of the first row."""
    held: Int[Array, "n"]
    """Number of rows that wait."""
    completions: PyTree
    """Keys and values of their completions, as the model keeps them; None = the rows have a first token alone, which
    is in no cache."""


class SlotLoop(NamedTuple):
    """State of the loop over the slots of a stage."""

    t: Int[Array, "n s"]
    """Position of `last` in its completion, from 0."""
    last: Int[Array, "n s"]
    """Id of the token that was drawn last and is not in the cache yet."""
    alive: Bool[Array, "n s"]
    """Whether the slot holds a row that has not ended."""
    row: Int[Array, "n s"]
    """Row of each slot; r = the slot has had none."""
    cache: PyTree
    """Keys and values of the rows, as the model keeps them."""
    queue: Queue
    """Rows that wait for this stage."""
    following: Queue | None
    """Rows that wait for the next stage; None = this is the last stage."""
    samples: Samples
    """Completions of all rows so far, [n, r]."""
    steps: Int[Array, ""]
    """Decoding steps of the stage."""


def decode_slots(
    model: Model,
    params: Params,
    prompts: Prompts,
    row_keys: Key[Array, "R"],
    settings: SamplingParams,
    stages: Sequence[Stage],
    shape: RolloutShape,
) -> Samples:
    """Completions [B, G] of all rows, R = B x G, decoded in the slots of the stages of each shard.

    Raises:
      ValueError: the model has no `slots`.
    """
    if model.slots is None:
        raise ValueError("rollout.slots: this model has no `slots`; leave it out")
    shards = size_along(split_axes(), ROWS)
    longest = shape.max_new_tokens
    decoder = RowsInSlots(
        model=model.slots(params, prompts.tokens, prompts.lengths, shards, *images_of(model, prompts)),
        row_keys=row_keys.reshape(shards, -1),
        settings=settings,
        limit=jnp.minimum(settings.max_new_tokens, longest),
        group_size=shape.group_size,
        chunk=max(1, min(MAX_TOKENS_PER_REFILL, longest // 32)),
    )
    samples, queue = first_tokens(decoder, shape)
    steps = jnp.zeros(len(stages), jnp.int32)
    queues = [queue, *(empty_queue(decoder, stages, j) for j in range(1, len(stages)))]
    state = samples._replace(steps=steps), queues

    def all_stages(state: tuple[Samples, list[Queue]]) -> tuple[Samples, list[Queue]]:
        samples, queues = state
        for j, stage in enumerate(stages):
            loop = run_stage(decoder, stage, queues[j], queues[j + 1] if j + 1 < len(stages) else None, samples)
            samples = loop.samples._replace(steps=samples.steps.at[j].add(loop.steps))
            queues = [*queues[:j], loop.queue, *([loop.following] if loop.following else []), *queues[j + 2 :]]
        return samples, queues

    def rows_wait(state: tuple[Samples, list[Queue]]) -> Bool[Array, ""]:
        return jnp.stack([queue.held for queue in state[1]]).any()

    # A single stage has no rows left; the loop around it would be a second copy of its program.
    samples, _ = jax.lax.while_loop(rows_wait, all_stages, state) if len(stages) > 1 else all_stages(state)
    groups = (prompts.tokens.shape[0], shape.group_size)
    return jax.tree.map(lambda x: x.reshape(*groups, *x.shape[2:]) if x.ndim > 1 else x, samples)


def first_tokens(decoder: RowsInSlots, shape: RolloutShape) -> tuple[Samples, Queue]:
    """Samples with the first token of every row, and the queue of those that go on, in the order of their numbers."""
    shards, r = decoder.row_keys.shape
    keys = decoder.row_keys.reshape(shards, -1, decoder.group_size)
    logits = decoder.model.logits.reshape(*keys.shape[:2], -1)

    def of_one_row_a_group(keys: Key[Array, "n b"]) -> DrawnTokens:
        return draw_row_tokens(logits, keys, jnp.int32(0), decoder.settings)

    # One completion of every prompt at a time, so that the logits are not repeated for the completions of a prompt.
    drawn = jax.lax.map(of_one_row_a_group, jnp.moveaxis(keys, 2, 0))
    token, log_prob, sampling_log_prob = (jnp.moveaxis(x, 0, 2).reshape(shards, r) for x in drawn)
    stop = is_stop(token, decoder.settings.stop_ids)
    empty = no_samples((shards, r), shape.max_new_tokens, shape.pad_id)
    samples = empty._replace(
        tokens=empty.tokens.at[..., 0].set(token),
        log_probs=empty.log_probs.at[..., 0].set(log_prob),
        sampling_log_probs=empty.sampling_log_probs.at[..., 0].set(sampling_log_prob),
        lengths=empty.lengths + 1,
        ended=stop,
    )
    goes_on = ~stop & (decoder.limit > 1)
    order, count = ordered((~goes_on).astype(jnp.int32), kinds=2), goes_on.sum(axis=1, dtype=jnp.int32)
    samples, order, count = jax.tree.map(_by_shard, (samples, order, count))
    return samples, Queue(order, jnp.zeros_like(count), count, None)


def empty_queue(decoder: RowsInSlots, stages: Sequence[Stage], j: int) -> Queue:
    """The queue of stage j before any row has come."""
    shards, waiting = decoder.row_keys.shape[0], stages[j].waiting
    row, zeros = jnp.zeros((shards, waiting), jnp.int32), jnp.zeros(shards, jnp.int32)
    row, zeros = _by_shard(row), _by_shard(zeros)
    return Queue(row, zeros, zeros, decoder.model.waiting(waiting, stages[j - 1].columns))


def run_stage(decoder: RowsInSlots, stage: Stage, queue: Queue, following: Queue | None, samples: Samples) -> SlotLoop:
    """The loop after a stage has taken all rows from the queue for which the following queue has room."""
    zeros = _by_shard(jnp.zeros((decoder.row_keys.shape[0], stage.slots), jnp.int32))
    cache = decoder.model.slots(stage.slots, stage.columns)
    no_row = zeros + decoder.shard_rows
    start = SlotLoop(zeros, zeros, zeros > 0, no_row, cache, queue, following, samples, jnp.int32(0))

    def unfinished(loop: SlotLoop) -> Bool[Array, ""]:
        return (loop.alive.any(axis=1) | ((loop.queue.held > 0) & (room(loop) > 0))).any()

    def refill_and_decode(loop: SlotLoop) -> SlotLoop:
        loop = refill(decoder, stage, loop)
        return jax.lax.fori_loop(0, decoder.chunk, lambda _, loop: decode_token(decoder, stage, loop), loop)

    return jax.lax.while_loop(unfinished, refill_and_decode, start)


def room(loop: SlotLoop) -> Int[Array, "n"]:
    """Number of rows that may be taken, since they could wait for the next stage beside those that are in slots."""
    if loop.following is None:
        return jnp.full_like(loop.queue.held, loop.row.shape[1])
    return loop.following.row.shape[1] - loop.following.held - loop.alive.sum(axis=1, dtype=jnp.int32)


def refill(decoder: RowsInSlots, stage: Stage, loop: SlotLoop) -> SlotLoop:
    """The loop after rows that fill their slots went to the next stage's queue, and free slots took rows of their own.

    As many rows are taken as there are free slots, rows that wait, and room for them to wait afterwards.
    """
    queue, following, s = loop.queue, loop.following, loop.row.shape[1]
    full = loop.alive & (loop.t == stage.columns)
    # Slots with full rows come first, so that the row of each is saved in the turn in which the slot takes another.
    slots = ordered(jnp.where(full, 0, jnp.where(loop.alive, 2, 1)), kinds=3)
    saved, free = (x.sum(axis=1, dtype=jnp.int32) for x in (full, full | ~loop.alive))
    taken = jnp.minimum(jnp.minimum(free, queue.held), room(loop))
    turn, shard = jnp.arange(s), _shards(slots)
    into = jnp.where(turn < taken[:, None], slots, s)  # s is out of bounds, and writes to it are dropped
    places = (queue.head[:, None] + turn) % queue.row.shape[1]
    rows = jnp.take_along_axis(queue.row, places, axis=1)
    saved_at = jnp.zeros_like(slots)
    if following is not None:
        size = following.row.shape[1]
        saved_at = ((following.head + following.held)[:, None] + turn) % size
        saved_at = jnp.where(turn < saved[:, None], saved_at, size)

    def move(i: Int[Array, ""], held: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
        cache, own, next_stage = held
        if following is not None:
            next_stage = decoder.model.save(next_stage, _column(saved_at, i), cache, _column(slots, i))
        prompt = _column(rows, i) // decoder.group_size
        return decoder.model.load(cache, _column(into, i), prompt, own, _column(places, i)), own, next_stage

    # One loop saves and loads: XLA would copy the cache between a loop that reads it and one that writes it.
    held = loop.cache, queue.completions, None if following is None else following.completions
    cache, own, next_stage = jax.lax.fori_loop(0, jnp.maximum(saved, taken).max(), move, held)
    if following is not None:
        row = jnp.take_along_axis(loop.row, slots, axis=1)
        row = following.row.at[shard, saved_at].set(row, mode="drop")
        following = Queue(row, following.head, following.held + saved, next_stage)
    t = loop.samples.lengths[shard, rows] - 1
    return loop._replace(
        t=loop.t.at[shard, into].set(t, mode="drop"),
        last=loop.last.at[shard, into].set(loop.samples.tokens[shard, rows, t], mode="drop"),
        alive=(loop.alive & ~full).at[shard, into].set(True, mode="drop"),
        row=loop.row.at[shard, into].set(rows, mode="drop"),
        cache=cache,
        queue=queue._replace(head=queue.head + taken, held=queue.held - taken, completions=own),
        following=following,
    )


def decode_token(decoder: RowsInSlots, stage: Stage, loop: SlotLoop) -> SlotLoop:
    """The loop after one decoding step: every slot with a live row and room for its token has another token."""
    samples, settings, r = loop.samples, decoder.settings, decoder.shard_rows
    where = loop.alive & (loop.t < stage.columns)
    logits, cache = decoder.model.step(loop.cache, loop.last, loop.t)
    t, shard = loop.t + 1, _shards(loop.row)
    drawn = draw_row_tokens(logits, decoder.row_keys[shard, jnp.minimum(loop.row, r - 1)], t, settings)
    row = jnp.where(where, loop.row, r)  # r is out of bounds, and writes to it are dropped
    stop = is_stop(drawn.token, settings.stop_ids)

    def put(array: Float[Array, "n r T"], value: Float[Array, "n s"]) -> Float[Array, "n r T"]:
        return array.at[shard, row, t].set(value, mode="drop")

    samples = samples._replace(
        tokens=put(samples.tokens, drawn.token),
        log_probs=put(samples.log_probs, drawn.log_prob),
        sampling_log_probs=put(samples.sampling_log_probs, drawn.sampling_log_prob),
        lengths=samples.lengths.at[shard, row].set(t + 1, mode="drop"),
        ended=samples.ended.at[shard, row].set(stop, mode="drop"),
    )
    return loop._replace(
        t=jnp.where(where, t, loop.t),
        last=jnp.where(where, drawn.token, loop.last),
        alive=jnp.where(where, ~stop & (t + 1 < decoder.limit), loop.alive),
        cache=cache,
        samples=samples,
        steps=loop.steps + 1,
    )


def ordered(kind: Int[Array, "n k"], kinds: int) -> Int[Array, "n k"]:
    """Indices in each shard, those of kind 0 before those of kind 1 and so on, and each kind in order.

    A sort would take much longer to compile.
    """
    place, before = jnp.zeros_like(kind), jnp.zeros((kind.shape[0], 1), jnp.int32)
    for j in range(kinds):
        here = kind == j
        place = jnp.where(here, before + jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, place)
        before = before + here.sum(axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.zeros_like(place).at[_shards(place), place].set(jnp.arange(kind.shape[1], dtype=jnp.int32))


def _shards(x: Int[Array, "n k"]) -> Int[Array, "n 1"]:
    """Index of each shard, to index arrays [n, ...] with."""
    return jnp.arange(x.shape[0])[:, None]


def _column(x: Int[Array, "n k"], i: Int[Array, ""]) -> Int[Array, "n"]:
    return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _by_shard(x: Array) -> Array:
    return constrain(x, "batch", *[None] * (x.ndim - 1)) if x.ndim else x
