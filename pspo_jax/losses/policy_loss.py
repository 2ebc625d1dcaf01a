"""The loss of a minibatch and its metrics: every published loss is a ratio, a surrogate, an aggregation and extras.

Every denominator is counted over the whole batch before the first microbatch runs, so that minibatches, gradient
accumulation and sharding change nothing. The conventions are those of TRL 1.16, to which the golden values of the tests
belong.

Letters: R rows (completions), T completion length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.arrays.rows import LossInputs
from pspo_jax.config.strategies import Aggregation, LossConfig
from pspo_jax.losses.ratios import (
    SURROGATES,
    SurrogateInputs,
    SurrogateTerms,
    find_surrogate,
    importance_ratio,
    importance_weight,
    kl_estimate,
    log_importance_weight,
    low_divergence,
)


class Denominators(NamedTuple):
    """The numbers that sums over rows and tokens are divided by."""

    rows: Float[Array, ""]
    """Completions of the batch / minibatches."""
    tokens: Float[Array, ""]
    """Tokens of the batch / minibatches."""
    minibatch_tokens: Float[Array, ""]
    """Tokens of this minibatch, at least 1."""
    bonus_tokens: Float[Array, ""]
    """Tokens of this minibatch that the entropy bonus is taken from, at least 1."""
    minibatch_rows: Float[Array, ""]
    """Completions of this minibatch, at least 1."""
    computed_tokens: Float[Array, ""]
    """Tokens in the computed completions of this minibatch, at least 1."""
    computed_rows: Float[Array, ""]
    """Completions of this minibatch that are computed, at least 1."""


def rows_with_gradient(inputs: LossInputs, config: LossConfig) -> Bool[Array, "R"] | None:
    """Rows whose loss and gradient may differ from 0; None = all. Loss and gradient of other rows are exactly 0.

    Every surrogate of the package is 0 where the advantage is 0, whatever the ratio. A KL term, an entropy bonus or a
    surrogate of the user's own may have a gradient there, and a teacher gives nearly every token an advantage.
    """
    taught = inputs.token_advantages is not None
    everywhere = taught or inputs.reference_log_probs is not None or config.entropy_coef > 0
    if everywhere or config.surrogate not in SURROGATES:
        return None
    return inputs.counted & (inputs.advantages != 0)


def denominators(
    batch: LossInputs,
    minibatch: LossInputs | None = None,
    minibatches: int = 1,
    count_masked: bool = True,
    computed: Bool[Array, "R"] | None = None,
) -> Denominators:
    """The denominators of a minibatch. Those of the loss count all completions, whether they are computed or not.

    Args:
      minibatch: None = the whole batch is one minibatch.
      minibatches: number of minibatches that the batch is split into.
      count_masked: whether rows without a token count in means over rows.
      computed: rows of the minibatch that are computed; None = all.
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
        at_least_one(part.mask if computed is None else part.mask & computed[:, None]),
        at_least_one(part.counted if computed is None else part.counted & computed),
    )


class LossMetrics(NamedTuple):
    """Shares of a minibatch's means, and extremes; `combine` joins those of two microbatches."""

    loss: Float[Array, ""]
    """The loss."""
    kl: Float[Array, ""]
    """Mean KL term per token, in nats."""
    entropy: Float[Array, ""]
    """Mean entropy per token of the rows that are computed, in nats; NaN = no row is computed."""
    low: Float[Array, ""]
    """Share of tokens, or of rows where there is one ratio per row, that are clipped from below."""
    high: Float[Array, ""]
    """Share that is clipped from above."""
    low_min: Float[Array, ""]
    """Least share of a row's tokens that are clipped from below; inf = no row has a token."""
    high_max: Float[Array, ""]
    """Largest share of a row's tokens that are clipped from above."""
    gamma: Float[Array, ""]
    """Mean of VESPO's weight over the rows that are computed, 1 for other surrogates; NaN = no row is computed."""


def compute_loss(
    log_probs: Float[Array, "R T"],
    entropy: Float[Array, "R T"],
    inputs: LossInputs,
    config: LossConfig,
    total: Denominators,
    max_length: int,
    divergence: Float[Array, "R T"] | None = None,
) -> tuple[Float[Array, ""], LossMetrics]:
    """These rows' share of the minibatch's loss, and of its metrics; shares of microbatches add up.

    Per token the loss is -v w s + kl_coef r w KL, with the selector's weight v, the importance weight w = pi_old / mu
    of an older behaviour policy, cut to its cap, the surrogate s, and the ratio r = pi / pi_old. Without kl_unbiased
    the KL term has neither r nor w. A teacher's advantage of a token is added to that of its completion; a divergence D
    from a teacher is a term v D, whoever drew the token. The entropy bonus is a mean over tokens whatever the
    aggregation.

    Args:
      log_probs: log pi of each token; anything outside the mask.
      entropy: entropy of the next-token distribution, in nats; anything outside the mask.
      config: a resolved config, whose surrogate, ratio, aggregation and clip range are not None.
      total: the denominators, counted over the whole batch.
      max_length: rollout.max_new_tokens, the constant of dr_grpo.
      divergence: the divergence from a teacher in the state of each token, with its weight, in nats; anything outside
        the mask. None = the loss has no such term.
    """
    mask = inputs.mask
    # Where both log-probs are equal the ratio is 1, so that nothing outside the mask makes a gradient infinite.
    log_probs = jnp.where(mask, log_probs, jax.lax.stop_gradient(inputs.old_log_probs))
    losses, kl, terms = token_losses(log_probs, inputs, config, divergence)
    loss = aggregate(losses, mask, config.aggregation, total, max_length)
    if config.entropy_coef:
        bonus = mask if inputs.top_entropy is None else mask & inputs.top_entropy
        loss -= config.entropy_coef * jnp.where(bonus, entropy, 0).sum() / total.bonus_tokens
    return loss, loss_metrics(loss, kl, jax.lax.stop_gradient(entropy), terms, inputs, total)


def token_losses(
    log_probs: Float[Array, "R T"],
    inputs: LossInputs,
    config: LossConfig,
    divergence: Float[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"], SurrogateTerms]:
    """The loss of each token, its KL to the reference policy, and the surrogate."""
    mask, old = inputs.mask, old_policy(log_probs, inputs)
    log_ratio = log_probs - old
    ratio = importance_ratio(log_ratio, mask, config)
    decoupled = config.off_policy == "decoupled"
    log_w = log_importance_weight(old, inputs.behaviour_log_probs, mask, config) if decoupled else None
    advantages = inputs.advantages[:, None]
    if inputs.token_advantages is not None:
        advantages = jnp.where(mask, advantages + inputs.token_advantages, 0)
    terms = find_surrogate(config.surrogate)(
        SurrogateInputs(ratio, log_probs, log_ratio, advantages, mask, log_w), config
    )
    losses = jnp.broadcast_to(-inputs.loss_weight[:, None] * terms.value, mask.shape)
    if config.off_policy_threshold:
        losses *= low_divergence(inputs.behaviour_log_probs, log_probs, advantages, mask, config.off_policy_threshold)
    if inputs.top_entropy is not None:
        losses = jnp.where(inputs.top_entropy, losses, 0)
    weight = jnp.ones_like(losses) if log_w is None else importance_weight(log_w, config)
    # VESPO's own weight contains the behaviour policy already.
    if config.surrogate != "vespo":
        losses *= weight
    if divergence is not None:
        # It is a sum over all tokens, so that no ratio corrects for the one that was drawn.
        taught = inputs.loss_weight[:, None] * divergence
        losses = losses + (taught if inputs.top_entropy is None else jnp.where(inputs.top_entropy, taught, 0))
    kl = jnp.zeros_like(losses)
    if inputs.reference_log_probs is not None:
        kl = kl_estimate(log_probs, inputs.reference_log_probs, config.kl_estimator)
        kl = kl * ratio * weight if config.kl_unbiased else kl
        losses = losses + config.kl_coef * kl
    return losses, kl, terms


def old_policy(log_probs: Float[Array, "R T"], inputs: LossInputs) -> Float[Array, "R T"]:
    """The old policy's log-probs, without gradient: those of a forward pass, or log-linearly interpolated.

    A-3PO (arXiv 2512.06547) and AReaL interpolate between the behaviour policy and the policy that trains by their
    versions, which saves the pass.
    """
    if inputs.interpolation is None:
        return inputs.old_log_probs
    behaviour = inputs.behaviour_log_probs
    return behaviour + inputs.interpolation * (jax.lax.stop_gradient(log_probs) - behaviour)


def loss_metrics(
    loss: Float[Array, ""],
    kl: Float[Array, "R T"],
    entropy: Float[Array, "R T"],
    terms: SurrogateTerms,
    inputs: LossInputs,
    total: Denominators,
) -> LossMetrics:
    """These rows' share of the minibatch's metrics."""
    mask = inputs.mask

    def mean(x: Float[Array, "R T"]) -> Float[Array, ""]:
        return jnp.where(mask, x, 0).sum() / total.minibatch_tokens

    def share(cut: Bool[Array, "R T|1"]) -> Float[Array, ""]:
        """Share of tokens that are cut, or of rows where there is one ratio per row."""
        rows = (cut[:, 0] & inputs.counted).sum() / total.minibatch_rows
        return rows if cut.shape[1] == 1 else mean(cut)

    def share_by_row(cut: Bool[Array, "R T|1"]) -> Float[Array, "R"]:
        return (cut & mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    low, high = (jnp.zeros_like(mask) if x is None else x for x in (terms.clipped_low, terms.clipped_high))
    gamma = jnp.ones_like(inputs.advantages) if terms.gamma is None else terms.gamma
    return LossMetrics(
        loss,
        mean(kl),
        jnp.where(mask, entropy, 0).sum() / total.computed_tokens,
        share(low),
        share(high),
        jnp.where(mask.any(axis=1), share_by_row(low), jnp.inf).min(),
        share_by_row(high).max(),
        jnp.where(inputs.counted, gamma, 0).sum() / total.computed_rows,
    )


def aggregate(
    losses: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
    aggregation: Aggregation | None,
    total: Denominators,
    max_length: int,
) -> Float[Array, ""]:
    """The token losses as one number.

    grpo: mean over rows of each row's token mean. dapo: sum / tokens of the batch per minibatch, so that every token of
    a batch weighs the same; bnpo: sum / tokens of the minibatch. dr_grpo: sum / (rows x max_length), a constant. luspo:
    mean over rows of their sums. token_sum: sum.

    Raises:
      ValueError: another aggregation.
    """
    losses = jnp.where(mask, losses, 0.0)
    match aggregation:
        case "grpo":
            return (losses.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)).sum() / total.rows
        case "dapo":
            return losses.sum() / total.tokens
        case "bnpo":
            return losses.sum() / total.minibatch_tokens
        case "dr_grpo":
            return losses.sum() / (total.rows * max_length)
        case "luspo":
            return losses.sum() / total.rows
        case "token_sum":
            return losses.sum()
    raise ValueError(f"aggregation={aggregation!r}: choose grpo, bnpo, dr_grpo, dapo, luspo or token_sum")


def zero_metrics() -> LossMetrics:
    """The metrics of no rows, the identity of `combine`."""
    zero = jnp.float32(0)
    return LossMetrics(zero, zero, zero, zero, zero, jnp.float32(jnp.inf), zero, zero)


def metrics_of_uncomputed(inputs: LossInputs, computed: Bool[Array, "R"]) -> LossMetrics:
    """The metrics of the rows that are not computed. None of their tokens is clipped.

    Their entropies and VESPO's weights are unknown, and the means leave them out; if no row at all is computed, these
    means are NaN.
    """
    unknown = jnp.where(computed.any(), 0.0, jnp.nan)
    some = (inputs.mask.any(axis=1) & ~computed).any()
    return zero_metrics()._replace(entropy=unknown, gamma=unknown, low_min=jnp.where(some, 0.0, jnp.inf))


def combine(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two microbatches of one minibatch."""
    summed = jax.tree.map(jnp.add, a, b)
    return summed._replace(low_min=jnp.minimum(a.low_min, b.low_min), high_max=jnp.maximum(a.high_max, b.high_max))
