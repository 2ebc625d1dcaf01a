"""A batch of groups as independent rows, how rows are dealt to minibatches and microbatches, and their log-probs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.lora import LoraParams, merge_params
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import TrainState
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import constrain, microbatch_size
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.losses.packing import (
    BinAssignment,
    assign_bins,
    assign_shared_bins,
    bin_length,
    loss_lengths,
    packed_log_probs,
    rows_of_bins,
)
from pspo_jax.model.interface import Model
from pspo_jax.replay import Groups

PACK_FROM_TOKENS = 256
"""Completions that may be so long are packed, unless the config says otherwise."""


FEWEST_BINS = 8
"""Bins of packed rows that are computed together at least, where the config does not bound them: products of fewer rows
are slow."""


def rows_of(
    groups: Groups, step: Int[Array, ""], config: Config, sampling_log_probs: Float[Array, "B G T"] | None = None
) -> Rows:
    """Groups as rows, the old policy's log-probs those of the behaviour policy for now."""
    b, g = groups.rewards.shape

    def per_prompt(x: Array) -> Array:
        return jnp.repeat(x, g, axis=0)

    def flat(x: Array) -> Array:
        return x.reshape(b * g, *x.shape[2:])

    mask = groups.mask & groups.ended[..., None] if config.loss.mask_truncated else groups.mask
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
        stale=per_prompt(stale_groups(groups, step)),
        sampling_log_probs=flat(groups.log_probs if sampling_log_probs is None else sampling_log_probs),
    )


def stale_groups(groups: Groups, step: Int[Array, ""]) -> Bool[Array, "B"]:
    """Groups in the batch that an older policy sampled."""
    return groups.counted & (groups.step < step)


def score(
    model: Model, weights: Any, rows: Rows, temperature: Float[Array, ""], config: Config
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probs and entropies of all rows under `weights`, a microbatch at a time, without gradients.

    Outside the mask they may hold anything.
    """
    if uses_packing(model, rows, config):
        found = score_packed(model, weights, rows, loss_lengths(rows), temperature, config)
        return jax.lax.stop_gradient(found)

    def one(part: Rows) -> tuple[Array, Array]:
        return completion_log_probs(
            model, weights, part.prompts, part.lengths, part.tokens, temperature, config.loss.logits_mib
        )

    found = jax.lax.map(one, split_microbatches(rows, microbatches(rows, config)))
    return jax.lax.stop_gradient(jax.tree.map(merge_microbatches, found))


def score_some(
    model: Model,
    weights: Any,
    rows: Rows,
    wanted: Bool[Array, "B"],
    temperature: Float[Array, ""],
    config: Config,
) -> Float[Array, "R T"]:
    """Log-probs of the wanted groups' rows under `weights`; `rows.old_log_probs` for the others, which cost nothing.

    Wanted groups are gathered in front, and as many microbatches run as hold any.
    """
    groups = wanted.shape[0]
    if uses_packing(model, rows, config):
        stale = jnp.repeat(wanted, rows.tokens.shape[0] // groups)
        log_probs, _ = score_packed(model, weights, rows, jnp.where(stale, loss_lengths(rows), 0), temperature, config)
        return jax.lax.stop_gradient(jnp.where(stale[:, None], log_probs, rows.old_log_probs))
    order = jnp.argsort(~wanted, stable=True)
    group_size = rows.tokens.shape[0] // groups
    index = (order[:, None] * group_size + jnp.arange(group_size)).reshape(-1)
    parts = microbatches(rows, config)
    size = rows.tokens.shape[0] // parts
    in_front = jax.tree.map(lambda x: x[index].reshape(parts, size, *x.shape[1:]), rows)

    def one(i: Array, found: Array) -> Array:
        part = jax.tree.map(lambda x: constrain(x[i], "rows", *[None] * (x.ndim - 2)), in_front)
        return found.at[i].set(
            completion_log_probs(
                model, weights, part.prompts, part.lengths, part.tokens, temperature, config.loss.logits_mib
            )[0]
        )

    needed = -(-wanted.sum() * group_size // size)
    found = jax.lax.fori_loop(0, needed, one, in_front.old_log_probs)
    back = jnp.zeros_like(index).at[index].set(jnp.arange(index.shape[0]))
    found = found.reshape(rows.tokens.shape)[back]
    return jax.lax.stop_gradient(jnp.where(jnp.repeat(wanted, group_size)[:, None], found, rows.old_log_probs))


def uses_packing(model: Model, rows: Rows, config: Config) -> bool:
    """Whether the rows are computed in bins; see `packing`.

    Raises:
      ValueError: loss.packing=true for a policy that cannot.
    """
    wanted = config.loss.packing
    if wanted and not model.packs:
        raise ValueError("loss.packing=true: this policy's `hidden` takes no packed rows; leave it out, or false")
    return model.packs and packs_lengths(rows.tokens.shape[0], rows.tokens.shape[1], config)


def packs_lengths(rows: int, longest: int, config: Config) -> bool:
    """Whether so many rows are computed in bins.

    Args:
      longest: places of a completion, T.
    """
    wanted = config.loss.packing
    several = microbatch_size(rows, config.loss.microbatch_rows) < rows
    return several and longest >= PACK_FROM_TOKENS if wanted is None else wanted


def shares_prompts(model: Model, config: Config) -> bool:
    """Whether packed rows may share their prompt.

    Raises:
      ValueError: loss.share_prompts=true for a policy that cannot.
    """
    wanted = config.loss.share_prompts
    if wanted and not model.shares:
        raise ValueError("loss.share_prompts=true: this policy's `hidden` cannot; leave it out, or false")
    return model.shares and wanted is not False


def assign(model: Model, rows: Rows, answers: Int[Array, "R"], config: Config) -> BinAssignment:
    """Bins for the rows with answers, as many as there are rows."""
    r = rows.tokens.shape[0]
    if shares_prompts(model, config):
        return assign_shared_bins(rows.lengths, answers, rows.group, bin_length(rows), r)
    return assign_bins(rows.lengths, answers, jnp.arange(r), bin_length(rows), r)


def score_packed(
    model: Model, weights: Any, rows: Rows, answers: Int[Array, "R"], temperature: Float[Array, ""], config: Config
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probs and entropies of the rows with answers, in bins; 0 for the others."""
    bins = bins_at_a_time(rows.tokens.shape[0], config)
    planned = assign(model, rows, answers, config)

    def one(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, owns_prompt = (
            jax.lax.dynamic_slice_in_dim(x, i * bins, bins) for x in (planned.rows, planned.owns_prompt)
        )
        part = rows_of_bins(rows, ids)
        new = packed_log_probs(
            model,
            weights,
            part,
            owns_prompt,
            temperature,
            config.loss.logits_mib,
            shares=shares_prompts(model, config),
        )
        return tuple(x.at[ids.reshape(-1)].set(y, mode="drop") for x, y in zip(found, new, strict=True))  # type: ignore

    zeros = jnp.zeros(rows.tokens.shape)
    return jax.lax.fori_loop(0, -(-planned.num_bins // bins), one, (zeros, zeros))


def with_log_probs(
    model: Model,
    state: TrainState,
    rows: Rows,
    stale: Bool[Array, "B"] | None,
    temperature: Float[Array, ""],
    config: Config,
) -> Rows:
    """`rows` with the log-probs that do not change during the step.

    Args:
      stale: groups that an older policy sampled; None = there are none.
    """
    o = config.loss
    if o.old_log_probs == "trainer":
        rows = dataclasses.replace(rows, old_log_probs=score(model, state.weights, rows, temperature, config)[0])
    elif stale is not None and o.off_policy != "coupled":
        found = score_some(model, state.weights, rows, stale, temperature, config)
        rows = dataclasses.replace(rows, old_log_probs=found)
    if o.kl_coef > 0 and o.kl_in == "loss":
        found = score(model, reference_weights(state), rows, temperature, config)[0]
        rows = dataclasses.replace(rows, reference_log_probs=found)
    return rows


def reference_weights(state: TrainState) -> Any:
    """The KL reference, the policy that RL begins from: its own weights, or the frozen base of untrained adapters."""
    if state.reference is None:
        return LoraParams(state.frozen, None)
    return merge_params(state.reference, state.frozen)


def microbatches(rows: Rows, config: Config) -> int:
    """Parts that the rows are computed in."""
    n = rows.tokens.shape[0]
    return n // microbatch_size(n, config.loss.microbatch_rows)


def bins_at_a_time(rows: int, config: Config) -> int:
    """How many bins of so many packed rows are computed together; bins that hold no row are left out.

    Where loss.microbatch_rows allows all rows at once, an eighth of them is taken: there are as many bins as rows,
    and empty ones can only be left out by whole microbatches.
    """
    at_most = config.loss.microbatch_rows
    return microbatch_size(rows, at_most if 0 < at_most < rows else max(rows // 8, FEWEST_BINS))


def split_microbatches(rows: Any, parts: int) -> Any:
    """[R, ...] -> [parts, R / parts, ...], dealt like cards, so that every part is spread over all devices."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def merge_microbatches(x: Array) -> Array:
    """The inverse of `deal` for one array."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def split_minibatches(rows: Rows, parts: int, group_size: int) -> Rows:
    """`deal` that keeps the rows of a prompt together."""

    def one(x: Array) -> Array:
        groups = x.reshape(-1, group_size, *x.shape[1:])
        return split_microbatches(groups, parts).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(one, rows)
