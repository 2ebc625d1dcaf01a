"""Optimizer updates on a batch of rows: iterations x minibatches x microbatches, and their metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.lora import merge_params
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import DROPOUT, Params, TrainState, purpose_key
from pspo_jax.config.schema import Config
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.losses.losses import Denominators, LossMetrics, combine, compute_loss, denominators, zero_metrics
from pspo_jax.losses.packing import bin_length, loss_lengths, packed_log_probs, row_lengths, rows_of_bins
from pspo_jax.losses.ratios import top_entropy
from pspo_jax.model.interface import Model
from pspo_jax.training.optimizer import float32, in_float32
from pspo_jax.training.scoring import (
    assign,
    bins_at_a_time,
    microbatches,
    score,
    shares_prompts,
    split_microbatches,
    split_minibatches,
    uses_packing,
)

Metrics = dict[str, Float[Array, ""]]


class SamplerMismatch(NamedTuple):
    """How far the trainer's log-probs are from the sampler's; exact before the first update of a step."""

    tokens: Float[Array, ""]
    difference_sum: Float[Array, ""]
    difference_max: Float[Array, ""]
    ratio_sum: Float[Array, ""]
    ratio_min: Float[Array, ""]
    ratio_max: Float[Array, ""]


class TokenUtilisation(NamedTuple):
    """Of an update's rows or bins."""

    needed: Int[Array, ""]
    """Hold a token that the loss needs."""
    computed: Int[Array, ""]


class UpdateMetrics(NamedTuple):
    """One optimizer update's numbers."""

    loss: LossMetrics
    gap: SamplerMismatch
    grad_norm: Float[Array, ""]
    useful: Float[Array, ""]
    """Share of the places computed that hold a token which the loss needs."""
    applied: Float[Array, ""]
    """1, or 0 if the update was skipped as not finite."""


def optimize(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: Config,
    state: TrainState,
    rows: Rows,
    temperature: Float[Array, ""],
) -> tuple[Params, Any, Int[Array, ""], UpdateMetrics]:
    """num_iterations passes over the minibatches; returns metrics stacked over updates."""
    o = config.loss
    minibatches = split_minibatches(rows, o.minibatches, config.rollout.group_size)
    drops = state.frozen is not None and config.lora.dropout > 0
    step_key = purpose_key(state.key, state.step, DROPOUT) if drops else None

    def update(carry: Any, minibatch: Rows) -> tuple[Any, UpdateMetrics]:
        params, opt_state, skipped, done = carry
        key = None if step_key is None else jax.random.fold_in(step_key, done)

        def weights(params: Params, microbatch: Array | int) -> Any:
            return merge_params(params, state.frozen, None if key is None else jax.random.fold_in(key, microbatch))

        if o.top_entropy < 1:
            _, entropy = score(model, merge_params(params, state.frozen), minibatch, temperature, config)
            chosen = top_entropy(entropy, minibatch.mask, o.top_entropy)
            minibatch = dataclasses.replace(minibatch, top_entropy=chosen)
        total = denominators(rows, minibatch, o.minibatches, o.count_masked)
        grads, metrics, gap, places = _gradient(model, weights, params, minibatch, temperature, config, total)
        useful = places.needed / jnp.maximum(places.computed, 1)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
        changes, new_opt_state = in_float32(optimizer).update(grads, opt_state, params)
        new_params = optax.apply_updates(params, changes)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new_params, new_opt_state), (params, opt_state)
        )
        skipped = jnp.where(finite, 0, skipped + 1).astype(jnp.int32)
        return (params, opt_state, skipped, done + 1), UpdateMetrics(
            metrics, gap, norm, useful, finite.astype(jnp.float32)
        )

    def iteration(carry: Any, _: None) -> tuple[Any, UpdateMetrics]:
        return jax.lax.scan(update, carry, minibatches)

    carry: Any = (state.params, state.opt_state, state.skipped, jnp.int32(0))
    (params, opt_state, skipped, _), metrics = jax.lax.scan(iteration, carry, None, length=o.num_iterations)
    return params, opt_state, skipped, jax.tree.map(lambda x: x.reshape(-1), metrics)


def _gradient(
    model: Model,
    weights: Callable[[Params, Array | int], Any],
    params: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    total: Denominators,
) -> tuple[Params, LossMetrics, SamplerMismatch, TokenUtilisation]:
    """Gradient of a minibatch's loss in float32, accumulated over microbatches.

    weights(params, microbatch) is what the policy's functions take.
    """

    packed = uses_packing(model, rows, config)

    def loss_fn(
        params: Params, part: Rows, microbatch: Array | int, leads: Bool[Array, "b M"] | None = None
    ) -> tuple[Array, tuple[LossMetrics, SamplerMismatch]]:
        return _loss(model, weights(params, microbatch), part, temperature, config, total, leads)

    grad_fn = jax.grad(loss_fn, has_aux=True)
    parts = microbatches(rows, config)
    places = TokenUtilisation(row_lengths(rows).sum(), jnp.int32(padded_places(rows)))
    if parts == 1 and not packed:
        grads, (metrics, gap) = grad_fn(params, rows, 0)
        return float32(grads), metrics, gap, places

    def accumulate(carry: Any, xs: tuple[Any, ...]) -> tuple[Any, None]:
        grads, metrics, gap = carry
        new_grads, (new_metrics, new_gap) = grad_fn(params, *xs)
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new_grads)
        return (grads, combine(metrics, new_metrics), _join_gaps(gap, new_gap)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    start = zeros, zero_metrics(), _no_gap()
    if packed:
        planned = assign(model, rows, loss_lengths(rows), config)
        bins = bins_at_a_time(rows.tokens.shape[0], config)

        def microbatch(i: Array, carry: Any) -> Any:
            ids, leads = (jax.lax.dynamic_slice_in_dim(x, i * bins, bins) for x in (planned.rows, planned.owns_prompt))
            return accumulate(carry, (rows_of_bins(rows, ids), i, leads))[0]

        needed = -(-planned.num_bins // bins)
        places = TokenUtilisation(planned.num_tokens, needed * bins * bin_length(rows))
        return *jax.lax.fori_loop(0, needed, microbatch, start), places
    carry, _ = jax.lax.scan(accumulate, start, (split_microbatches(rows, parts), jnp.arange(parts)))
    return *carry, places


def padded_places(rows: Rows) -> int:
    """Places of rows that are computed by themselves, prompts and completions at their longest as in `compact_rows`.

    A bin may be longer than such a row: its places are whole blocks of attention.
    """
    return rows.tokens.shape[0] * (rows.prompts.shape[1] + rows.tokens.shape[1])


def _loss(
    model: Model,
    weights: Any,
    rows: Rows,
    temperature: Array,
    config: Config,
    total: Denominators,
    leads: Bool[Array, "b M"] | None,
) -> tuple[Array, tuple[LossMetrics, SamplerMismatch]]:
    """Of rows that are computed in the bins of a plan, with its `leads`; None = each by itself."""
    o = config.loss
    bonus = o.entropy_coef > 0
    if leads is not None:
        shares = shares_prompts(model, config)
        found = packed_log_probs(model, weights, rows, leads, temperature, o.logits_mib, bonus, shares)
    else:
        found = completion_log_probs(
            model, weights, rows.prompts, rows.lengths, rows.tokens, temperature, o.logits_mib, bonus
        )
    log_probs, entropy = found
    loss, metrics = compute_loss(log_probs, entropy, rows, o, total, config.rollout.max_new_tokens)
    return loss, (metrics, _gap(jax.lax.stop_gradient(log_probs), rows))


def _gap(log_probs: Float[Array, "R T"], rows: Rows) -> SamplerMismatch:
    fresh = rows.mask & ~rows.stale[:, None]
    difference = jnp.where(fresh, jnp.abs(log_probs - rows.behaviour_log_probs), 0)
    ratio = jnp.exp(log_probs - rows.sampling_log_probs)
    return SamplerMismatch(
        fresh.sum().astype(jnp.float32),
        difference.sum(),
        difference.max(),
        jnp.where(fresh, ratio, 0).sum(),
        jnp.where(fresh, ratio, jnp.inf).min(),
        jnp.where(fresh, ratio, 0).max(),
    )


def _no_gap() -> SamplerMismatch:
    zero = jnp.float32(0)
    return SamplerMismatch(zero, zero, zero, zero, jnp.float32(jnp.inf), zero)


def _join_gaps(a: SamplerMismatch, b: SamplerMismatch) -> SamplerMismatch:
    return SamplerMismatch(
        a.tokens + b.tokens,
        a.difference_sum + b.difference_sum,
        jnp.maximum(a.difference_max, b.difference_max),
        a.ratio_sum + b.ratio_sum,
        jnp.minimum(a.ratio_min, b.ratio_min),
        jnp.maximum(a.ratio_max, b.ratio_max),
    )


def update_metrics(updates: UpdateMetrics, config: Config) -> Metrics:
    """TRL's names; means over the step's updates.

    The sampler's gap is that of the first update, before any change; NaN = all of its groups are of older policies.
    `kl` is left out without a reference, and where the KL is taken from the rewards: their round has measured it.
    """
    loss = updates.loss
    gap = jax.tree.map(lambda x: x[0], updates.gap)
    first = jax.tree.map(lambda x: jnp.where(gap.tokens > 0, x, jnp.nan), gap)
    metrics = {
        "loss": loss.loss.mean(),
        "entropy": loss.entropy.mean(),
        "grad_norm": updates.grad_norm.mean(),
        "update/useful_tokens": updates.useful.mean(),
        "clip_ratio/low_mean": loss.low.mean(),
        "clip_ratio/low_min": _finite(loss.low_min.min()),
        "clip_ratio/high_mean": loss.high.mean(),
        "clip_ratio/high_max": loss.high_max.max(),
        "clip_ratio/region_mean": (loss.low + loss.high).mean(),
        "sampling/sampling_logp_difference/mean": first.difference_sum / first.tokens,
        "sampling/sampling_logp_difference/max": first.difference_max,
        "sampling/importance_sampling_ratio/mean": first.ratio_sum / first.tokens,
        "sampling/importance_sampling_ratio/min": first.ratio_min,
        "sampling/importance_sampling_ratio/max": first.ratio_max,
    }
    if config.loss.kl_coef > 0 and config.loss.kl_in == "loss":
        metrics["kl"] = loss.kl.mean()
    if config.loss.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = loss.high.mean()
    if config.loss.surrogate == "vespo":
        metrics["vespo/phi_seq_mean"] = loss.gamma.mean()
    return metrics


def _finite(least: Float[Array, ""]) -> Float[Array, ""]:
    """A minimum over nothing is 0."""
    return jnp.where(jnp.isposinf(least), 0, least)
