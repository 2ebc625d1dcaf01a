"""A batch of groups as rows, the microbatches that rows are computed in, and their log-probs.

Every pass over rows, with a gradient (`update`) or without (`score`), is `fold_microbatches` over a `Microbatches`.

Letters: B groups, G completions per group, R = B G rows, P prompt length, T completion length, r rows of a microbatch;
b bins of a microbatch, M rows per bin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.rows import RowImages, Rows
from pspo_jax.arrays.split_params import SplitParams, merge_params
from pspo_jax.arrays.state import Params, TrainState
from pspo_jax.config.schema import Config, logits_mib
from pspo_jax.config.unread_fields import trains_on_older_policies
from pspo_jax.distributed.mesh import (
    BY_SLICE,
    UPDATE_ROWS,
    WHOLE,
    constrain,
    microbatch_size,
    num_slices,
    on_each_slice,
    size_along,
    split_axes,
    whole_to_index,
)
from pspo_jax.losses.log_probs import compact_images, completion_log_probs
from pspo_jax.losses.packing import (
    BinAssignment,
    BinShape,
    assign_bins,
    assign_shared_bins,
    choose_bin_shape,
    loss_lengths,
    packed_log_probs,
    row_lengths,
    take_rows,
)
from pspo_jax.model.interface import Model
from pspo_jax.replay import Groups
from pspo_jax.training.splitting import config_of_slice, encoded, merge_microbatches, split_microbatches

PACK_FROM_TOKENS = 256
"""Completions that may be this long are packed, unless the config says otherwise."""
FEWEST_BINS = 8
"""Least number of completions whose memory a microbatch of bins may take where the config sets no bound, since products
of fewer rows are slow."""
Carry = TypeVar("Carry")


def rows_of(
    groups: Groups, step: Int[Array, ""], config: Config, sampling_log_probs: Float[Array, "B G T"] | None = None
) -> Rows:
    """Groups as rows. The old policy's log-probs are those of the behaviour policy until `with_log_probs` changes them.

    Args:
      step: the current step; groups of earlier ones are stale.
      sampling_log_probs: log-probs under the distribution drawn from; None = those of the behaviour policy.
    """
    b, g = groups.rewards.shape

    def per_prompt(x: Array) -> Array:
        return jnp.repeat(x, g, axis=0)

    def flat(x: Array) -> Array:
        return x.reshape(b * g, *x.shape[2:])

    mask = groups.mask & groups.ended[..., None] if config.loss.mask_truncated else groups.mask
    images = groups.prompts.images
    ages = token_ages(groups, step, config)
    interpolates = config.loss.old_log_probs == "interpolated"
    return Rows(
        group=per_prompt(jnp.arange(b)),
        prompts=per_prompt(groups.prompts.tokens),
        lengths=per_prompt(groups.prompts.lengths),
        tokens=flat(groups.tokens),
        mask=flat(mask),
        counted=per_prompt(groups.counted),
        advantages=flat(groups.advantages),
        loss_weight=per_prompt(groups.prompts.loss_weight),
        old_log_probs=flat(groups.log_probs),
        behaviour_log_probs=flat(groups.log_probs),
        stale=flat(ages > 0),
        sampling_log_probs=flat(groups.log_probs if sampling_log_probs is None else sampling_log_probs),
        # A token of age n is n updates older than the old policy, and n + 1 older than the policy that these train.
        interpolation=flat(ages / (ages + 1)) if interpolates else None,
        images=None
        if images is None
        else RowImages(
            prompt=per_prompt(jnp.arange(b)),
            unit=per_prompt(images.unit),
            positions=per_prompt(images.positions),
            delta=per_prompt(images.delta),
        ),
    )


def rows_of_batch(
    groups: Groups,
    added: Groups | None,
    step: Int[Array, ""],
    config: Config,
    sampling_log_probs: Float[Array, "B G T"] | None = None,
) -> Rows:
    """`rows_of` a batch and, behind them, of the completions that a replay has added; None = it has added none."""
    rows = rows_of(groups, step, config, sampling_log_probs)
    if added is None:
        return rows
    more = rows_of(added, step, config)
    # Groups of one completion share no prompt with others: they are numbered on behind those of the batch.
    b = groups.counted.shape[0]
    more = dataclasses.replace(more, group=more.group + b)
    if more.images is not None:
        more = dataclasses.replace(more, images=dataclasses.replace(more.images, prompt=more.images.prompt + b))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows, more)


def token_ages(groups: Groups, step: Int[Array, ""], config: Config) -> Int[Array, "B G T"]:
    """Steps since each token was drawn, 0 = by the current policy; 0 for groups that are not in the batch."""
    if groups.versions is None:
        age = (step - groups.step)[:, None]
    else:
        segment = jnp.arange(groups.tokens.shape[2]) // (config.rollout.budget or 1)
        version = groups.versions[:, segment]
        age = jnp.where(version >= 0, step - version, 0)
    return jnp.broadcast_to(jnp.where(groups.counted[:, None], age, 0)[:, None], groups.tokens.shape)


class TokenUtilisation(NamedTuple):
    """How many of the tokens that are computed are needed."""

    needed: Int[Array, ""]
    """Number of tokens that the loss needs."""
    computed: Int[Array, ""]
    """Number of tokens that are computed, padding included."""


class Microbatch(NamedTuple):
    """Rows that are computed together."""

    number: Int[Array, ""] | int
    """Number of the microbatch, from 0."""
    rows: Rows
    """The rows, r of them."""
    owns_prompt: Bool[Array, "b M"] | None
    """Whether each row of a bin holds its own prompt; None = rows are not packed."""
    indices: Int[Array, "r"] | None
    """Index of each row among all rows, R = no row; None = the microbatch is a fixed part of all rows."""
    shape: BinShape | None = None
    """The shape of the bins; None = rows are not packed."""


class Microbatches(NamedTuple):
    """Rows in parts of equal shape, which are computed one after another."""

    num_parts: Int[Array, ""] | int
    """Number of parts that hold a row; an int where it is known at compile time."""
    take: Callable[[Array | int], Microbatch]
    """number -> that microbatch"""
    put: Callable[[Array, Microbatch, Array], Array]
    """(results of all rows, a microbatch, its results [r, T]) -> results of all rows"""
    merge: Callable[[Array], Array]
    """results of all rows as `put` keeps them -> [R, T]"""
    shape: tuple[int, ...]
    """Shape of the results of all rows as `put` keeps them."""
    utilisation: TokenUtilisation

    @property
    def is_single(self) -> bool:
        """Whether all rows are known to be one part."""
        return isinstance(self.num_parts, int) and self.num_parts == 1


def fold_microbatches(step: Callable[[Carry, Microbatch], Carry], carry: Carry, microbatches: Microbatches) -> Carry:
    """`carry` after `step` has seen every microbatch in turn: the one loop over microbatches."""
    if microbatches.is_single:
        return step(carry, microbatches.take(0))
    return jax.lax.fori_loop(0, microbatches.num_parts, lambda i, carry: step(carry, microbatches.take(i)), carry)


def make_microbatches(model: Model, rows: Rows, config: Config, wanted: Bool[Array, "R"] | None = None) -> Microbatches:
    """The microbatches of these rows: bins where rows are packed, else rows as they are.

    Args:
      wanted: rows that are needed; there are only as many microbatches as these fill. None = all.
    """
    if uses_packing(model, rows, config):
        return _packed(model, rows, wanted, config)
    parts = num_microbatches(rows, config)
    return _split(rows, parts) if wanted is None else _split_wanted(rows, wanted, parts)


def _split(rows: Rows, parts: int) -> Microbatches:
    """All rows, dealt to parts like cards."""
    split = split_microbatches(rows, parts)
    return Microbatches(
        num_parts=parts,
        take=lambda i: Microbatch(i, jax.tree.map(lambda x: x[i], split), None, None),
        put=_put_part,
        merge=merge_microbatches,
        shape=split.tokens.shape,
        utilisation=TokenUtilisation(row_lengths(rows).sum(), jnp.int32(padded_tokens(rows))),
    )


def _split_wanted(rows: Rows, wanted: Bool[Array, "R"], parts: int) -> Microbatches:
    """The wanted rows, in turn to as few parts as hold them; if all are wanted, the parts are those of `_split`."""
    r = rows.tokens.shape[0]
    size = r // parts
    needed = -(-wanted.sum() // size)
    number = jnp.cumsum(wanted) - 1
    place = number % jnp.maximum(needed, 1) * size + number // jnp.maximum(needed, 1)
    ids = jnp.full(r, r, jnp.int32).at[jnp.where(wanted, place, r)].set(jnp.arange(r), mode="drop")
    dealt = jax.tree.map(lambda x: x.reshape(parts, size, *x.shape[1:]), take_rows(rows, ids))
    ids = ids.reshape(parts, size)

    def take(i: Array | int) -> Microbatch:
        part = jax.tree.map(lambda x: constrain(x[i], "rows", *[None] * (x.ndim - 2)), dealt)
        return Microbatch(i, part, None, ids[i])

    return Microbatches(
        num_parts=needed,
        take=take,
        put=_put_rows,
        merge=lambda x: x,
        shape=rows.tokens.shape,
        utilisation=TokenUtilisation(
            jnp.where(wanted, row_lengths(rows), 0).sum(), needed * (padded_tokens(rows) // parts)
        ),
    )


def _put_part(found: Array, part: Microbatch, new: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(found, new, part.number, 0)


def _put_rows(found: Array, part: Microbatch, new: Array) -> Array:
    return whole_to_index(found).at[part.indices].set(whole_to_index(new), mode="drop")


def _packed(model: Model, rows: Rows, wanted: Bool[Array, "R"] | None, config: Config) -> Microbatches:
    """The wanted rows in bins, and as many microbatches of bins as hold any of them."""
    lengths = loss_lengths(rows)
    lengths = lengths if wanted is None else jnp.where(wanted, lengths, 0)
    assignment = assign(model, rows, lengths, config)
    shape = shape_of_bins(model, rows, config)

    def take(i: Array | int) -> Microbatch:
        ids, owns_prompt = (
            jax.lax.dynamic_slice_in_dim(x, i * shape.at_a_time, shape.at_a_time)
            for x in (assignment.rows, assignment.owns_prompt)
        )
        return Microbatch(i, take_rows(rows, ids.reshape(-1)), owns_prompt, ids.reshape(-1), shape)

    num_parts = -(-assignment.num_bins // shape.at_a_time)
    return Microbatches(
        num_parts=num_parts,
        take=take,
        put=_put_rows,
        merge=lambda x: x,
        shape=rows.tokens.shape,
        utilisation=TokenUtilisation(assignment.num_tokens, num_parts * shape.at_a_time * shape.length),
    )


def padded_tokens(rows: Rows) -> int:
    """Tokens that are computed where each row stands by itself, with its prompt and completion at their longest.

    A bin may be longer than such a row: its length is a whole number of blocks of attention.
    """
    return rows.tokens.shape[0] * (rows.prompts.shape[1] + rows.tokens.shape[1])


def microbatch_log_probs(
    model: Model,
    weights: PyTree,
    part: Microbatch,
    temperature: Float[Array, ""],
    config: Config,
    entropy_gradient: bool = False,
    embeddings: Float[Array, "B U D"] | None = None,
) -> tuple[Float[Array, "r T"], Float[Array, "r T"]]:
    """Log-probs and entropies of a microbatch's completions, in nats; they may hold anything outside the mask.

    Args:
      weights: what the model's functions take, `merge_params` of trained and frozen weights.
      entropy_gradient: whether the entropies have a gradient.
      embeddings: `encoded` images of the prompts; None = all prompts are text.
    """
    rows, chunk_mib = part.rows, logits_mib(config)
    if part.owns_prompt is None or part.shape is None:
        images = compact_images(rows.images, embeddings, rows.tokens.shape[1])
        return completion_log_probs(
            model, weights, rows.prompts, rows.lengths, rows.tokens, temperature, chunk_mib, entropy_gradient, images
        )
    return packed_log_probs(
        model,
        weights,
        rows,
        part.owns_prompt,
        part.shape,
        temperature,
        chunk_mib,
        entropy_gradient,
        shares_prompts(model, config),
        embeddings,
    )


def score(
    model: Model,
    weights: PyTree,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    wanted: Bool[Array, "R"] | None = None,
    images: Images | None = None,
    embeddings: Float[Array, "B U D"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probs and entropies of all rows under `weights`, a microbatch at a time, without gradients.

    Outside the mask, and for rows that are not wanted, they may hold anything.

    Args:
      wanted: rows that are needed; the others cost nothing. None = all.
      images: the images to which the rows point; None = all prompts are text.
      embeddings: these images as `encoded` by the same weights; None = they are encoded here.
    """
    embeddings = encoded(model, weights, images) if embeddings is None else embeddings
    slices = num_slices()
    if slices > 1:
        # Each slice makes microbatches of its own rows, so that no row crosses to another.
        part = config_of_slice(config, slices)
        return on_each_slice(
            lambda weights, rows, temperature, wanted, embeddings: _score_rows(
                model, weights, rows, temperature, part, wanted, embeddings
            ),
            in_specs=(WHOLE, BY_SLICE, WHOLE, BY_SLICE, WHOLE),
            out_specs=BY_SLICE,
        )(weights, rows, temperature, wanted, embeddings)
    return _score_rows(model, weights, rows, temperature, config, wanted, embeddings)


def _score_rows(
    model: Model,
    weights: PyTree,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    wanted: Bool[Array, "R"] | None,
    embeddings: Float[Array, "B U D"] | None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """`score` of the rows of all devices, or of those of a slice."""
    microbatches = make_microbatches(model, rows, config, wanted)

    def step(found: tuple[Array, Array], part: Microbatch) -> tuple[Array, Array]:
        log_probs, entropy = microbatch_log_probs(model, weights, part, temperature, config, embeddings=embeddings)
        return microbatches.put(found[0], part, log_probs), microbatches.put(found[1], part, entropy)

    zeros = jnp.zeros(microbatches.shape)
    log_probs, entropy = fold_microbatches(step, (zeros, zeros), microbatches)
    return jax.lax.stop_gradient((microbatches.merge(log_probs), microbatches.merge(entropy)))


def score_some(
    model: Model,
    weights: PyTree,
    rows: Rows,
    wanted: Bool[Array, "R"],
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> Float[Array, "R T"]:
    """Log-probs of the wanted rows under `weights`; `rows.old_log_probs` for the others, which cost nothing."""
    found = score(model, weights, rows, temperature, config, wanted, images)[0]
    return jax.lax.stop_gradient(jnp.where(wanted[:, None], found, rows.old_log_probs))


def with_log_probs(
    model: Model,
    state: TrainState,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> Rows:
    """`rows` with the old and the reference policy's log-probs, which do not change during the step."""
    o = config.loss
    if o.old_log_probs == "trainer":
        found = score(model, state.weights, rows, temperature, config, images=images)[0]
        rows = dataclasses.replace(rows, old_log_probs=found)
    elif trains_on_older_policies(config) and o.off_policy != "coupled" and o.old_log_probs != "interpolated":
        stale = rows.stale & rows.mask
        found = score_some(model, state.weights, rows, stale.any(axis=1), temperature, config, images)
        # A token that the current policy drew keeps the sampler's: its importance weight is exactly 1.
        rows = dataclasses.replace(rows, old_log_probs=jnp.where(stale, found, rows.old_log_probs))
    if o.kl_coef > 0 and o.kl_in == "loss":
        found = score(model, reference_weights(state), rows, temperature, config, images=images)[0]
        rows = dataclasses.replace(rows, reference_log_probs=found)
    return rows


def reference_weights(state: TrainState) -> Params:
    """The weights of the KL term's reference policy: a copy of its own, or the frozen base of untrained adapters."""
    if state.reference is None:
        return SplitParams(state.frozen, None)
    return merge_params(state.reference, state.frozen)


def uses_packing(model: Model, rows: Rows, config: Config) -> bool:
    """Whether these rows are computed in bins; see `losses.packing`.

    Raises:
      ValueError: loss.packing=true for a model that cannot.
    """
    wanted = config.loss.packing
    if wanted and not model.packs:
        raise ValueError("loss.packing=true: this model's `hidden` takes no packed rows; leave it out, or false")
    return model.packs and packs_lengths(rows.tokens.shape[0], rows.tokens.shape[1], config)


def packs_lengths(rows: int, longest: int, config: Config) -> bool:
    """Whether this many rows are computed in bins.

    Args:
      longest: T, the padded length of a completion.
    """
    wanted = config.loss.packing
    several = microbatch_size(rows, config.loss.microbatch_rows) < rows
    return several and longest >= PACK_FROM_TOKENS if wanted is None else wanted


def shares_prompts(model: Model, config: Config) -> bool:
    """Whether packed rows may share their prompt.

    Raises:
      ValueError: loss.share_prompts=true for a model that cannot.
    """
    wanted = config.loss.share_prompts
    if wanted and not model.shares:
        raise ValueError("loss.share_prompts=true: this model's `hidden` cannot; leave it out, or false")
    return model.shares and wanted is not False


def assign(model: Model, rows: Rows, completion_lengths: Int[Array, "R"], config: Config) -> BinAssignment:
    """The bins of rows with a completion; there are as many bins as rows, rounded up to whole microbatches.

    Args:
      completion_lengths: tokens of each completion that are needed; 0 = the row goes into no bin.
    """
    r = rows.tokens.shape[0]
    shape = shape_of_bins(model, rows, config)
    bins = -(-r // shape.at_a_time) * shape.at_a_time
    if shares_prompts(model, config):
        return assign_shared_bins(rows.lengths, completion_lengths, rows.group, shape.length, bins, shape.rows)
    return assign_bins(rows.lengths, completion_lengths, jnp.arange(r), shape.length, bins, shape.rows)


def shape_of_bins(model: Model, rows: Rows, config: Config) -> BinShape:
    """`bin_shape` of rows of these shapes."""
    return bin_shape(rows.tokens.shape[0], rows.prompts.shape[1], rows.tokens.shape[1], model, config)


def bin_shape(rows: int, prompt: int, completion: int, model: Model, config: Config) -> BinShape:
    """The shape of the bins that a batch of `rows` rows is packed into.

    A microbatch takes no more memory than loss.microbatch_rows rows of the greatest length. Where that allows all
    rows at once, an eighth of them is taken instead, since empty bins can only be left out by whole microbatches.
    loss.microbatch_tokens may allow less.

    Args:
      prompt: P, the longest prompt in tokens.
      completion: T, the longest completion in tokens.
    """
    at_most = config.loss.microbatch_rows
    at_once = microbatch_size(rows, at_most if 0 < at_most < rows else max(rows // 8, FEWEST_BINS))
    shards = size_along(split_axes(), UPDATE_ROWS)
    shares, enough = shares_prompts(model, config), config.loss.microbatch_tokens
    return choose_bin_shape(prompt, completion, config.rollout.group_size, at_once, shards, shares, enough)


def num_microbatches(rows: Rows, config: Config) -> int:
    """Number of parts that rows are computed in where they are not packed."""
    n = rows.tokens.shape[0]
    return n // microbatch_size(n, config.loss.microbatch_rows)


def is_single_part(model: Model, rows: Rows, config: Config) -> bool:
    """Whether all rows are one microbatch of padded rows."""
    return not uses_packing(model, rows, config) and num_microbatches(rows, config) == 1
