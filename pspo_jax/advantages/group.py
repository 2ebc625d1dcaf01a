"""Advantages against the group: GRPO and Dr.GRPO, leave-one-out (RLOO), and the length-weighted baseline of OPO."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.advantages.interface import AdvantageEstimator, group_statistics, scaled
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig, Scale


def group_advantages(
    rewards: Float[Array, "B G"], scale: Scale | None = "group", ddof: int = 1, eps: float = 1e-4
) -> Float[Array, "B G"]:
    """(r - group mean) / (std + eps), where the std is the group's or the whole batch's; scale="none" does not divide.

    NaN rewards are left out of mean and std and get advantage 0; so does a group's only verdict. The conventions are
    those of TRL 1.16, to which the golden values of the tests belong. Dr.GRPO is scale="none".
    """
    stats = group_statistics(rewards, ddof)
    known = ~jnp.isnan(rewards) & (stats.judged > 1)[:, None]
    return scaled(rewards - stats.mean[:, None], rewards, known, scale, ddof, eps)


def rloo_advantages(
    rewards: Float[Array, "B G"], scale: Scale | None = "none", ddof: int = 1, eps: float = 1e-4
) -> Float[Array, "B G"]:
    """r_i minus the mean of the group's other rewards: n / (n - 1) (r_i - mean) (Ahmadian et al., arXiv 2402.14740)."""
    n = group_statistics(rewards, ddof).judged
    return group_advantages(rewards, scale, ddof, eps) * (n / jnp.maximum(n - 1, 1))[:, None]


def opo_advantages(
    rewards: Float[Array, "B G"],
    lengths: Int[Array, "B G"],
    scale: Scale | None = "none",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Float[Array, "B G"]:
    """r_i minus the length-weighted mean sum(l r) / sum(l), the optimal baseline if the squared norm of a completion's
    gradient grows with its length (OPO, arXiv 2505.23585).

    Args:
      lengths: tokens of each completion; a completion without tokens counts as one token.
    """
    stats = group_statistics(rewards, ddof)
    valid = ~jnp.isnan(rewards)
    weight = jnp.where(valid, jnp.maximum(lengths, 1), 0).astype(jnp.float32)
    baseline = (weight * jnp.where(valid, rewards, 0)).sum(1) / jnp.maximum(weight.sum(1), 1)
    known = valid & (stats.judged > 1)[:, None]
    return scaled(rewards - baseline[:, None], rewards, known, scale, ddof, eps)


def group(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """The estimator of GRPO, and of Dr.GRPO with advantage.scale=none."""
    del forgetting
    return _stateless(lambda rewards, lengths: group_advantages(rewards, config.scale, config.ddof, config.eps))


def rloo(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """The estimator of RLOO."""
    del forgetting
    return _stateless(lambda rewards, lengths: rloo_advantages(rewards, config.scale, config.ddof, config.eps))


def opo(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """The estimator of OPO; its `estimate` raises ValueError without lengths."""
    del forgetting

    def advantages(rewards: Array, lengths: Array | None) -> Array:
        if lengths is None:
            raise ValueError("lengths=None: opo weighs rewards by the tokens of each completion; pass them")
        return opo_advantages(rewards, lengths, config.scale, config.ddof, config.eps)

    return _stateless(advantages)


def _stateless(advantages: Callable[[Array, Array | None], Array]) -> AdvantageEstimator:
    """An estimator without memory, from a function of rewards and lengths."""

    def estimate(
        state: tuple[()],
        ids: Int[Array, "B"],
        rewards: Float[Array, "B G"],
        lengths: Int[Array, "B G"] | None = None,
        policy_drift: Float[Array, ""] | float = 0.0,
    ) -> tuple[Float[Array, "B G"], tuple[()]]:
        del ids, policy_drift
        return advantages(rewards, lengths), state

    return AdvantageEstimator(init=lambda num_prompts: (), estimate=estimate)
