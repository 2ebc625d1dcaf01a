"""The parts of a loss: probability ratios, surrogates, importance weights, KL estimates. All are per token.

Letters: R rows (completions), T completion length; pi the policy that trains, pi_old the policy at the start of the
step, mu the behaviour policy that drew the tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.plugins import is_plugin, load_plugin
from pspo_jax.config.strategies import LossConfig
from pspo_jax.config.text_fields import gamma_shape

ENTROPY_ROUNDING = 1e-5
"""Entropies that differ by no more than so many nats count as equal."""
LOG_LIMIT = 20.0
"""Largest magnitude of a log-ratio, in nats, that enters VESPO's sum over a sequence."""


def row_mean(x: Float[Array, "R T"], mask: Bool[Array, "R T"]) -> Float[Array, "R 1"]:
    """Mean over the tokens of each row; 0 for a row without any."""
    return jnp.where(mask, x, 0).sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


def importance_ratio(
    log_ratio: Float[Array, "R T"], mask: Bool[Array, "R T"], config: LossConfig
) -> Float[Array, "R T|1"]:
    """pi / pi_old as loss.ratio says.

    token: of each token. sequence: of the completion, the geometric mean of its tokens', [R, 1]. sequence_token
    (GSPO-token): the completion's value with each token's gradient.
    """
    if config.ratio == "token":
        return jnp.exp(log_ratio)
    sequence = row_mean(log_ratio, mask)
    if config.ratio == "sequence_token":
        sequence = jax.lax.stop_gradient(sequence) + log_ratio - jax.lax.stop_gradient(log_ratio)
    return jnp.exp(sequence)


class SurrogateInputs(NamedTuple):
    """The arrays that a surrogate is computed from, one row per completion.

    Masked places hold equal log-probs, a ratio of 1 and no meaning; what a surrogate returns there is ignored.
    """

    ratio: Float[Array, "R T|1"]
    """pi / pi_old: of the token, or of the whole completion where there is one column; loss.ratio decides."""
    log_probs: Float[Array, "R T"]
    """log pi of each token, in nats."""
    log_ratio: Float[Array, "R T"]
    """log(pi / pi_old) of each token, in nats."""
    advantages: Float[Array, "R T|1"]
    """Advantage of each completion, in one column, or of each token where a teacher gives tokens their own."""
    mask: Bool[Array, "R T"]
    """Tokens in the loss."""
    log_importance: Float[Array, "R T"] | None = None
    """log(pi_old / mu) against the behaviour policy mu; None = loss.off_policy is not decoupled."""


class SurrogateTerms(NamedTuple):
    """The value of a surrogate, and where it was cut; None stands for nothing to report in the metrics."""

    value: Float[Array, "R T|1"]
    """The part of the objective that is maximised, per token or per completion, before any weight."""
    clipped_low: Bool[Array, "R T|1"] | None = None
    """Ratio under 1 - clip_low where the advantage is negative, shaped like the ratio."""
    clipped_high: Bool[Array, "R T|1"] | None = None
    """Ratio over 1 + clip_high where the advantage is positive, shaped like the ratio."""
    gamma: Float[Array, "R"] | None = None
    """VESPO's weight of each completion."""


class Surrogate(Protocol):
    """The function of ratio and advantage that is maximised; `loss.surrogate=module:function` names a user's."""

    def __call__(self, inputs: SurrogateInputs, config: LossConfig, /) -> SurrogateTerms:
        """The surrogate of these completions, traced under jit and differentiated in `log_probs`.

        Args:
          config: the resolved loss settings, of which it may read any.
        """
        ...


def clip(inputs: SurrogateInputs, config: LossConfig) -> SurrogateTerms:
    """min(r A, clip(r) A) (PPO), with two-sided clipping at loss.delta and dual clip."""
    ratio, adv = inputs.ratio, inputs.advantages
    low, high = _bounds(config)
    cut = jnp.minimum(ratio, config.delta) if config.delta else ratio
    value = jnp.minimum(cut * adv, jnp.clip(ratio, low, high) * adv)
    if config.dual_clip:
        value = jnp.where(adv < 0, jnp.maximum(value, config.dual_clip * adv), value)
    return SurrogateTerms(value, (cut < low) & (adv < 0), (cut > high) & (adv > 0))


def cispo(inputs: SurrogateInputs, config: LossConfig) -> SurrogateTerms:
    """sg(min(r, 1 + clip_high)) A log p (MiniMax-M1)."""
    ratio, adv = inputs.ratio, inputs.advantages
    high = _bounds(config)[1]
    value = jax.lax.stop_gradient(jnp.minimum(ratio, high)) * adv * inputs.log_probs
    return SurrogateTerms(value, clipped_high=(ratio > high) & (adv > 0))


def sapo(inputs: SurrogateInputs, config: LossConfig) -> SurrogateTerms:
    """A 4/tau sigmoid(tau (r - 1)), tau by the advantage's sign."""
    adv = inputs.advantages
    tau = jnp.where(adv > 0, config.sapo_positive, config.sapo_negative)
    return SurrogateTerms(jax.nn.sigmoid(tau * (inputs.ratio - 1)) * 4 / tau * adv)


def vespo(inputs: SurrogateInputs, config: LossConfig) -> SurrogateTerms:
    """sg(phi(w)) A log p, phi(w) = w^k e^(lambda (1 - w)) of the completion's ratio w to the behaviour policy."""
    gamma = _gamma(inputs, config)
    return SurrogateTerms(gamma[:, None] * inputs.advantages * inputs.log_probs, gamma=gamma)


def reinforce(inputs: SurrogateInputs, config: LossConfig) -> SurrogateTerms:
    """A log p."""
    del config
    return SurrogateTerms(inputs.advantages * inputs.log_probs)


SURROGATES: dict[str, Surrogate] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "reinforce": reinforce,
}
"""Each surrogate by the name that `loss.surrogate` gives it."""


def find_surrogate(name: str | None) -> Surrogate:
    """The surrogate that `loss.surrogate` names: one of `SURROGATES`, or a user's module:function.

    Raises:
      ConfigError: there is none of this name.
    """
    if name in SURROGATES:
        return SURROGATES[name]
    if name is None or not is_plugin(name):
        raise ConfigError(f"loss.surrogate={name}: choose one of {', '.join(SURROGATES)}, or name a module:function")
    return load_plugin("loss.surrogate", name)


def check_surrogate(config: LossConfig, taught: bool = False) -> None:
    """Try a user's surrogate on shapes alone, before anything is compiled. Those of the package are not tried.

    Args:
      taught: whether a teacher gives each token an advantage of its own.
    Raises:
      ConfigError: it cannot be imported, raises, or returns something other than `SurrogateTerms` of the right shapes.
    """
    surrogate = find_surrogate(config.surrogate)
    if config.surrogate in SURROGATES:
        return
    column, wide = (2, 1), (2, 3)
    ratio = column if config.ratio == "sequence" else wide

    def tried() -> SurrogateTerms:
        x = jnp.zeros(wide)
        log_importance = x if config.off_policy == "decoupled" else None
        mask = jnp.ones(wide, bool)
        advantages = jnp.ones(wide if taught else column)
        return surrogate(SurrogateInputs(jnp.ones(ratio), x, x, advantages, mask, log_importance), config)

    field, arrays = f"loss.surrogate={config.surrogate}", "2 completions of 3 tokens"
    try:
        found = jax.eval_shape(tried)
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(f"{field}: fails on {arrays}: {type(error).__name__}: {error}; mend it") from error
    if not isinstance(found, SurrogateTerms):
        raise ConfigError(f"{field}: returns {type(found).__name__}; return pspo_jax.losses.SurrogateTerms(value)")
    allowed = {"value": (wide, column), "clipped_low": (ratio,), "clipped_high": (ratio,), "gamma": ((2,),)}
    for name, value in found._asdict().items():
        if value is not None and value.shape not in allowed[name]:
            wanted = " or ".join(str(list(shape)) for shape in allowed[name])
            raise ConfigError(f"{field}: `{name}` has shape {list(value.shape)} for {arrays}; return {wanted}")


def _bounds(config: LossConfig) -> tuple[float, float]:
    """The clip range of the ratio."""
    return 1 - (config.clip_low or 0.0), 1 + (config.clip_high or 0.0)


def _gamma(inputs: SurrogateInputs, config: LossConfig) -> Float[Array, "R"]:
    """phi of VESPO, without gradient: k and lambda depend on the advantage's sign; on-policy it is 1."""
    log_w = jnp.where(inputs.mask, jnp.clip(inputs.log_ratio, -LOG_LIMIT, LOG_LIMIT), 0).sum(axis=1)
    if inputs.log_importance is not None:
        log_w += jnp.where(inputs.mask, jnp.clip(inputs.log_importance, -LOG_LIMIT, LOG_LIMIT), 0).sum(axis=1)
    log_w = jnp.clip(log_w, jnp.log(1e-8), LOG_LIMIT)
    positive, negative = gamma_shape(config.vespo_positive), gamma_shape(config.vespo_negative)
    at_least_0 = inputs.advantages[:, 0] >= 0
    k, rate = (jnp.where(at_least_0, p, n) for p, n in zip(positive, negative, strict=True))
    return jax.lax.stop_gradient(jnp.exp(rate + k * log_w - rate * jnp.exp(log_w)))


def log_importance_weight(
    old: Float[Array, "R T"], behaviour: Float[Array, "R T"], mask: Bool[Array, "R T"], config: LossConfig
) -> Float[Array, "R T"]:
    """log(pi_old / mu) of each token, or the sum over its completion, without gradient; 0 outside the mask."""
    log_w = jnp.where(mask, jax.lax.stop_gradient(old) - behaviour, 0)
    if config.importance.startswith("sequence"):
        log_w = jnp.where(mask, log_w.sum(axis=1, keepdims=True), 0)
    return log_w


def importance_weight(log_w: Float[Array, "R T"], config: LossConfig) -> Float[Array, "R T"]:
    """pi_old / mu; above the cap it is cut to the cap (truncated importance sampling), or 0 (masked)."""
    w = jnp.exp(log_w)
    if config.importance.endswith("mask"):
        return jnp.where(w <= config.importance_cap, w, 0)
    return jnp.minimum(w, config.importance_cap)


def effective_share(log_w: Float[Array, "R T"], mask: Bool[Array, "R T"], config: LossConfig) -> Float[Array, ""]:
    """Effective sample size of the importance weights as a share of their number n, (sum w)^2 / (n sum w^2).

    It is 1 if all weights are equal, as they are on-policy, and 1/n if one outweighs the others. The weights are those
    of tokens, or of completions with a token where `config.importance` is of sequences; they are not truncated.

    Args:
      log_w: as `log_importance_weight` returns it.
    """
    if config.importance.startswith("sequence"):
        log_w, mask = row_mean(log_w, mask), mask.any(axis=1, keepdims=True)
    # The share does not depend on the weights' scale, and their squares must be finite.
    w = jnp.where(mask, jnp.exp(log_w - jnp.where(mask, log_w, -jnp.inf).max()), 0)
    n, total = mask.sum(), w.sum()
    return jnp.where(n > 0, (total / jnp.maximum(n, 1)) * (total / jnp.maximum((w**2).sum(), 1e-30)), 1.0)


def low_divergence(
    behaviour: Float[Array, "R T"],
    log_probs: Float[Array, "R T"],
    advantages: Float[Array, "R T|1"],
    mask: Bool[Array, "R T"],
    threshold: float,
) -> Bool[Array, "R T|1"]:
    """Completions that stay in the loss: the advantage is not negative, or the mean of log(mu / pi) is at most the
    threshold (DeepSeek-V3.2's off-policy sequence mask). Where tokens have advantages of their own, it is by tokens.

    Args:
      behaviour: log mu of each token.
      threshold: in nats per token.
    """
    drift = row_mean(behaviour - jax.lax.stop_gradient(log_probs), mask)
    return (advantages >= 0) | (drift <= threshold)


def top_entropy(entropy: Float[Array, "R T"], mask: Bool[Array, "R T"], share: float) -> Bool[Array, "R T"]:
    """Tokens at or above the (1 - share) quantile of the entropies inside the mask, interpolated linearly.

    A token within 1e-5 nats of the quantile counts as at it: the first tokens of a group have one distribution, and
    rounding must not separate them.
    """
    values = jnp.sort(jnp.where(mask, entropy, jnp.inf).reshape(-1))
    place = (1 - share) * (jnp.maximum(mask.sum(), 1) - 1)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, values.shape[0] - 1)
    part = place - below
    # Where the place is a whole number, the next value may be padding and is not read.
    threshold = jnp.where(part > 0, values[below] + part * (values[above] - values[below]), values[below])
    return mask & (entropy >= threshold - ENTROPY_ROUNDING)


def kl_estimate(log_probs: Float[Array, "R T"], reference: Float[Array, "R T"], estimator: str) -> Float[Array, "R T"]:
    """KL(policy || reference) of each drawn token in nats, by k1, k2 or k3 (Schulman).

    With + the value has the gradient of k2, which is that of the KL itself.
    """
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
