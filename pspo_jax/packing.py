"""Training without padding: rows of a minibatch packed whole into bins of one length.

A row needs its prompt and its completion but the last token. First-fit decreasing puts rows into bins of P + T - 1
places; as many microbatches of bins run as hold any row, a number that is known at run time alone. Inside a bin tokens
attend to their own row, with positions from 0. Log-probs go back to rows before the loss sees them, so every loss is
the padded one's: sequence ratios, aggregations and all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.objective.log_probs import chunked_log_probs, pack_rows
from pspo_jax.parallel.mesh import constrain
from pspo_jax.policy.attention import LONG
from pspo_jax.policy.base import Packed, Policy
from pspo_jax.state import Params

if TYPE_CHECKING:
    from pspo_jax.rows import Rows

_TILE = 128
ROWS_PER_BIN = 16
"""At most; bounds the loss's arrays, [bins x this, T]."""


class Plan(NamedTuple):
    """Which rows share a bin."""

    rows: Int[Array, "N M"]
    """Of each bin, in the order in which they stand in it; R = none."""
    bins: Int[Array, ""]
    """Bins that hold a row; they come first."""


def plan_bins(needs: Int[Array, "R"], length: int, bins: int) -> Plan:
    """First-fit decreasing.

    Args:
      needs: places of each row, at most `length`; a row of 0 goes nowhere.
      length: places of a bin.
      bins: N >= R rounded up to whole microbatches; as many bins as rows are always enough.
    """
    r = needs.shape[0]
    order = jnp.argsort(-needs, stable=True)

    def place(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        room, held = carry
        fits = (room >= needs[row]) & (held < ROWS_PER_BIN)
        bin_ = jnp.where(needs[row] > 0, jnp.argmax(fits), bins)
        slot = held.at[bin_].get(mode="fill", fill_value=0)
        after = room.at[bin_].add(-needs[row], mode="drop"), held.at[bin_].add(1, mode="drop")
        return after, (bin_, slot)

    start = jnp.full(bins, length, jnp.int32), jnp.zeros(bins, jnp.int32)
    (_, held), (where, slot) = jax.lax.scan(place, start, order)
    rows = jnp.full((bins, ROWS_PER_BIN), r, jnp.int32).at[where, slot].set(order, mode="drop")
    return Plan(rows, (held > 0).sum())


def needs_of(rows: Rows) -> Int[Array, "R"]:
    """Places that each row needs; 0 without a token in the loss."""
    t = rows.mask.shape[1]
    completion = jnp.where(rows.mask, jnp.arange(t) + 1, 0).max(axis=1)
    return jnp.where(completion > 0, rows.lengths + completion - 1, 0)


def bin_length(rows: Rows) -> int:
    """Places of a bin: as many as the longest row can need; long ones are whole blocks of attention."""
    needed = rows.prompts.shape[1] + rows.tokens.shape[1] - 1
    return needed if needed < LONG else -(-needed // _TILE) * _TILE


def rows_in(rows: Rows, ids: Int[Array, "b M"]) -> Rows:
    """The rows of some bins, [b M, ...]; where there is none, one that no sum sees."""
    flat = ids.reshape(-1)
    real = flat < rows.lengths.shape[0]
    part = jax.tree.map(lambda x: x.at[flat].get(mode="clip"), rows)
    return part.replace(mask=part.mask & real[:, None], counted=part.counted & real)


def packed_log_probs(
    policy: Policy,
    weights: Params,
    part: Rows,
    bins: int,
    temperature: Float[Array, ""] | float,
    logits_mib: int,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """`completion_log_probs` of the rows of `bins` bins, R = bins x M, computed in the bins; 0 outside the mask's span.

    Bins have P + T - 1 places. The head runs on the places that predict a completion's token alone, chunk by chunk, and
    leaves out chunks in which no bin has any.
    """
    p, t = part.prompts.shape[1], part.tokens.shape[1]
    length = bin_length(part)
    need = needs_of(part).reshape(bins, -1)
    prompt = part.lengths.reshape(bins, -1)
    answer = jnp.where(need > 0, need - prompt + 1, 0)
    rows = constrain(pack_rows(part.prompts, part.lengths, part.tokens).reshape(bins, -1, p + t), "rows", None, None)
    layout, first = _places(need, length)
    tokens = _pick(rows, layout.rows, layout.places)
    hidden = policy.hidden(weights, tokens, layout)
    # The stream of all places that predict: of each row, from its prompt's last token on.
    stream, first_answer = _places(answer, length)
    whose, live = _clip(stream.rows, need), stream.rows < need.shape[1]
    at = jnp.where(live, jnp.take_along_axis(first + prompt - 1, whose, axis=1) + stream.places, 0)
    targets = _pick(rows, whose, jnp.take_along_axis(prompt, whose, axis=1) + stream.places)
    predicting = jnp.take_along_axis(hidden, at[..., None], axis=1)
    found = chunked_log_probs(
        policy, weights, predicting, targets, temperature, logits_mib, entropy_gradient, live=live
    )
    # Back to rows: token k of a row is place first_answer + k of its bin's stream.
    back = first_answer[:, :, None] + jnp.arange(t)
    inside = jnp.arange(t) < answer[:, :, None]
    back = jnp.where(inside, back, 0).reshape(bins, -1)

    def by_row(x: Float[Array, "b s"]) -> Float[Array, "R T"]:
        return jnp.where(inside, jnp.take_along_axis(x, back, axis=1).reshape(inside.shape), 0).reshape(-1, t)

    log_probs, entropy = found
    return by_row(log_probs), by_row(entropy)


def _places(need: Int[Array, "b M"], length: int) -> tuple[Packed, Int[Array, "b M"]]:
    """Whose place each of a bin's is, and which of that row's; and where each row begins."""
    end = jnp.cumsum(need, axis=1)
    first = end - need
    j = jnp.arange(length)
    rows = (j >= end[:, :, None]).sum(axis=1)
    start = jnp.take_along_axis(first, _clip(rows, need), axis=1)
    return Packed(rows, jnp.where(rows < need.shape[1], j - start, 0)), first


def _clip(rows: Int[Array, "b s"], need: Int[Array, "b M"]) -> Int[Array, "b s"]:
    return jnp.minimum(rows, need.shape[1] - 1)


def _pick(rows: Int[Array, "b M S"], row: Int[Array, "b s"], place: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """rows[b, row, place]; any token where there is no row."""
    b, m, s = rows.shape
    index = jnp.minimum(row, m - 1) * s + jnp.minimum(place, s - 1)
    return jnp.take_along_axis(rows.reshape(b, m * s), index, axis=1)
