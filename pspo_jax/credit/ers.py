"""Experience-weighted reward smoothing (ERS), the credit half of PSPO (Zhu et al., AAAI-26).

Per prompt, with mu and s2 the mean and variance of the current group and alpha the weight of the current group:

    m <- m + alpha (mu - m_old)
    v <- (1 - alpha) v_old + alpha s2 + alpha (1 - alpha) (mu - m_old)^2
    A_i = (r_i - m) / (sqrt(v) + eps)

The second line is the exact variance of the mixture of both groups. The first visit takes m = mu, v = s2. Unlike the
published code, history belongs to the prompt, not to a slot of the batch, and it is part of the checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config import CreditConfig
from pspo_jax.credit.base import Credit, group_statistics


class ErsState(NamedTuple):
    mean: Float[Array, "N"]
    """Smoothed mean reward m of each prompt."""
    spread: Float[Array, "N"]
    """Smoothed variance v; for stat_mode linear_std and released_head, what those modes smooth in its place."""
    visits: Int[Array, "N"]
    """Groups with a usable verdict seen so far; 0 = no history."""


def ers(config: CreditConfig) -> Credit:
    """Advantages against a prompt's smoothed statistics.

    stat_mode="linear_std" smooths standard deviations linearly. "released_head" stores the variance in the slot of the
    standard deviation, squares it at the next visit and divides by it without a root, as the published code's last
    commit does; it exists for parity studies. A group with fewer than two verdicts updates nothing and gets A = 0.
    """

    def init(num_prompts: int) -> ErsState:
        # One buffer each: the training step donates its state.
        return ErsState(
            mean=jnp.zeros(num_prompts, jnp.float32),
            spread=jnp.zeros(num_prompts, jnp.float32),
            visits=jnp.zeros(num_prompts, jnp.int32),
        )

    def smooth(old: Float[Array, "B"], new: Float[Array, "B"]) -> Float[Array, "B"]:
        return (1 - config.alpha) * old + config.alpha * new

    def estimate(
        state: ErsState, ids: Int[Array, "B"], rewards: Float[Array, "B G"]
    ) -> tuple[Float[Array, "B G"], ErsState]:
        stats = group_statistics(rewards, config.ddof)
        mean_old, spread_old = state.mean[ids], state.spread[ids]
        seen = state.visits[ids] > 0
        usable = stats.verdicts > 1

        mean = jnp.where(seen, mean_old + config.alpha * (stats.mean - mean_old), stats.mean)
        mixing = config.alpha * (1 - config.alpha) * (stats.mean - mean_old) ** 2
        match config.stat_mode:
            case "variance":
                spread = jnp.where(seen, smooth(spread_old, stats.variance) + mixing, stats.variance)
                scale = jnp.sqrt(spread)
            case "linear_std":
                std = jnp.sqrt(stats.variance)
                spread = jnp.where(seen, smooth(spread_old, std), std)
                scale = spread
            case "released_head":
                spread = jnp.where(seen, smooth(spread_old**2, stats.variance) + mixing, stats.variance)
                scale = spread

        advantages = (rewards - mean[:, None]) / (scale + config.eps)[:, None]
        known = ~jnp.isnan(rewards) & usable[:, None]
        state = ErsState(
            mean=state.mean.at[ids].set(jnp.where(usable, mean, mean_old)),
            spread=state.spread.at[ids].set(jnp.where(usable, spread, spread_old)),
            visits=state.visits.at[ids].add(usable.astype(jnp.int32)),
        )
        return jnp.where(known, advantages, 0.0), state

    return Credit(init, estimate)
