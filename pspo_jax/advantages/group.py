"""Advantages against the group: GRPO and Dr.GRPO, leave-one-out (RLOO), the length-weighted baseline of OPO, MaxRL."""

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


def maxrl_advantages(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """(r_i - mean) / mean, the advantage of maximum likelihood RL (MaxRL, arXiv 2602.02710).

    For rewards of 0 and 1 with success probability p, the mean over a group of A_i times the gradient of log pi has the
    expectation sum over k from 1 to G - 1 of (1 - p)^(k - 1) grad p, which are the first terms of the series of
    grad log p. A prompt thus weighs about 1/p as much as in the gradient of p.

    NaN rewards are left out of the mean and get advantage 0. A group whose mean is 0 has no success to learn from, and
    a group with a reward below 0 has no likelihood; their advantages are 0.
    """
    stats = group_statistics(rewards, ddof=1)
    valid = ~jnp.isnan(rewards)
    usable = (stats.mean > 0) & ~(rewards < 0).any(axis=1)
    mean = jnp.where(usable, stats.mean, 1.0)[:, None]
    return jnp.where(valid & usable[:, None], (rewards - mean) / mean, 0.0)


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


def maxrl(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """The estimator of MaxRL, for rewards of at least 0."""
    del config, forgetting
    return _stateless(lambda rewards, lengths: maxrl_advantages(rewards))


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
