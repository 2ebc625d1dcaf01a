"""Training without padding: rows of a minibatch are packed into bins of one length.

A bin is one long row that holds several rows of the batch, one behind another. Each row attends to itself alone and has
its own positions, so that its log-probs are those it would have in a batch of padded rows. The losses get these
log-probs row by row and know nothing of bins: sequence ratios and aggregations are the same with and without packing.

Rows with the same prompt may share it. The first of them in the bin owns the prompt; those that follow stand there with
their completion alone, attend to the owner's prompt and go on from its positions. A completion's last token is left
out, since nothing is predicted from it. Here are three rows in a bin of 13 tokens: rows 0 and 1 are completions A and B
of a prompt p of three tokens, and row 2 is completion C of a prompt q of two tokens.

    tokens          p0 p1 p2 A0 A1   B0 B1 B2   q0 q1 C0    -  -
    row_of           0  0  0  0  0    1  1  1    2  2  2    M  M
    positions        0  1  2  3  4    3  4  5    0  1  2    0  0
    prompt_row       0  0  0  0  0    0  0  0    2  2  2    M  M
    in_prompt_of     0  0  0 -1 -1   -1 -1 -1    2  2 -1   -1 -1

    owns_prompt     row 0: yes       row 1: no   row 2: yes
    prompt_offset   row 0: 0         row 1: 3    row 2: 0     position of a row's first token in the bin

Predictions are laid out one behind another in the same way. A shared prompt's last token predicts the first token of
every completion, so there may be more predictions than tokens:

    predicted from  p2 A0 A1   p2 B0 B1 B2   q1 C0
    target          A0 A1 A2   B0 B1 B2 B3   C0 C1
    row_of           0  0  0    1  1  1  1    2  2

First-fit decreasing assigns rows to bins: rows come in order of their size, and each goes to the first bin with room
for it. Only microbatches with at least one row are computed; their number is known only at run time. `choose_bin_shape`
finds the length of bins.

Letters: R rows, N bins, M rows that a bin holds at most, b bins of a microbatch, P the longest prompt, T the longest
completion, S tokens of a bin, Q predictions of a bin.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import Params
from pspo_jax.distributed.mesh import constrain, whole_to_index
from pspo_jax.losses.log_probs import chunked_log_probs, compact_images, compact_rows, hidden_at
from pspo_jax.model.attention.xla import BLOCKWISE_FROM_TOKENS, block_size
from pspo_jax.model.interface import ImageTokens, Model, Packed

_LONG_BIN_MULTIPLE = 128
"""Tokens of which the length of a long bin is a multiple, so that attention computes it in blocks of equal size."""
ROWS_PER_BIN = 16
"""Largest number of rows of a bin, M, unless `choose_bin_shape` finds a larger one. It bounds the arrays of the loss,
[bins x M, T]."""
_EQUAL_WORK_TOKENS = 2048
"""Length of a bin, in tokens, at which attention over its whole square takes about as long as all other products."""
_EQUAL_MEMORY_TOKENS = 512
"""Number of queries computed at a time at which their scores take about as much memory as all other activations."""


class BinShape(NamedTuple):
    """The shape of bins, and how many are computed together."""

    length: int
    """Length of a bin in tokens, S."""
    rows: int
    """Largest number of rows of a bin, M."""
    at_a_time: int
    """Number of bins of a microbatch, b."""

    def predictions(self, shares: bool) -> int:
        """Number of predictions for which a bin has room, Q.

        Args:
          shares: whether rows may share their prompt, whose last token then predicts a token of each of them.
        """
        return padded_length(self.length + self.rows - 1) if shares else self.length


def choose_bin_shape(
    prompt: int,
    completion: int,
    group_size: int,
    rows: int,
    shards: int,
    shares: bool = True,
    enough: int | None = None,
) -> BinShape:
    """The length of bins at which a completion costs least, and as many bins at a time as fit in the memory of `rows`.

    A bin that holds k completions behind one copy of their prompt has prompt + k (completion - 1) tokens. With a larger
    k, more completions share the prompt's cost, but attention grows with the square of the length. k is the number up
    to `group_size` at which a completion costs least; it is 1 where completions are much longer than their prompt.

    Args:
      prompt: P, the longest prompt in tokens.
      completion: T, the longest completion in tokens.
      rows: largest number of rows that may be computed together if each has a bin of its own; it bounds the memory.
      shards: number of devices that split the bins of a microbatch; it divides `rows`.
      shares: whether rows may share their prompt; False = bins are as long as the longest row.
      enough: number of tokens that suffice for a microbatch; None = as many bins as the memory permits.
    """

    def shape(k: int) -> BinShape:
        length = padded_length(prompt + k * (completion - 1))
        at_a_time = int(rows * min(alone / length, memory(alone) / memory(length))) // shards
        if enough is not None:
            at_a_time = min(at_a_time, -(-enough // (length * shards)))
        return BinShape(length, max(ROWS_PER_BIN, 2 * k), at_a_time * shards)

    def memory(length: int) -> float:
        return length * (1 + block_size(length, 1) / _EQUAL_MEMORY_TOKENS)

    def work(length: int) -> float:
        # Queries in blocks do not see the keys behind their block.
        seen = length if length < BLOCKWISE_FROM_TOKENS else (length + block_size(length, 1)) / 2
        return length * (1 + seen / _EQUAL_WORK_TOKENS)

    alone = padded_length(prompt + completion - 1)
    by_completions = {k: shape(k) for k in range(1, group_size + 1 if shares else 2)}
    possible = [k for k, found in by_completions.items() if found.at_a_time]
    return by_completions[min(possible, key=lambda k: work(by_completions[k].length) / k)]


class BinAssignment(NamedTuple):
    """Which rows share a bin."""

    rows: Int[Array, "N M"]
    """Indices of the rows in each bin, in the order in which they stand there; R = no row."""
    owns_prompt: Bool[Array, "N M"]
    """Whether a row's own prompt stands in the bin; otherwise the row shares that of the row before it."""
    num_bins: Int[Array, ""]
    """Number of bins that hold a row. They come first."""
    num_tokens: Int[Array, ""]
    """Number of tokens in all bins, padding not counted."""


def assign_bins(
    prompt_lengths: Int[Array, "R"],
    completion_lengths: Int[Array, "R"],
    groups: Int[Array, "R"],
    length: int,
    bins: int,
    rows_per_bin: int = ROWS_PER_BIN,
) -> BinAssignment:
    """First-fit decreasing: the largest group first and, within a group, the longest completion first.

    A bin whose last row is of the same group, so that the prompt can be shared, is preferred to all others.

    Args:
      prompt_lengths: tokens of each row's prompt.
      completion_lengths: tokens of each row's completion that the loss needs; 0 = the row goes into no bin. With the
        prompt they are at most `length` + 1.
      groups: a number below R for each row; rows with the same number may share their prompt.
      length: tokens of a bin, S.
      bins: N, at least R, rounded up to whole microbatches; as many bins as rows are always enough.
      rows_per_bin: M.
    """
    r = prompt_lengths.shape[0]
    alone = jnp.where(completion_lengths > 0, prompt_lengths + completion_lengths - 1, 0)
    group_size = jnp.zeros(r, jnp.int32).at[groups].add(alone)
    order = jnp.lexsort((-completion_lengths, groups, -group_size[groups]))

    def put_row(carry: tuple[Array, Array, Array], row: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        """Put one row into the first bin with room; bin number `bins` does not exist and drops it."""
        room, held, last_group = carry
        shares = last_group == groups[row]
        need = completion_lengths[row] - 1 + jnp.where(shares, 0, prompt_lengths[row])
        fits = (room >= need) & (held < rows_per_bin)
        bin_ = jnp.where(completion_lengths[row] > 0, jnp.argmax(fits * (1 + shares)), bins)
        slot = held.at[bin_].get(mode="fill", fill_value=0)
        owns_prompt = ~shares.at[bin_].get(mode="fill", fill_value=True)
        after = (
            room.at[bin_].add(-need.at[bin_].get(mode="fill", fill_value=0), mode="drop"),
            held.at[bin_].add(1, mode="drop"),
            last_group.at[bin_].set(groups[row], mode="drop"),
        )
        return after, (bin_, slot, owns_prompt)

    start = jnp.full(bins, length, jnp.int32), jnp.zeros(bins, jnp.int32), jnp.full(bins, -1, jnp.int32)
    (room, held, _), (bin_, slot, owns_prompt) = jax.lax.scan(put_row, start, order)
    shape = bins, rows_per_bin
    return BinAssignment(
        rows=jnp.full(shape, r, jnp.int32).at[bin_, slot].set(order, mode="drop"),
        owns_prompt=jnp.ones(shape, bool).at[bin_, slot].set(owns_prompt, mode="drop"),
        num_bins=(held > 0).sum(),
        num_tokens=(length - room).sum(),
    )


def assign_shared_bins(
    prompt_lengths: Int[Array, "R"],
    completion_lengths: Int[Array, "R"],
    groups: Int[Array, "R"],
    length: int,
    bins: int,
    rows_per_bin: int = ROWS_PER_BIN,
) -> BinAssignment:
    """`assign_bins` with shared prompts or without, whichever needs fewer bins.

    Sharing can need more bins, since it keeps the rows of a group together: rows in order of their size pack better.
    """
    unshared = jnp.arange(prompt_lengths.shape[0])
    both = jax.vmap(lambda g: assign_bins(prompt_lengths, completion_lengths, g, length, bins, rows_per_bin))(
        jnp.stack([groups, unshared])
    )
    return jax.tree.map(lambda x: x[both.num_bins.argmin()], both)


def loss_lengths(rows: Rows) -> Int[Array, "R"]:
    """Tokens of each completion up to the last one in the loss; 0 = the loss needs none of them."""
    return jnp.where(rows.mask, jnp.arange(rows.mask.shape[1]) + 1, 0).max(axis=1)


def row_lengths(rows: Rows) -> Int[Array, "R"]:
    """Tokens of each row in a bin that it shares with no other; 0 = the loss needs none of them."""
    completion_lengths = loss_lengths(rows)
    return jnp.where(completion_lengths > 0, rows.lengths + completion_lengths - 1, 0)


def padded_length(length: int) -> int:
    """The length, rounded up where attention computes it in blocks, so that these are of equal size."""
    return length if length < BLOCKWISE_FROM_TOKENS else -(-length // _LONG_BIN_MULTIPLE) * _LONG_BIN_MULTIPLE


def take_rows(rows: Rows, ids: Int[Array, "m"]) -> Rows:
    """The rows with these indices; index R stands for a row that counts in no sum."""
    exists = ids < rows.lengths.shape[0]
    rows = jax.tree.map(whole_to_index, rows)
    part = jax.tree.map(lambda x: x.at[ids].get(mode="clip"), rows)
    return part.replace(mask=part.mask & exists[:, None], counted=part.counted & exists)


class BinLayout(NamedTuple):
    """Where the tokens and predictions of some bins stand."""

    tokens: Int[Array, "b S"]
    """The tokens of each bin."""
    packed: Packed
    """Row and position of each token."""
    source: Int[Array, "b Q"]
    """The token from which each prediction is made, as an index in its bin."""
    targets: Int[Array, "b Q"]
    """The token that is predicted."""
    valid: Bool[Array, "b Q"]
    """Whether there is such a prediction."""
    first_prediction: Int[Array, "b M"]
    """Index of each row's first prediction in its bin."""
    completion_lengths: Int[Array, "b M"]
    """Tokens of each completion that the loss needs."""


def lay_out_bins(part: Rows, owns_prompt: Bool[Array, "b M"], shape: BinShape, shares: bool = False) -> BinLayout:
    """The layout of the rows of some bins, R = b x M.

    Args:
      part: the rows, as `take_rows` returns them.
      owns_prompt: see `BinAssignment`.
      shape: the shape of the bins.
      shares: whether a row may share its prompt; False = `owns_prompt` is known to be true of every row.
    """
    p, t = part.prompts.shape[1], part.tokens.shape[1]
    bins = owns_prompt.shape[0]
    completion_lengths = loss_lengths(part).reshape(owns_prompt.shape)
    prompt_lengths = part.lengths.reshape(owns_prompt.shape)
    rows = compact_rows(part.prompts, part.lengths, part.tokens).reshape(bins, -1, p + t)
    rows = constrain(rows, "rows", None, None)
    prompt_offset = jnp.where(owns_prompt, 0, prompt_lengths)
    need = jnp.where(completion_lengths > 0, prompt_lengths - prompt_offset + completion_lengths - 1, 0)
    layout, first_token = _lay_out(need, shape.length, prompt_offset)
    prompt_row = jax.lax.cummax(jnp.where(owns_prompt, jnp.arange(owns_prompt.shape[1]), 0), axis=1)
    if shares:
        layout = _share_prompts(layout, prompt_row, prompt_lengths)
    tokens = _gather_tokens(rows, layout.row_of, layout.positions)
    predictions, first_prediction = _lay_out(completion_lengths, shape.predictions(shares))
    row_of, valid = _clip(predictions.row_of, need), predictions.row_of < need.shape[1]

    def by_prediction(of_row: Int[Array, "b M"]) -> Int[Array, "b Q"]:
        return jnp.take_along_axis(of_row, row_of, axis=1)

    # The first token of a completion is predicted from the last token of the prompt, which may be another row's.
    last_prompt_token = jnp.take_along_axis(first_token + prompt_lengths - 1, prompt_row, axis=1)
    own_tokens = by_prediction(first_token + prompt_lengths - prompt_offset - 1) + predictions.positions
    source = jnp.where(predictions.positions == 0, by_prediction(last_prompt_token), own_tokens)
    source = jnp.where(valid, source, 0)
    targets = _gather_tokens(rows, row_of, by_prediction(prompt_lengths) + predictions.positions)
    return BinLayout(tokens, layout, source, targets, valid, first_prediction, completion_lengths)


def packed_hidden(
    model: Model, weights: Params, part: Rows, layout: BinLayout, embeddings: Float[Array, "B U D"] | None = None
) -> Float[Array, "b Q D"]:
    """The hidden state from which each prediction of the bins is made.

    Args:
      embeddings: what `Model.encode_images` makes of the prompts' images; None = all prompts are text.
    """
    images = compact_images(part.images, embeddings, part.tokens.shape[1])
    if images is None:
        hidden = model.hidden(weights, layout.tokens, layout.packed)
    else:
        of_bins = _gather_images(images, layout.packed, layout.tokens.shape[0])
        hidden = model.hidden(weights, layout.tokens, layout.packed, of_bins)
    return hidden_at(hidden, layout.source)


def packed_log_probs(
    model: Model,
    weights: Params,
    part: Rows,
    owns_prompt: Bool[Array, "b M"],
    shape: BinShape,
    temperature: Float[Array, ""] | float,
    logits_mib: int,
    entropy_gradient: bool = False,
    shares: bool = False,
    embeddings: Float[Array, "B U D"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """`completion_log_probs` of the rows of some bins, R = b x M; 0 after a row's last token in the loss.

    The head runs on predictions alone, chunk by chunk, and skips chunks in which no bin has any.

    Args:
      part: the rows, as `take_rows` returns them.
      owns_prompt: see `BinAssignment`.
      shape: the shape of the bins.
      logits_mib: size of one chunk of float32 logits.
      entropy_gradient: whether entropies carry a gradient.
      shares: whether a row may share its prompt; False = `owns_prompt` is known to be true of every row.
      embeddings: what `Model.encode_images` makes of the prompts' images; None = all prompts are text.
    """
    layout = lay_out_bins(part, owns_prompt, shape, shares)
    hidden = packed_hidden(model, weights, part, layout, embeddings)
    log_probs, entropy = chunked_log_probs(
        model, weights, hidden, layout.targets, temperature, logits_mib, entropy_gradient, valid=layout.valid
    )
    t = part.tokens.shape[1]
    return by_row(log_probs, layout, t), by_row(entropy, layout, t)


def by_row(found: Float[Array, "b Q"], layout: BinLayout, t: int) -> Float[Array, "R T"]:
    """A number of each of the bins' predictions, row by row; 0 after a row's last token in the loss.

    Args:
      t: T.
    """
    in_loss = jnp.arange(t) < layout.completion_lengths[:, :, None]
    index = jnp.where(in_loss, layout.first_prediction[:, :, None] + jnp.arange(t), 0).reshape(in_loss.shape[0], -1)
    return jnp.where(in_loss, jnp.take_along_axis(found, index, axis=1).reshape(in_loss.shape), 0).reshape(-1, t)


def _lay_out(
    lengths: Int[Array, "b M"], total: int, offset: Int[Array, "b M"] | int = 0
) -> tuple[Packed, Int[Array, "b M"]]:
    """Rows of these lengths, one behind another in a bin of `total` entries, and the index at which each row begins.

    Args:
      offset: position that the first entry of each row has.
    """
    end = jnp.cumsum(lengths, axis=1)
    first = end - lengths
    index = jnp.arange(total)
    row_of = (index >= end[:, :, None]).sum(axis=1)
    start = jnp.take_along_axis(first - offset, _clip(row_of, lengths), axis=1)
    return Packed(row_of, jnp.where(row_of < lengths.shape[1], index - start, 0)), first


def _share_prompts(layout: Packed, prompt_row: Int[Array, "b M"], prompt_lengths: Int[Array, "b M"]) -> Packed:
    """The layout with `prompt_row` and `in_prompt_of`, so that rows attend to the prompts that they share."""
    row_of = _clip(layout.row_of, prompt_row)
    exists = layout.row_of < prompt_row.shape[1]
    in_prompt = exists & (layout.positions < jnp.take_along_axis(prompt_lengths, row_of, axis=1))
    return layout._replace(
        prompt_row=jnp.where(exists, jnp.take_along_axis(prompt_row, row_of, axis=1), layout.row_of),
        in_prompt_of=jnp.where(in_prompt, row_of, -1),
    )


def _clip(row_of: Int[Array, "b S"], rows: Int[Array, "b M"]) -> Int[Array, "b S"]:
    """Indices that exist: padding, whose index is M, gets that of the last row."""
    return jnp.minimum(row_of, rows.shape[1] - 1)


def _gather_images(images: ImageTokens, layout: Packed, bins: int) -> ImageTokens:
    """The tokens of images in bins, from those in rows."""

    def gather(of_rows: Int[Array, "R P+T"]) -> Int[Array, "b S"]:
        by_bin = of_rows.reshape(bins, -1, of_rows.shape[1])
        return _gather_tokens(by_bin, layout.row_of, layout.positions)

    positions = [gather(images.positions[..., axis]) for axis in range(images.positions.shape[2])]
    return images._replace(embedding_of=gather(images.embedding_of), positions=jnp.stack(positions, axis=-1))


def _gather_tokens(
    rows: Int[Array, "b M P+T"], row: Int[Array, "b S"], position: Int[Array, "b S"]
) -> Int[Array, "b S"]:
    """`rows[b, row, position]`; an arbitrary token where there is no such row or position."""
    b, m, s = rows.shape
    index = jnp.minimum(row, m - 1) * s + jnp.minimum(position, s - 1)
    return jnp.take_along_axis(rows.reshape(b, m * s), index, axis=1)
