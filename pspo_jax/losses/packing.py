"""Training without padding: rows of a minibatch packed whole into bins of one length.

A row needs its prompt and its completion but the last token. First-fit decreasing puts rows into bins of P + T - 1
places; as many microbatches of bins run as hold any row, a number that is known at run time alone. Inside a bin tokens
attend to their own row, with positions from 0. Completions of one prompt may share it: the first in a bin, their
leader, holds the prompt; the others follow, attend to it and to themselves, and go on from its positions. Log-probs go
back to rows before the loss sees them, so every loss is the padded one's: sequence ratios, aggregations and all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.state import Params
from pspo_jax.distributed.mesh import constrain
from pspo_jax.losses.log_probs import chunked_log_probs, pack_rows
from pspo_jax.model.attention.xla import BLOCKWISE_FROM_TOKENS
from pspo_jax.model.interface import Model, Packed

if TYPE_CHECKING:
    from pspo_jax.arrays.rows import Rows

_TILE = 128
ROWS_PER_BIN = 16
"""At most; bounds the loss's arrays, [bins x this, T]."""


class BinAssignment(NamedTuple):
    """Which rows share a bin."""

    rows: Int[Array, "N M"]
    """Of each bin, in the order in which they stand in it; R = none."""
    leads: Bool[Array, "N M"]
    """Rows that hold their prompt; the others stand behind the one before them, of the same prompt."""
    bins: Int[Array, ""]
    """Bins that hold a row; they come first."""
    used: Int[Array, ""]
    """Places that rows stand in."""


def assign_bins(
    prompts: Int[Array, "R"], answers: Int[Array, "R"], groups: Int[Array, "R"], length: int, bins: int
) -> BinAssignment:
    """First-fit decreasing, of groups and of the rows of each; a bin that holds the prompt comes before others.

    Args:
      prompts: tokens of each row's prompt.
      answers: tokens of its completion that the loss needs, with the prompt at most `length` + 1; 0 = it goes nowhere.
      groups: below R, alike for rows that may share their prompt.
      length: places of a bin.
      bins: N >= R rounded up to whole microbatches; as many bins as rows are always enough.
    """
    r = prompts.shape[0]
    total = jnp.zeros(r, jnp.int32).at[groups].add(jnp.where(answers > 0, prompts + answers - 1, 0))
    order = jnp.lexsort((-answers, groups, -total[groups]))

    def place(carry: tuple[Array, Array, Array], row: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        room, held, last = carry
        follows = last == groups[row]
        need = answers[row] - 1 + jnp.where(follows, 0, prompts[row])
        fits = (room >= need) & (held < ROWS_PER_BIN)
        bin_ = jnp.where(answers[row] > 0, jnp.argmax(fits * (1 + follows)), bins)
        slot, leads = held.at[bin_].get(mode="fill", fill_value=0), ~follows.at[bin_].get(mode="fill", fill_value=True)
        after = (
            room.at[bin_].add(-need.at[bin_].get(mode="fill", fill_value=0), mode="drop"),
            held.at[bin_].add(1, mode="drop"),
            last.at[bin_].set(groups[row], mode="drop"),
        )
        return after, (bin_, slot, leads)

    start = jnp.full(bins, length, jnp.int32), jnp.zeros(bins, jnp.int32), jnp.full(bins, -1, jnp.int32)
    (room, held, _), (where, slot, leads) = jax.lax.scan(place, start, order)
    shape = bins, ROWS_PER_BIN
    return BinAssignment(
        jnp.full(shape, r, jnp.int32).at[where, slot].set(order, mode="drop"),
        jnp.ones(shape, bool).at[where, slot].set(leads, mode="drop"),
        (held > 0).sum(),
        (length - room).sum(),
    )


def assign_shared_bins(
    prompts: Int[Array, "R"], answers: Int[Array, "R"], groups: Int[Array, "R"], length: int, bins: int
) -> BinAssignment:
    """`plan_bins`, or that of rows which share nothing, if it needs fewer bins: rows of one size pack better."""
    alone = jnp.arange(prompts.shape[0])
    both = jax.vmap(lambda g: assign_bins(prompts, answers, g, length, bins))(jnp.stack([groups, alone]))
    return jax.tree.map(lambda x: x[both.bins.argmin()], both)


def loss_lengths(rows: Rows) -> Int[Array, "R"]:
    """Tokens of each completion up to the last one in the loss; 0 without any."""
    return jnp.where(rows.mask, jnp.arange(rows.mask.shape[1]) + 1, 0).max(axis=1)


def row_lengths(rows: Rows) -> Int[Array, "R"]:
    """Places that each row needs by itself; 0 without a token in the loss."""
    answers = loss_lengths(rows)
    return jnp.where(answers > 0, rows.lengths + answers - 1, 0)


def bin_length(rows: Rows) -> int:
    """Places of a bin: as many as the longest row can need; long ones are whole blocks of attention."""
    return whole_blocks(rows.prompts.shape[1] + rows.tokens.shape[1] - 1)


def whole_blocks(places: int) -> int:
    return places if places < BLOCKWISE_FROM_TOKENS else -(-places // _TILE) * _TILE


def rows_of_bins(rows: Rows, ids: Int[Array, "b M"]) -> Rows:
    """The rows of some bins, [b M, ...]; where there is none, one that no sum sees."""
    flat = ids.reshape(-1)
    real = flat < rows.lengths.shape[0]
    part = jax.tree.map(lambda x: x.at[flat].get(mode="clip"), rows)
    return part.replace(mask=part.mask & real[:, None], counted=part.counted & real)


def packed_log_probs(
    model: Model,
    weights: Params,
    part: Rows,
    leads: Bool[Array, "b M"],
    temperature: Float[Array, ""] | float,
    logits_mib: int,
    entropy_gradient: bool = False,
    shares: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """`completion_log_probs` of the rows of some bins, R = b x M, computed in the bins; 0 outside the mask's span.

    Bins have P + T - 1 places. The head runs on the places that predict a completion's token alone, chunk by chunk, and
    leaves out chunks in which no bin has any.

    Args:
      leads: of these bins, as in their plan.
      shares: False = all rows lead, which is known beforehand.
    """
    p, t = part.prompts.shape[1], part.tokens.shape[1]
    bins, length = leads.shape[0], bin_length(part)
    answer = loss_lengths(part).reshape(leads.shape)
    prompt = part.lengths.reshape(leads.shape)
    rows = constrain(pack_rows(part.prompts, part.lengths, part.tokens).reshape(bins, -1, p + t), "rows", None, None)
    behind = jnp.where(leads, 0, prompt)
    need = jnp.where(answer > 0, prompt - behind + answer - 1, 0)
    layout, first = _places(need, length, behind)
    leader = jax.lax.cummax(jnp.where(leads, jnp.arange(leads.shape[1]), 0), axis=1)
    if shares:
        layout = _shared(layout, leader, prompt)
    tokens = _pick(rows, layout.rows, layout.places)
    hidden = model.hidden(weights, tokens, layout)
    # The stream of all that predict: of each row, its prompt's last place and those of its completion but the last.
    # Of a shared prompt the last place counts for every row.
    stream, first_answer = _places(answer, whole_blocks(length + leads.shape[1] - 1) if shares else length)
    whose, live = _clip(stream.rows, need), stream.rows < need.shape[1]

    def of(row: Int[Array, "b M"]) -> Int[Array, "b s"]:
        return jnp.take_along_axis(row, whose, axis=1)

    last = jnp.take_along_axis(first + prompt - 1, leader, axis=1)
    at = jnp.where(stream.places == 0, of(last), of(first + prompt - behind - 1) + stream.places)
    at = jnp.where(live, at, 0)
    targets = _pick(rows, whose, of(prompt) + stream.places)
    predicting = jnp.take_along_axis(hidden, at[..., None], axis=1)
    found = chunked_log_probs(model, weights, predicting, targets, temperature, logits_mib, entropy_gradient, live=live)
    # Back to rows: token k of a row is place first_answer + k of its bin's stream.
    back = first_answer[:, :, None] + jnp.arange(t)
    inside = jnp.arange(t) < answer[:, :, None]
    back = jnp.where(inside, back, 0).reshape(bins, -1)

    def by_row(x: Float[Array, "b s"]) -> Float[Array, "R T"]:
        return jnp.where(inside, jnp.take_along_axis(x, back, axis=1).reshape(inside.shape), 0).reshape(-1, t)

    log_probs, entropy = found
    return by_row(log_probs), by_row(entropy)


def _places(
    need: Int[Array, "b M"], length: int, behind: Int[Array, "b M"] | int = 0
) -> tuple[Packed, Int[Array, "b M"]]:
    """Whose place each of a bin's is, and which of that row's, counted from `behind`; and where each row begins."""
    end = jnp.cumsum(need, axis=1)
    first = end - need
    j = jnp.arange(length)
    rows = (j >= end[:, :, None]).sum(axis=1)
    start = jnp.take_along_axis(first - behind, _clip(rows, need), axis=1)
    return Packed(rows, jnp.where(rows < need.shape[1], j - start, 0)), first


def _shared(layout: Packed, leader: Int[Array, "b M"], prompt: Int[Array, "b M"]) -> Packed:
    """With the row whose prompt each place sees, and whose prompt it is part of."""
    whose = _clip(layout.rows, leader)
    real = layout.rows < leader.shape[1]
    in_prompt = real & (layout.places < jnp.take_along_axis(prompt, whose, axis=1))
    return layout._replace(
        leader=jnp.where(real, jnp.take_along_axis(leader, whose, axis=1), layout.rows),
        prompt=jnp.where(in_prompt, whose, -1),
    )


def _clip(rows: Int[Array, "b s"], need: Int[Array, "b M"]) -> Int[Array, "b s"]:
    return jnp.minimum(rows, need.shape[1] - 1)


def _pick(rows: Int[Array, "b M S"], row: Int[Array, "b s"], place: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """rows[b, row, place]; any token where there is no row."""
    b, m, s = rows.shape
    index = jnp.minimum(row, m - 1) * s + jnp.minimum(place, s - 1)
    return jnp.take_along_axis(rows.reshape(b, m * s), index, axis=1)
