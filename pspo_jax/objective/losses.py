"""The clipped surrogate, its KL term, and how token losses become one number.

Every denominator is counted over the whole minibatch before the first microbatch runs, so that gradient accumulation
and sharding change nothing. Conventions are TRL 1.16's, to which the golden values in the tests belong.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.config import Aggregation, ObjectiveConfig


class Denominators(NamedTuple):
    """What a minibatch's sums are divided by."""

    rows: Float[Array, ""]
    """Completions, fully masked ones included."""
    tokens: Float[Array, ""]
    """Unmasked tokens, at least 1."""


def denominators(mask: Bool[Array, "R T"]) -> Denominators:
    """Denominators of the minibatch that `mask` covers whole."""
    return Denominators(jnp.float32(mask.shape[0]), jnp.maximum(mask.sum(), 1).astype(jnp.float32))


class TokenLosses(NamedTuple):
    loss: Float[Array, "R T"]
    kl: Float[Array, "R T"]
    """k3 estimate of KL(policy || reference), before its coefficient; 0 without a reference."""
    clipped_low: Bool[Array, "R T"]
    """Ratio under 1 - clip_low where that stops the gradient (negative advantage)."""
    clipped_high: Bool[Array, "R T"]
    """Ratio over 1 + clip_high where that stops the gradient (positive advantage)."""


def token_losses(
    log_probs: Float[Array, "R T"],
    old_log_probs: Float[Array, "R T"],
    advantages: Float[Array, "R"],
    config: ObjectiveConfig,
    loss_weight: Float[Array, "R"] | float = 1.0,
    reference_log_probs: Float[Array, "R T"] | None = None,
) -> TokenLosses:
    """-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL, per token.

    r is exp(log_probs - old_log_probs). The selector's importance weight w scales the surrogate and not the KL.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    adv = advantages[:, None]
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    surrogate = jnp.minimum(ratio * adv, clipped * adv)
    weight = jnp.broadcast_to(jnp.asarray(loss_weight, jnp.float32), advantages.shape)[:, None]
    loss = -weight * surrogate
    kl = jnp.zeros_like(loss)
    if reference_log_probs is not None:
        delta = reference_log_probs - log_probs
        kl = jnp.exp(delta) - delta - 1
        if config.kl_unbiased:
            kl = kl * ratio
        loss = loss + config.kl_coef * kl
    return TokenLosses(
        loss,
        kl,
        (ratio < 1 - config.clip_low) & (adv < 0),
        (ratio > 1 + config.clip_high) & (adv > 0),
    )


def policy_loss(
    losses: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    aggregation: Aggregation | None,
    total: Denominators,
    max_length: int,
) -> Float[Array, ""]:
    """These rows' share of the minibatch's loss; shares of microbatches add up to it.

    grpo: mean over rows of each row's token mean; a fully masked row counts with 0. dapo and bnpo: mean over tokens
    (TRL computes bnpo's per device; here it is global, hence the same). dr_grpo: sum / (rows x max_length), a constant.
    """
    losses = jnp.where(mask, losses, 0.0)
    match aggregation:
        case "grpo":
            return (losses.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)).sum() / total.rows
        case "dapo" | "bnpo" | None:
            return losses.sum() / total.tokens
        case "dr_grpo":
            return losses.sum() / (total.rows * max_length)
    raise ValueError(f"aggregation={aggregation!r}: choose grpo, bnpo, dr_grpo or dapo")


class LossMetrics(NamedTuple):
    """Sums and extremes over rows, such that microbatches combine by `combine`."""

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    low_min: Float[Array, ""]
    high_max: Float[Array, ""]


def loss_metrics(
    loss: Float[Array, ""],
    tokens: TokenLosses,
    entropy: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    total: Denominators,
) -> LossMetrics:
    """These rows' share of the minibatch's metrics; means are over tokens, low_min and high_max over rows' means."""

    def mean(x: Array) -> Array:
        return jnp.where(mask, x, 0).sum() / total.tokens

    def per_row(x: Array) -> Array:
        return (x & mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    return LossMetrics(
        loss,
        mean(tokens.kl),
        mean(entropy),
        mean(tokens.clipped_low),
        mean(tokens.clipped_high),
        per_row(tokens.clipped_low).min(),
        per_row(tokens.clipped_high).max(),
    )


def zero_metrics() -> LossMetrics:
    """The identity of `combine`."""
    zero = jnp.float32(0)
    return LossMetrics(zero, zero, zero, zero, zero, jnp.float32(jnp.inf), zero)


def combine(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two microbatches of one minibatch."""
    summed = jax.tree.map(jnp.add, a, b)
    return summed._replace(low_min=jnp.minimum(a.low_min, b.low_min), high_max=jnp.maximum(a.high_max, b.high_max))
