"""Probability ratios, surrogates, and the weights of groups that an older policy sampled; all per token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.config.strategies import LossConfig
from pspo_jax.config.text_fields import gamma_shape

ENTROPY_ROUNDING = 1e-5
LOG_LIMIT = 20.0
"""Log-ratios are cut here before they are summed over a sequence for VESPO."""


def row_mean(x: Float[Array, "R T"], mask: Bool[Array, "R T"]) -> Float[Array, "R 1"]:
    """Mean over a row's tokens; 0 without any."""
    return jnp.where(mask, x, 0).sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def importance_ratio(
    log_ratio: Float[Array, "R T"], mask: Bool[Array, "R T"], config: LossConfig
) -> Float[Array, "R T|1"]:
    """pi / pi_old of a token, of the sequence (geometric mean, [R, 1]), or GSPO-token's: the sequence's value with the
    token's gradient."""
    if config.ratio == "token":
        return jnp.exp(log_ratio)
    sequence = row_mean(log_ratio, mask)
    if config.ratio == "sequence_token":
        sequence = jax.lax.stop_gradient(sequence) + log_ratio - jax.lax.stop_gradient(log_ratio)
    return jnp.exp(sequence)


class Surrogate(NamedTuple):
    """What a token contributes, and where it was cut."""

    value: Float[Array, "R T|1"]
    clipped_low: Bool[Array, "R T|1"]
    """Ratio under 1 - clip_low where the advantage is negative."""
    clipped_high: Bool[Array, "R T|1"]
    """Ratio over 1 + clip_high where the advantage is positive."""
    gamma: Float[Array, "R"]
    """VESPO's weight of the row; 1 elsewhere."""


def surrogate(
    ratio: Float[Array, "R T|1"],
    log_probs: Float[Array, "R T"],
    log_ratio: Float[Array, "R T"],
    log_importance: Float[Array, "R T"] | None,
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    config: LossConfig,
) -> Surrogate:
    """The part of the objective that is maximised, before weights.

    clip: min(r A, clip(r) A) (PPO), with delta and dual clip. cispo: sg(min(r, 1 + clip_high)) A log p (MiniMax-M1).
    sapo: A 4/tau sigmoid(tau (r - 1)). vespo: sg(phi(w)) A log p, phi(w) = w^k e^(lambda (1 - w)) of the sequence's
    ratio to the behaviour policy. reinforce: A log p.
    """
    adv = advantages[:, None]
    low, high = 1 - (config.clip_low or 0.0), 1 + (config.clip_high or 0.0)
    cut = ratio if not config.delta or config.surrogate != "clip" else jnp.minimum(ratio, config.delta)
    clipped_low, clipped_high = (cut < low) & (adv < 0), (cut > high) & (adv > 0)
    gamma = jnp.ones_like(advantages)
    if config.surrogate not in ("clip", "cispo"):
        clipped_low = clipped_high = jnp.zeros_like(clipped_low)
    match config.surrogate:
        case "clip":
            value = jnp.minimum(cut * adv, jnp.clip(ratio, low, high) * adv)
            if config.dual_clip:
                value = jnp.where(adv < 0, jnp.maximum(value, config.dual_clip * adv), value)
        case "cispo":
            clipped_low = jnp.zeros_like(clipped_low)
            value = jax.lax.stop_gradient(jnp.minimum(ratio, high)) * adv * log_probs
        case "sapo":
            tau = jnp.where(adv > 0, config.sapo_positive, config.sapo_negative)
            value = jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
        case "vespo":
            gamma = _gamma(log_ratio, log_importance, advantages, mask, config)
            value = gamma[:, None] * adv * log_probs
        case "reinforce":
            value = adv * log_probs
        case _:
            raise ValueError(f"surrogate={config.surrogate!r}: choose clip, cispo, sapo, vespo or reinforce")
    return Surrogate(value, clipped_low, clipped_high, gamma)


def _gamma(
    log_ratio: Float[Array, "R T"],
    log_importance: Float[Array, "R T"] | None,
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    config: LossConfig,
) -> Float[Array, "R"]:
    """phi of VESPO, without gradient: (k, lambda) by the advantage's sign; 1 on-policy."""
    log_w = jnp.where(mask, jnp.clip(log_ratio, -LOG_LIMIT, LOG_LIMIT), 0).sum(axis=1)
    if log_importance is not None:
        log_w += jnp.where(mask, jnp.clip(log_importance, -LOG_LIMIT, LOG_LIMIT), 0).sum(axis=1)
    log_w = jnp.clip(log_w, jnp.log(1e-8), LOG_LIMIT)
    positive, negative = gamma_shape(config.vespo_positive), gamma_shape(config.vespo_negative)
    k, rate = (jnp.where(advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
    return jax.lax.stop_gradient(jnp.exp(rate + k * log_w - rate * jnp.exp(log_w)))


def log_importance_weight(
    old: Float[Array, "R T"], behaviour: Float[Array, "R T"], mask: Bool[Array, "R T"], config: LossConfig
) -> Float[Array, "R T"]:
    """log pi_old / mu of the token, or of the whole completion (the sum), without gradient; 0 outside the mask."""
    log_w = jnp.where(mask, jax.lax.stop_gradient(old) - behaviour, 0)
    if config.importance.startswith("sequence"):
        log_w = jnp.where(mask, log_w.sum(axis=1, keepdims=True), 0)
    return log_w


def importance_weight(log_w: Float[Array, "R T"], config: LossConfig) -> Float[Array, "R T"]:
    """pi_old / mu, cut to the cap (truncated importance sampling) or 0 above it (masked)."""
    w = jnp.exp(log_w)
    if config.importance.endswith("mask"):
        return jnp.where(w <= config.importance_cap, w, 0)
    return jnp.minimum(w, config.importance_cap)


def low_divergence(
    behaviour: Float[Array, "R T"],
    log_probs: Float[Array, "R T"],
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    threshold: float,
) -> Bool[Array, "R 1"]:
    """Rows that stay: the advantage is not negative, or the mean of log(mu / pi) is at most the threshold
    (DeepSeek-V3.2's off-policy sequence mask)."""
    drift = row_mean(behaviour - jax.lax.stop_gradient(log_probs), mask)
    return (advantages[:, None] >= 0) | (drift <= threshold)


def top_entropy(entropy: Float[Array, "R T"], mask: Bool[Array, "R T"], share: float) -> Bool[Array, "R T"]:
    """Tokens at or above the (1 - share) quantile of the masked entropies, interpolated linearly.

    Within 1e-5 nats counts as at: the first tokens of a group have one distribution, and rounding must not part them.
    """
    values = jnp.sort(jnp.where(mask, entropy, jnp.inf).reshape(-1))
    place = (1 - share) * (jnp.maximum(mask.sum(), 1) - 1)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, values.shape[0] - 1)
    part = place - below
    # Where the place is whole, what lies above it may be padding.
    threshold = jnp.where(part > 0, values[below] + part * (values[above] - values[below]), values[below])
    return mask & (entropy >= threshold - ENTROPY_ROUNDING)


def kl_estimate(log_probs: Float[Array, "R T"], reference: Float[Array, "R T"], estimator: str) -> Float[Array, "R T"]:
    """KL(policy || reference) of a drawn token, by k1, k2 or k3 (Schulman); with + k2's gradient, which is the KL's."""
    log_ratio = log_probs - reference
    half_square = log_ratio**2 / 2
    match estimator.removesuffix("+"):
        case "k1":
            value = log_ratio
        case "k2":
            value = half_square
        case "k3":
            value = jnp.exp(-log_ratio) + log_ratio - 1
        case _:
            raise ValueError(f"kl_estimator={estimator!r}: choose k1, k2, k3, k1+ or k3+")
    if estimator.endswith("+"):
        return jax.lax.stop_gradient(value - half_square) + half_square
    return value
