"""Every published loss as ratio x surrogate x aggregation x KL x extras, and its metrics.

Every denominator is counted over the whole batch before the first microbatch runs, so that minibatches, gradient
accumulation and sharding change nothing. Conventions are TRL 1.16's, to which the golden values in the tests belong.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.arrays.rows import LossInputs
from pspo_jax.config.strategies import Aggregation, LossConfig
from pspo_jax.losses.ratios import (
    importance_ratio,
    importance_weight,
    kl_estimate,
    log_importance_weight,
    low_divergence,
    surrogate,
)


class Denominators(NamedTuple):
    """What sums are divided by."""

    rows: Float[Array, ""]
    """Completions of the batch per minibatch."""
    tokens: Float[Array, ""]
    """Tokens of the batch per minibatch."""
    own_tokens: Float[Array, ""]
    """Tokens of this minibatch, at least 1."""
    bonus_tokens: Float[Array, ""]
    """Those of them that the entropy bonus is taken from."""
    own_rows: Float[Array, ""]
    """Completions of this minibatch."""


def denominators(
    batch: LossInputs, minibatch: LossInputs | None = None, minibatches: int = 1, count_masked: bool = True
) -> Denominators:
    """Denominators of a minibatch (None = the batch is one).

    Args:
      count_masked: whether rows without a token count in means over rows.
    """
    part = batch if minibatch is None else minibatch
    counted = batch.counted if count_masked else batch.mask.any(axis=1)
    bonus = part.mask if part.top_entropy is None else part.mask & part.top_entropy

    def at_least_one(x: Array) -> Array:
        return jnp.maximum(x.sum(), 1).astype(jnp.float32)

    return Denominators(
        at_least_one(counted) / minibatches,
        at_least_one(batch.mask) / minibatches,
        at_least_one(part.mask),
        at_least_one(bonus),
        at_least_one(part.counted),
    )


class LossMetrics(NamedTuple):
    """Sums and extremes over rows, such that microbatches combine by `combine`."""

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    low_min: Float[Array, ""]
    high_max: Float[Array, ""]
    gamma: Float[Array, ""]


def compute_loss(
    log_probs: Float[Array, "R T"],
    entropy: Float[Array, "R T"],
    inputs: LossInputs,
    config: LossConfig,
    total: Denominators,
    max_length: int,
) -> tuple[Float[Array, ""], LossMetrics]:
    """These rows' share of the minibatch's loss, and of its metrics; shares of microbatches add up.

    Per token: -v w s + kl_coef r w KL, with the selector's weight v, the importance weight w = pi_old / mu of an older
    behaviour policy, cut to its cap, the surrogate s, and the ratio r = pi / pi_old; without kl_unbiased the KL term
    has neither r nor w. The entropy bonus is a mean over tokens whatever the aggregation.

    Args:
      config: resolved: its surrogate, ratio, aggregation and clip range are not None.
    """
    mask, old = inputs.mask, inputs.old_log_probs
    # Masked tokens may hold anything; equal log-probs keep their ratio at 1, so no inf reaches the gradient.
    log_probs = jnp.where(mask, log_probs, jax.lax.stop_gradient(old))
    log_ratio = log_probs - old
    ratio = importance_ratio(log_ratio, mask, config)
    weighs = config.off_policy == "decoupled"
    log_w = log_importance_weight(old, inputs.behaviour_log_probs, mask, config) if weighs else None
    part = surrogate(ratio, log_probs, log_ratio, log_w, inputs.advantages, mask, config)
    losses = jnp.broadcast_to(-inputs.loss_weight[:, None] * part.value, mask.shape)
    if config.off_policy_threshold:
        losses *= low_divergence(
            inputs.behaviour_log_probs, log_probs, inputs.advantages, mask, config.off_policy_threshold
        )
    if inputs.top_entropy is not None:
        losses = jnp.where(inputs.top_entropy, losses, 0)
    weight = jnp.ones_like(losses) if log_w is None else importance_weight(log_w, config)
    # VESPO's own weight has the behaviour policy in it.
    if config.surrogate != "vespo":
        losses *= weight
    kl = jnp.zeros_like(losses)
    if inputs.reference_log_probs is not None:
        kl = kl_estimate(log_probs, inputs.reference_log_probs, config.kl_estimator)
        kl = kl * ratio * weight if config.kl_unbiased else kl
        losses = losses + config.kl_coef * kl
    loss = aggregate(losses, mask, config.aggregation, total, max_length)
    if config.entropy_coef:
        bonus = mask if inputs.top_entropy is None else mask & inputs.top_entropy
        loss -= config.entropy_coef * jnp.where(bonus, entropy, 0).sum() / total.bonus_tokens
    entropy = jax.lax.stop_gradient(entropy)

    def mean(x: Array) -> Array:
        return jnp.where(mask, x, 0).sum() / total.own_tokens

    def mean_cut(cut: Array) -> Array:
        """Share of tokens; of rows where there is one ratio a row."""
        whole_rows = (cut[:, 0] & inputs.counted).sum() / total.own_rows
        return whole_rows if cut.shape[1] == 1 else mean(cut)

    def of_rows(cut: Array) -> Array:
        return (cut & mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    return loss, LossMetrics(
        loss,
        mean(kl),
        mean(entropy),
        mean_cut(part.clipped_low),
        mean_cut(part.clipped_high),
        jnp.where(mask.any(axis=1), of_rows(part.clipped_low), jnp.inf).min(),
        of_rows(part.clipped_high).max(),
        jnp.where(inputs.counted, part.gamma, 0).sum() / total.own_rows,
    )


def aggregate(
    losses: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    aggregation: Aggregation | None,
    total: Denominators,
    max_length: int,
) -> Float[Array, ""]:
    """Token losses as one number.

    grpo: mean over rows of each row's token mean. dapo: sum / tokens of the batch per minibatch, so that every token of
    a batch weighs the same; bnpo: sum / tokens of the minibatch. dr_grpo: sum / (rows x max_length), a constant. luspo:
    mean over rows of their sums. token_sum: sum.
    """
    losses = jnp.where(mask, losses, 0.0)
    match aggregation:
        case "grpo":
            return (losses.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)).sum() / total.rows
        case "dapo":
            return losses.sum() / total.tokens
        case "bnpo":
            return losses.sum() / total.own_tokens
        case "dr_grpo":
            return losses.sum() / (total.rows * max_length)
        case "luspo":
            return losses.sum() / total.rows
        case "token_sum":
            return losses.sum()
    raise ValueError(f"aggregation={aggregation!r}: choose grpo, bnpo, dr_grpo, dapo, luspo or token_sum")


def zero_metrics() -> LossMetrics:
    """The identity of `combine`."""
    zero = jnp.float32(0)
    return LossMetrics(zero, zero, zero, zero, zero, jnp.float32(jnp.inf), zero, zero)


def combine(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two microbatches of one minibatch."""
    summed = jax.tree.map(jnp.add, a, b)
    return summed._replace(low_min=jnp.minimum(a.low_min, b.low_min), high_max=jnp.maximum(a.high_max, b.high_max))
