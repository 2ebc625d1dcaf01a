"""Experience-weighted reward smoothing (ERS), the estimator of PSPO (Zhu et al., AAAI-26).

Per prompt, with mu and s2 the mean and variance of the current group and alpha the weight of the current group:

    m <- m + alpha (mu - m_old)
    v <- (1 - alpha) v_old + alpha s2 + alpha (1 - alpha) (mu - m_old)^2
    A_i = (r_i - m) / (sqrt(v) + eps)

The second line is the exact variance of the mixture of both groups. The first visit takes m = mu, v = s2. Unlike the
published code, history belongs to the prompt, not to a slot of the batch, and it is part of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.advantages.interface import AdvantageEstimator, GroupStatistics, group_statistics
from pspo_jax.arrays.per_prompt import last_of_each, padded_rows
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig
from pspo_jax.selection.beliefs import discount


class ErsState(NamedTuple):
    """The history of each prompt."""

    mean: Float[Array, "N"]
    """Smoothed mean reward m of each prompt."""
    spread: Float[Array, "N"]
    """Smoothed variance v; for stat_mode linear_std and published_head, what those modes smooth in its place."""
    visits: Int[Array, "N"]
    """Number of groups with a usable verdict; 0 = no history."""
    policy_drift: Float[Array, "N"] | None
    """`TrainState.policy_drift` at the last of them; None = alpha does not depend on it."""


def ers(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """Advantages against a prompt's smoothed statistics.

    stat_mode="linear_std" smooths standard deviations linearly. "published_head" stores the variance in the slot of the
    standard deviation, squares it at the next visit and divides by it without a root, as the published code's last
    commit does; it exists for parity studies. A group with fewer than two verdicts updates nothing and gets A = 0.
    alpha_mode="count" takes 1/n at the n-th visit, so that m is the plain mean of all groups; "policy_drift" forgets as
    much as the policy has drifted.
    """
    forgetting = dataclasses.replace(forgetting, mode="policy_drift")

    def init(num_prompts: int) -> ErsState:
        # Each array has a buffer of its own, because the training step donates its state.
        rows = padded_rows(num_prompts)
        return ErsState(
            mean=jnp.zeros(rows, jnp.float32),
            spread=jnp.zeros(rows, jnp.float32),
            visits=jnp.zeros(rows, jnp.int32),
            policy_drift=jnp.zeros(rows, jnp.float32) if config.alpha_mode == "policy_drift" else None,
        )

    def estimate(
        state: ErsState,
        ids: Int[Array, "B"],
        rewards: Float[Array, "B G"],
        lengths: Int[Array, "B G"] | None = None,
        policy_drift: Float[Array, ""] | float = 0.0,
    ) -> tuple[Float[Array, "B G"], ErsState]:
        del lengths
        stats = group_statistics(rewards, config.ddof)
        alpha = _alpha(config, forgetting, state, ids, policy_drift)
        mean, spread, scale = _smoothed(config, state, ids, stats, alpha)
        usable = stats.judged > 1
        advantages = (rewards - mean[:, None]) / (scale + config.eps)[:, None]
        known = ~jnp.isnan(rewards) & usable[:, None]
        return jnp.where(known, advantages, 0.0), _written(state, ids, usable, mean, spread, policy_drift)

    return AdvantageEstimator(init, estimate)


def _alpha(
    config: AdvantageConfig,
    forgetting: ForgettingConfig,
    state: ErsState,
    ids: Int[Array, "B"],
    policy_drift: Float[Array, ""] | float,
) -> Float[Array, "B"]:
    """The weight alpha of each prompt's current group."""
    match config.alpha_mode:
        case "count":
            return 1 / (state.visits[ids] + 1).astype(jnp.float32)
        case "policy_drift":
            assert state.policy_drift is not None
            return 1 - discount(forgetting, policy_drift - state.policy_drift[ids])
    return jnp.full(ids.shape, config.alpha, jnp.float32)


def _smoothed(
    config: AdvantageConfig, state: ErsState, ids: Int[Array, "B"], stats: GroupStatistics, alpha: Float[Array, "B"]
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Mean and spread of each prompt after its current group, and the scale that advantages are divided by."""
    mean_old, spread_old = state.mean[ids], state.spread[ids]
    seen = state.visits[ids] > 0

    def smooth(old: Float[Array, "B"], new: Float[Array, "B"]) -> Float[Array, "B"]:
        return (1 - alpha) * old + alpha * new

    mean = jnp.where(seen, mean_old + alpha * (stats.mean - mean_old), stats.mean)
    mixing = alpha * (1 - alpha) * (stats.mean - mean_old) ** 2
    match config.stat_mode:
        case "variance":
            spread = jnp.where(seen, smooth(spread_old, stats.variance) + mixing, stats.variance)
            return mean, spread, jnp.sqrt(spread)
        case "linear_std":
            std = jnp.sqrt(stats.variance)
            spread = jnp.where(seen, smooth(spread_old, std), std)
        case "published_head":
            spread = jnp.where(seen, smooth(spread_old**2, stats.variance) + mixing, stats.variance)
    return mean, spread, spread


def _written(
    state: ErsState,
    ids: Int[Array, "B"],
    usable: Array,
    mean: Float[Array, "B"],
    spread: Float[Array, "B"],
    policy_drift: Float[Array, ""] | float,
) -> ErsState:
    """The state with the usable groups of a batch in it; of a prompt's groups the last usable one is kept."""
    nowhere = state.mean.shape[0]
    place = jnp.where(usable & last_of_each(jnp.where(usable, ids, nowhere))[0], ids, nowhere)
    drift = state.policy_drift
    return ErsState(
        mean=state.mean.at[place].set(mean, mode="drop"),
        spread=state.spread.at[place].set(spread, mode="drop"),
        visits=state.visits.at[ids].add(usable.astype(jnp.int32)),
        policy_drift=None if drift is None else drift.at[place].set(policy_drift, mode="drop"),
    )


def published_code_ers(
    config: AdvantageConfig, forgetting: ForgettingConfig, batch: int, weight_exponent: float, floor: float
) -> AdvantageEstimator:
    """ERS and loss weights with the defects of PSPO's published code, for parity studies.

    Statistics belong to the slot of a batch, so a prompt's history is another's; the variance is kept in the standard
    deviation's place (stat_mode published_head); each sample is weighted by its own new advantage, (|A_i| + floor)^-x
    with x = lambda beta and no maximum, so that a group's advantages no longer sum to 0. The weight is put on the
    advantage; a KL term stays unweighted.

    Args:
      batch: prompts that are rolled out at a time.
      weight_exponent: x.
    """
    inner = ers(dataclasses.replace(config, stat_mode="published_head", alpha_mode="fixed"), forgetting)

    def estimate(
        state: ErsState,
        ids: Int[Array, "B"],
        rewards: Float[Array, "B G"],
        lengths: Int[Array, "B G"] | None = None,
        policy_drift: Float[Array, ""] | float = 0.0,
    ) -> tuple[Float[Array, "B G"], ErsState]:
        slots = jnp.arange(ids.shape[0], dtype=jnp.int32)
        advantages, state = inner.estimate(state, slots, rewards, lengths, policy_drift)
        return advantages * (jnp.abs(advantages) + floor) ** -weight_exponent, state

    # Slots do not follow prompts, so changed data leaves the state as it is.
    return AdvantageEstimator(lambda num_prompts: inner.init(batch), estimate, lambda old, fresh, places: old)
