"""The optimizer's updates of a step: iterations x minibatches x microbatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.images import Images, ImageWindows
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import DROPOUT, OptState, Params, TrainState, purpose_key
from pspo_jax.config.schema import Config, extra_completions
from pspo_jax.config.strategies import LossConfig
from pspo_jax.distributed.mesh import BY_SLICE, WHOLE, num_slices, on_each_slice, sum_over_slices
from pspo_jax.losses.divergence import TokenDivergence
from pspo_jax.losses.policy_loss import (
    Denominators,
    LossMetrics,
    combine,
    compute_loss,
    denominators,
    metrics_of_uncomputed,
    rows_with_gradient,
    zero_metrics,
)
from pspo_jax.losses.ratios import effective_share, log_importance_weight, top_entropy
from pspo_jax.model.interface import Model
from pspo_jax.training.optimizer import float32, in_float32
from pspo_jax.training.scoring import (
    Microbatch,
    TokenUtilisation,
    fold_microbatches,
    is_single_part,
    make_microbatches,
    microbatch_log_probs,
    score,
)
from pspo_jax.training.splitting import config_of_slice, encoded, split_images, split_microbatches, split_minibatches

WeightsFn = Callable[[Params, Array | int], PyTree]
"""(trained weights, number of the microbatch) -> the weights that the model's functions take"""


Trained = tuple[Params, Float[Array, "B U D"] | None]
"""Trained weights and the embeddings of images, or the gradients in both; None = the encoder does not train."""


class DivergenceFn(Protocol):
    """The log-probs of a microbatch with the divergence of a teacher; see `distillation.microbatch_divergence`.

    It is a `jax.tree_util.Partial` of the teacher's arrays, so that slices can take them as an argument.
    """

    def __call__(
        self,
        weights: PyTree,
        part: Microbatch,
        temperature: Float[Array, ""],
        config: Config,
        entropy_gradient: bool,
        embeddings: Float[Array, "B U D"] | None,
        /,
    ) -> TokenDivergence: ...


class Teach(Protocol):
    """The teacher's part in an update, for the images to which a minibatch points; None = all prompts are text."""

    def __call__(self, images: Images | None, /) -> DivergenceFn: ...


class SamplerMismatch(NamedTuple):
    """How far the trainer's log-probs are from the sampler's, over fresh tokens.

    Before the first update of a step both stand for the same weights, and the mismatch is a matter of rounding.
    """

    tokens: Float[Array, ""]
    """Number of tokens in the loss that the current policy sampled."""
    difference_sum: Float[Array, ""]
    """Sum of |difference of log-prob|, in nats."""
    difference_max: Float[Array, ""]
    """Largest |difference of log-prob|, in nats."""
    ratio_sum: Float[Array, ""]
    """Sum of the ratio of the trainer's probability to that of the distribution drawn from."""
    ratio_min: Float[Array, ""]
    """Least such ratio; inf = there is no token."""
    ratio_max: Float[Array, ""]
    """Largest such ratio."""
    teacher_kl: Float[Array, ""] | None = None
    """Sum of log pi_old - log q against a teacher q, in nats; None = the loss has no divergence from one."""


GradientAndMetrics = tuple[Params, LossMetrics, SamplerMismatch, TokenUtilisation]
"""The gradient of a minibatch's loss in the trained weights, and what was seen on the way."""


class UpdateMetrics(NamedTuple):
    """The numbers of one optimizer update."""

    loss: LossMetrics
    mismatch: SamplerMismatch
    grad_norm: Float[Array, ""]
    """Global norm of the gradient before clipping."""
    useful: Float[Array, ""]
    """Share of the tokens computed that the loss needs; NaN = no token was computed."""
    completions: Float[Array, ""]
    """Number of completions that were computed."""
    applied: Float[Array, ""]
    """1, or 0 if the update was skipped because it was not finite."""
    rate_factor: Float[Array, ""] | None
    """Factor on the learning rate by the effective sample size; None = loss.ess_scaling is none."""


class Training(NamedTuple):
    """The part of the state that updates change."""

    params: Params
    opt_state: OptState
    skipped: Int[Array, ""]
    """Length of the current run of skipped updates."""
    done: Int[Array, ""]
    """Updates of this step that are done, skipped ones included."""


def optimize(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: Config,
    state: TrainState,
    rows: Rows,
    temperature: Float[Array, ""],
    images: Images | None = None,
    teach: Teach | None = None,
) -> tuple[Training, UpdateMetrics]:
    """num_iterations passes over the minibatches of `rows`; the metrics are stacked over updates.

    Args:
      images: the images to which the rows point; None = all prompts are text.
      teach: the part of a teacher in the loss; None = it has none.
    """
    o = config.loss
    minibatches = split_minibatches(rows, images, o.minibatches, config.rollout.group_size, extra_completions(config))
    drops = state.frozen is not None and config.lora.dropout > 0
    step_key = purpose_key(state.key, state.step, DROPOUT) if drops else None

    def update(before: Training, part: tuple[Rows, Images | None]) -> tuple[Training, UpdateMetrics]:
        minibatch, images = part
        weights = _weights_fn(state, None if step_key is None else jax.random.fold_in(step_key, before.done))
        now = merge_params(before.params, state.frozen)
        embeddings = encoded(model, now, images)
        if o.top_entropy < 1:
            _, entropy = score(model, now, minibatch, temperature, config, images=images, embeddings=embeddings)
            chosen = top_entropy(entropy, minibatch.mask, o.top_entropy)
            minibatch = dataclasses.replace(minibatch, top_entropy=chosen)
        # A single microbatch is computed whole, including its rows without a gradient.
        # A divergence has a gradient in all of them.
        whole = teach is not None or is_single_part(model, minibatch, config)
        computed = None if whole else rows_with_gradient(minibatch, o)
        total = denominators(rows, minibatch, o.minibatches, o.count_masked, computed)
        divergence = None if teach is None else teach(images)
        batch = minibatch, temperature, config, total, computed, images, embeddings, divergence
        found = loss_gradient(model, weights, before.params, *batch)
        completions = (minibatch.counted if computed is None else computed).sum().astype(jnp.float32)
        return apply_gradient(optimizer, before, *found, completions, rate_factor(minibatch, o))

    def iteration(before: Training, _: None) -> tuple[Training, UpdateMetrics]:
        return jax.lax.scan(update, before, minibatches)

    before = Training(state.params, state.opt_state, jnp.asarray(state.skipped, jnp.int32), jnp.int32(0))
    after, metrics = jax.lax.scan(iteration, before, None, length=o.num_iterations)
    return after, jax.tree.map(lambda x: x.reshape(-1), metrics)


def _weights_fn(state: TrainState, key: Key[Array, ""] | None) -> WeightsFn:
    """Trained and frozen weights together; with a key, adapters have dropout that differs between microbatches.

    It is a pytree of the frozen weights and the key, so that slices can take them as an argument.
    """
    return Partial(_merged, state.frozen, key)


def _merged(frozen: Params | None, key: Key[Array, ""] | None, params: Params, microbatch: Array | int) -> PyTree:
    return merge_params(params, frozen, None if key is None else jax.random.fold_in(key, microbatch))


def apply_gradient(
    optimizer: optax.GradientTransformation,
    before: Training,
    grads: Params,
    metrics: LossMetrics,
    mismatch: SamplerMismatch,
    tokens: TokenUtilisation,
    completions: Float[Array, ""],
    factor: Float[Array, ""] | None = None,
) -> tuple[Training, UpdateMetrics]:
    """One optimizer update. If loss or gradient is not finite, weights and optimizer state stay as they were.

    Args:
      factor: what the change of the weights is multiplied by; None = 1.
    """
    useful = tokens.needed / jnp.where(tokens.computed > 0, tokens.computed, jnp.nan)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
    changes, new_opt_state = in_float32(optimizer).update(grads, before.opt_state, before.params)
    if factor is not None:
        changes = jax.tree.map(lambda change: factor * change, changes)
    new_params = optax.apply_updates(before.params, changes)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (new_params, new_opt_state), (before.params, before.opt_state)
    )
    skipped = jnp.where(finite, 0, before.skipped + 1).astype(jnp.int32)
    after = Training(params, opt_state, skipped, before.done + 1)
    return after, UpdateMetrics(metrics, mismatch, norm, useful, completions, finite.astype(jnp.float32), factor)


def rate_factor(rows: Rows, config: LossConfig) -> Float[Array, ""] | None:
    """Factor on the learning rate of an update on these rows; None = it is as scheduled.

    VCPO (Huang et al., arXiv 2602.17616) multiplies the rate of AdamW by the square root of the effective sample size's
    share, relative to that of an on-policy batch, which is 1 here. The weights are pi_old / mu as of the beginning of
    the step, untruncated, over all rows of the update: those of fresh groups are 1.
    """
    if config.ess_scaling == "none":
        return None
    log_w = log_importance_weight(rows.old_log_probs, rows.behaviour_log_probs, rows.mask, config)
    share = effective_share(log_w, rows.mask, config)
    return jnp.sqrt(share) if config.ess_scaling == "sqrt" else share


def loss_gradient(
    model: Model,
    weights: WeightsFn,
    params: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    total: Denominators,
    computed: Bool[Array, "R"] | None = None,
    images: Images | None = None,
    embeddings: Float[Array, "B U D"] | None = None,
    divergence: DivergenceFn | None = None,
) -> GradientAndMetrics:
    """Gradient of a minibatch's loss in `params`, in float32, accumulated over microbatches; and its metrics.

    Images are encoded once, before the first microbatch. Where their encoder trains, microbatches add up the gradient
    in the embeddings too, which goes back through the encoder once, after the last microbatch.

    Args:
      weights: with several slices a `jax.tree_util.Partial` of the arrays that it needs.
      total: the denominators, which count all rows.
      computed: rows that are computed; they must include all of `rows_with_gradient`. None = all.
      images: the images to which the rows point; None = all prompts are text.
      embeddings: these images as `encoded` by the same weights; None = they are encoded here.
      divergence: gives the divergence from a teacher; None = the loss has no such term.
    """
    embeddings = encoded(model, weights(params, 0), images) if embeddings is None else embeddings
    others = zero_metrics() if computed is None else metrics_of_uncomputed(rows, computed)
    batch = params, rows, temperature, total, computed, images, embeddings, others, divergence
    slices = num_slices()
    if slices == 1:
        return _gradient_of_rows(model, weights, config, *batch)

    def of_slice(number: Int[Array, "1"], weights: WeightsFn, *batch: PyTree) -> GradientAndMetrics:
        def own_weights(params: Params, microbatch: Array | int) -> PyTree:
            return weights(params, microbatch * slices + number[0])  # no two microbatches share a key

        found = _gradient_of_rows(model, own_weights, config_of_slice(config, slices), *batch)
        return _over_slices(model, slices, *found)

    # Every slice adds up the gradients of its own rows, and they cross to the others once, after the last microbatch.
    specs = BY_SLICE, WHOLE, WHOLE, BY_SLICE, WHOLE, WHOLE, BY_SLICE, BY_SLICE, WHOLE, WHOLE, WHOLE
    return on_each_slice(of_slice, in_specs=specs, out_specs=WHOLE)(jnp.arange(slices), weights, *batch)


def _gradient_of_rows(
    model: Model,
    weights: WeightsFn,
    config: Config,
    params: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    total: Denominators,
    computed: Bool[Array, "R"] | None,
    images: Images | None,
    embeddings: Float[Array, "B U D"] | None,
    others: LossMetrics,
    divergence: DivergenceFn | None,
) -> GradientAndMetrics:
    """`loss_gradient` of the rows of all devices, or of those of a slice.

    Args:
      images: the images of all devices' rows, or a slice's part of them.
      embeddings: the embeddings of all images.
      others: metrics of the rows that are not computed.
      divergence: gives the divergence from a teacher; None = the loss has no such term.
    """
    microbatches = make_microbatches(model, rows, config, computed)
    trained = params, embeddings if model.trains_encoder else None

    def loss_fn(trained: Trained, part: Microbatch) -> tuple[Array, tuple[LossMetrics, SamplerMismatch]]:
        params, of_images = trained
        of_images = embeddings if of_images is None else of_images
        return microbatch_loss(
            model, weights(params, part.number), part, temperature, config, total, of_images, divergence
        )

    gradient = jax.grad(loss_fn, has_aux=True)
    if microbatches.is_single:
        grads, (metrics, mismatch) = gradient(trained, microbatches.take(0))
        grads = _through_encoder(model, weights, params, images, float32(grads))
        return grads, metrics, mismatch, microbatches.utilisation

    def add(
        carry: tuple[Trained, LossMetrics, SamplerMismatch], part: Microbatch
    ) -> tuple[Trained, LossMetrics, SamplerMismatch]:
        grads, metrics, mismatch = carry
        new_grads, (new_metrics, new_mismatch) = gradient(trained, part)
        return _add(grads, new_grads), combine(metrics, new_metrics), _combine_mismatches(mismatch, new_mismatch)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), trained)
    grads, metrics, mismatch = fold_microbatches(
        add, (zeros, others, _no_mismatch(divergence is not None)), microbatches
    )
    grads = _through_encoder(model, weights, params, images, grads)
    return grads, metrics, mismatch, microbatches.utilisation


def _over_slices(
    model: Model,
    slices: int,
    grads: Params,
    metrics: LossMetrics,
    mismatch: SamplerMismatch,
    tokens: TokenUtilisation,
) -> GradientAndMetrics:
    """The gradients and metrics of all slices together, inside `on_each_slice`."""
    every: tuple[LossMetrics, SamplerMismatch] = jax.lax.all_gather((metrics, mismatch), "slice")
    parts = [jax.tree.map(lambda x, i=i: x[i], every) for i in range(slices)]
    return (
        sum_over_slices(grads, model.axes),
        functools.reduce(combine, [part[0] for part in parts]),
        functools.reduce(_combine_mismatches, [part[1] for part in parts]),
        jax.lax.psum(tokens, "slice"),
    )


def _add(total: PyTree, new: PyTree) -> PyTree:
    """A sum of gradients, in the type of the total."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new)


def _through_encoder(model: Model, weights: WeightsFn, params: Params, images: Images | None, grads: Trained) -> Params:
    """The gradient in `params`, with that in the embeddings of images taken back through their encoder.

    The encoder runs again, some prompts at a time, so that only their activations exist at once.
    """
    of_params, of_embeddings = grads
    encode = model.encode_images
    if not isinstance(images, ImageWindows) or of_embeddings is None or encode is None:
        return of_params
    if images.delta.shape[0] < of_embeddings.shape[0]:  # Inside a slice, which takes its own images on.
        of_embeddings = jax.lax.psum_scatter(of_embeddings, "slice", tiled=True)

    def add(total: Params, part: tuple[ImageWindows, Array]) -> tuple[Params, None]:
        images, of_embeddings = part
        embeddings, pull = jax.vjp(lambda p: encode(weights(p, 0), images), params)
        return _add(total, pull(of_embeddings.astype(embeddings.dtype))[0]), None

    parts = split_images(images)
    found: Params = jax.lax.scan(add, of_params, (parts, split_microbatches(of_embeddings, parts.delta.shape[0])))[0]
    return found


def microbatch_loss(
    model: Model,
    weights: PyTree,
    part: Microbatch,
    temperature: Float[Array, ""],
    config: Config,
    total: Denominators,
    embeddings: Float[Array, "B U D"] | None = None,
    divergence: DivergenceFn | None = None,
) -> tuple[Float[Array, ""], tuple[LossMetrics, SamplerMismatch]]:
    """A microbatch's share of the minibatch's loss and metrics."""
    o = config.loss
    batch = part, temperature, config, o.entropy_coef > 0, embeddings
    if divergence is None:
        log_probs, entropy = microbatch_log_probs(model, weights, *batch)
        taught = teacher_log_probs = None
    else:
        log_probs, entropy, taught, teacher_log_probs = divergence(weights, *batch)
        taught = config.teacher.weight * taught
    loss, metrics = compute_loss(log_probs, entropy, part.rows, o, total, config.rollout.max_new_tokens, taught)
    return loss, (metrics, _mismatch(jax.lax.stop_gradient(log_probs), part.rows, teacher_log_probs))


def _mismatch(
    log_probs: Float[Array, "r T"], rows: Rows, teacher_log_probs: Float[Array, "r T"] | None
) -> SamplerMismatch:
    fresh = rows.mask & ~rows.stale
    difference = jnp.where(fresh, jnp.abs(log_probs - rows.behaviour_log_probs), 0)
    ratio = jnp.exp(log_probs - rows.sampling_log_probs)
    return SamplerMismatch(
        fresh.sum().astype(jnp.float32),
        difference.sum(),
        difference.max(),
        jnp.where(fresh, ratio, 0).sum(),
        jnp.where(fresh, ratio, jnp.inf).min(),
        jnp.where(fresh, ratio, 0).max(),
        None if teacher_log_probs is None else jnp.where(fresh, rows.old_log_probs - teacher_log_probs, 0).sum(),
    )


def _no_mismatch(taught: bool) -> SamplerMismatch:
    """The mismatch of no tokens, the identity of `_combine_mismatches`.

    Args:
      taught: whether the loss has a divergence from a teacher.
    """
    zero = jnp.float32(0)
    return SamplerMismatch(zero, zero, zero, zero, jnp.float32(jnp.inf), zero, zero if taught else None)


def _combine_mismatches(a: SamplerMismatch, b: SamplerMismatch) -> SamplerMismatch:
    return SamplerMismatch(
        a.tokens + b.tokens,
        a.difference_sum + b.difference_sum,
        jnp.maximum(a.difference_max, b.difference_max),
        a.ratio_sum + b.ratio_sum,
        jnp.minimum(a.ratio_min, b.ratio_min),
        jnp.maximum(a.ratio_max, b.ratio_max),
        None if a.teacher_kl is None or b.teacher_kl is None else a.teacher_kl + b.teacher_kl,
    )
