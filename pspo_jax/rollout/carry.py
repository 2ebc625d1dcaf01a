"""Carry-over: rollouts of a budget of tokens, whose unfinished groups go on in the next round or step.

A round rolls out B groups: those that are unfinished, in the order in which they began, and as many new ones as there
is room for. Each row draws at most `budget` tokens; this depends on nothing but the row's own tokens. A group is whole
once all of its rows have ended. Rounds repeat until B groups are whole, and the first B of these, in the order in which
they began, are the batch of the step. Nothing is dropped.

All rows of a group that go on have the same number of tokens, a multiple of the budget: in its j-th round a group draws
its j-th segment of `budget` tokens. So the step at which each segment was drawn says which policy drew each token. Keys
and values are not kept: the tokens of unfinished rows are read again, by the weights of the new step.

Letters: B groups of a round and of a batch, C groups that there is room for, G completions a group, T completion
length, J segments of a completion, D prompts that there is room for.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.state import ROLLOUT, Params, Prompts, Rollouts, purpose_key
from pspo_jax.distributed.mesh import constrain
from pspo_jax.model.interface import Begun, Model
from pspo_jax.rollout.token_loop import (
    RolloutShape,
    Samples,
    SamplingParams,
    draw_row_tokens,
    is_stop,
    sampling_temperature,
)


@struct.dataclass
class BegunGroups:
    """Groups whose completions have begun. A group without any token is a place that is free."""

    prompts: Prompts
    """The prompt of each group."""
    tokens: Int[Array, "C G T"]
    """Tokens so far, then padding."""
    log_probs: Float[Array, "C G T"]
    """Log-prob of each token under the policy that drew it."""
    sampling_log_probs: Float[Array, "C G T"] | None
    """Log-prob of each token under the distribution it was drawn from; None = that is the policy's own, because neither
    top-k nor top-p cuts it."""
    lengths: Int[Array, "C G"]
    """Tokens of each completion so far."""
    ended: Bool[Array, "C G"]
    """Whether a stop token has ended the completion."""
    versions: Int[Array, "C J"]
    """Step whose policy drew each segment; -1 = the group has not drawn it."""
    first_row: Int[Array, "C"]
    """Number of the group's first completion in the step that began it, which its random numbers follow."""


@struct.dataclass
class PendingGroups:
    """What a run with carry-over holds between two steps: groups, and prompts that were drawn for a later round."""

    groups: BegunGroups
    """Groups that have not been in a batch, in the order in which they began, then free places."""
    held: Int[Array, ""]
    """Number of groups."""
    unfinished: Int[Array, ""]
    """Number of them that are not whole."""
    drawn_ids: Int[Array, "D"]
    """Rows of the prompts in the dataset that the selector has drawn and that have not begun, the first one first."""
    drawn_weights: Float[Array, "D"]
    """Loss weight of each of these prompts."""
    drawn: Int[Array, ""]
    """Number of these prompts."""


class Window(NamedTuple):
    """The groups of a round."""

    groups: BegunGroups
    """B groups: those that go on, then new ones."""
    places: Int[Array, "B"]
    """Place of each among the pending groups."""


def segments_of(max_new_tokens: int, budget: int) -> int:
    """Number of segments of the longest completion, J."""
    return -(-max_new_tokens // budget)


def new_pending(
    batch: int, group_size: int, prompt_length: int, max_new_tokens: int, budget: int, truncates: bool
) -> PendingGroups:
    """Nothing pending, with room for all that can be: fewer than B groups wait whole before a round of B groups.

    Args:
      truncates: whether tokens are drawn from a truncated distribution, by top-k or top-p.
    """
    count, segments = 2 * batch, segments_of(max_new_tokens, budget)
    # Every leaf has a buffer of its own: donated states may not share any.
    prompts = Prompts(
        jnp.zeros(count, jnp.int32),
        jnp.zeros((count, prompt_length), jnp.int32),
        jnp.ones(count, jnp.int32),
        jnp.ones(count, jnp.float32),
    )
    groups = no_groups(prompts, RolloutShape(group_size, max_new_tokens, 0), segments, truncates)
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    return PendingGroups(
        groups, next(zeros), next(zeros), jnp.zeros(count, jnp.int32), jnp.ones(count, jnp.float32), next(zeros)
    )


def no_groups(prompts: Prompts, shape: RolloutShape, segments: int, truncates: bool) -> BegunGroups:
    """Groups of these prompts before their first token."""
    count = prompts.ids.shape[0]
    rows, tokens = (count, shape.group_size), (count, shape.group_size, shape.max_new_tokens)
    return BegunGroups(
        prompts=prompts,
        tokens=jnp.full(tokens, shape.pad_id, jnp.int32),
        log_probs=jnp.zeros(tokens),
        sampling_log_probs=jnp.zeros(tokens) if truncates else None,
        lengths=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        versions=jnp.full((count, segments), -1, jnp.int32),
        first_row=jnp.zeros(count, jnp.int32),
    )


def is_whole(groups: BegunGroups) -> Bool[Array, "C"]:
    """Whether all completions of a group have ended, by a stop token or by the length limit."""
    return (groups.ended | (groups.lengths >= groups.tokens.shape[2])).all(axis=1)


def roll_out(
    model: Model,
    params: Params,
    pending: PendingGroups,
    fresh: Prompts,
    key: Key[Array, ""],
    step: Int[Array, ""],
    number: Int[Array, ""],
    settings: SamplingParams,
    shape: RolloutShape,
    budget: int,
    chunk: int = 1,
) -> PendingGroups:
    """What is pending after a round.

    Args:
      fresh: B prompts, of which the first ones fill the places that unfinished groups leave.
      key: the run's key.
      number: number of the round in its step.
      shape: its group size and length are those of the pending groups.
      chunk: tokens that are drawn between two tests whether all rows have ended.
    """
    window = open_window(pending, fresh, step, number, shape)
    groups = window.groups
    rows = groups.first_row[:, None] + jnp.arange(shape.group_size)

    def row_keys(begun_at: Int[Array, ""], rows: Int[Array, "G"]) -> Key[Array, "G"]:
        return jax.vmap(jax.random.fold_in, (None, 0))(purpose_key(key, begun_at, ROLLOUT), rows)

    keys = jax.vmap(row_keys)(groups.versions[:, 0], rows)
    groups = draw_segment(model, params, groups, keys, settings, budget, shape.pad_id, chunk)
    added = (window.places >= pending.held).sum(dtype=jnp.int32)
    after = jax.tree.map(lambda x, new: x.at[window.places].set(new), pending.groups, groups)
    held = pending.held + added
    waits = jnp.arange(after.first_row.shape[0]) < held
    unfinished = (waits & ~is_whole(after)).sum(dtype=jnp.int32)
    return dataclasses.replace(pending, groups=after, held=held, unfinished=unfinished)


def open_window(
    pending: PendingGroups, fresh: Prompts, step: Int[Array, ""], number: Int[Array, ""], shape: RolloutShape
) -> Window:
    """The groups of a round, whose next segment has the version `step`."""
    groups, batch = pending.groups, fresh.ids.shape[0]
    count = groups.first_row.shape[0]
    goes_on = (jnp.arange(count) < pending.held) & ~is_whole(groups)
    old = jnp.nonzero(goes_on, size=batch, fill_value=0)[0]
    place = jnp.arange(batch)
    is_new, turn = place >= pending.unfinished, place - pending.unfinished
    prompts = jax.tree.map(lambda x: x[jnp.maximum(turn, 0)], fresh)
    blank = no_groups(prompts, shape, groups.versions.shape[1], groups.sampling_log_probs is not None)
    first_row = (number * batch + turn) * shape.group_size
    blank = dataclasses.replace(blank, first_row=first_row.astype(jnp.int32))

    def one(x: Array, new: Array) -> Array:
        return jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, x[old])

    chosen: BegunGroups = jax.tree.map(one, groups, blank)
    segment = (chosen.versions >= 0).sum(axis=1)
    versions = chosen.versions.at[place, segment].set(step, mode="drop")
    chosen = jax.tree.map(_by_batch, dataclasses.replace(chosen, versions=versions))
    return Window(chosen, jnp.where(is_new, pending.held + turn, old))


def _by_batch(x: Array) -> Array:
    """An array of the groups of a round, split over devices as a batch is."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))


class SegmentLoop(NamedTuple):
    """State of the token loop."""

    t: Int[Array, "B"]
    """Position, in the completions of each group, of `last`."""
    last: Int[Array, "B G"]
    """Id of the token that was drawn last, which the next step feeds to the model."""
    alive: Bool[Array, "B G"]
    """Whether the completion goes on."""
    cache: PyTree
    """Keys and values of the completions, as the model keeps them."""
    samples: Samples
    """Completions so far, those of earlier rounds included."""


def draw_segment(
    model: Model,
    params: Params,
    groups: BegunGroups,
    keys: Key[Array, "B G"],
    settings: SamplingParams,
    budget: int,
    pad_id: int,
    chunk: int = 1,
) -> BegunGroups:
    """The groups after each of their completions has drawn its tokens of one more segment.

    Args:
      groups: groups, the version of whose new segment is there already.
      keys: random key of each completion; its t-th token is drawn with fold_in(key, t).
    Raises:
      ValueError: the model has no `resume`.
    """
    if model.resume is None:
        raise ValueError("rollout.carry: this model has no `resume`; leave it out")
    longest = groups.tokens.shape[2]
    limit = jnp.minimum(settings.max_new_tokens, longest)
    start = ((groups.versions >= 0).sum(axis=1) - 1) * budget
    end = jnp.minimum(start + budget, limit)
    goes_on = ~groups.ended & (groups.lengths < limit)
    width = (groups.versions.shape[1] - 1) * budget
    begun = Begun(groups.tokens[..., :width], jnp.where(goes_on, groups.lengths, 0))
    decoder = model.resume(params, groups.prompts.tokens, groups.prompts.lengths, begun, longest)
    sampling = groups.log_probs if groups.sampling_log_probs is None else groups.sampling_log_probs
    steps = jnp.zeros(0, jnp.int32)
    samples = Samples(groups.tokens, groups.log_probs, sampling, groups.lengths, groups.ended, steps)
    t = jnp.maximum(start - 1, 0)
    last = jnp.take_along_axis(groups.tokens, t[:, None, None], axis=2)[..., 0]
    logits = jnp.broadcast_to(decoder.logits[:, None], (*last.shape, decoder.logits.shape[-1]))
    loop = append(SegmentLoop(t, last, goes_on, decoder.cache, samples), logits, keys, t, start == 0, settings, pad_id)

    def unfinished(loop: SegmentLoop) -> Bool[Array, ""]:
        return (loop.alive & (loop.t + 1 < end)[:, None]).any()

    def decode_token(loop: SegmentLoop) -> SegmentLoop:
        logits, cache = decoder.step(loop.cache, loop.last, loop.t)
        logits, t = constrain(logits, "batch", None, None), loop.t + 1
        return append(loop._replace(cache=cache), logits, keys, t, t < end, settings, pad_id)

    def decode_chunk(loop: SegmentLoop) -> SegmentLoop:
        if chunk == 1:
            return decode_token(loop)
        after: SegmentLoop = jax.lax.fori_loop(0, chunk, lambda _, loop: decode_token(loop), loop)
        return after

    found = jax.lax.while_loop(unfinished, decode_chunk, loop).samples
    return dataclasses.replace(
        groups,
        tokens=found.tokens,
        log_probs=found.log_probs,
        sampling_log_probs=None if groups.sampling_log_probs is None else found.sampling_log_probs,
        lengths=found.lengths,
        ended=found.ended,
    )


def append(
    loop: SegmentLoop,
    logits: Float[Array, "B G V"],
    keys: Key[Array, "B G"],
    t: Int[Array, "B"],
    moves: Bool[Array, "B"],
    settings: SamplingParams,
    pad_id: int,
) -> SegmentLoop:
    """The loop after the completions that go on, in the groups that move, got token t of their group."""
    drawn = draw_row_tokens(logits, keys, jnp.broadcast_to(t[:, None], loop.last.shape), settings)
    live, samples = loop.alive & moves[:, None], loop.samples
    group, column = jnp.arange(t.shape[0]), jnp.where(moves, t, samples.tokens.shape[2])
    stop = live & is_stop(drawn.token, settings.stop_ids)

    def put(array: Float[Array, "B G T"], value: Float[Array, "B G"], otherwise: float) -> Float[Array, "B G T"]:
        return array.at[group, :, column].set(jnp.where(live, value, otherwise).astype(array.dtype), mode="drop")

    return SegmentLoop(
        t=jnp.where(moves, t, loop.t),
        last=jnp.where(moves[:, None], drawn.token, loop.last),
        alive=loop.alive & ~stop,
        cache=loop.cache,
        samples=samples._replace(
            tokens=put(samples.tokens, drawn.token, pad_id),
            log_probs=put(samples.log_probs, drawn.log_prob, 0.0),
            sampling_log_probs=put(samples.sampling_log_probs, drawn.sampling_log_prob, 0.0),
            lengths=samples.lengths + live,
            ended=samples.ended | stop,
        ),
    )


def take_batch(
    pending: PendingGroups, batch: int, temperature: Float[Array, ""] | float
) -> tuple[PendingGroups, Rollouts]:
    """What is pending without the first `batch` whole groups, and these as rollouts. So many must be whole.

    Args:
      temperature: the temperature that the groups were drawn at; 0 = greedy.
    """
    groups, count = pending.groups, pending.groups.first_row.shape[0]
    there = jnp.arange(count) < pending.held
    whole = there & is_whole(groups)
    taken = whole & (jnp.cumsum(whole) <= batch)
    first = jax.tree.map(lambda x: x[jnp.nonzero(taken, size=batch, fill_value=0)[0]], groups)
    left = jnp.nonzero(there & ~taken, size=count, fill_value=count - 1)[0]
    rest = dataclasses.replace(
        pending, groups=jax.tree.map(lambda x: x[left], groups), held=pending.held - taken.sum(dtype=jnp.int32)
    )
    sampling = first.log_probs if first.sampling_log_probs is None else first.sampling_log_probs
    return rest, Rollouts(
        prompts=first.prompts,
        tokens=first.tokens,
        mask=jnp.arange(first.tokens.shape[2]) < first.lengths[..., None],
        log_probs=first.log_probs,
        sampling_log_probs=sampling,
        lengths=first.lengths,
        ended=first.ended,
        temperature=sampling_temperature(temperature),
        versions=first.versions,
    )
