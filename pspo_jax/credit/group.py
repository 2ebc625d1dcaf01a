"""Group-relative advantages: GRPO, Dr.GRPO and the batch-scaled variant."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config import CreditConfig, Scale
from pspo_jax.credit.base import Credit, group_statistics


def group_advantages(
    rewards: Float[Array, "B G"], scale: Scale | None = "group", ddof: int = 1, eps: float = 1e-4
) -> Float[Array, "B G"]:
    """(r - group mean) / (std + eps); the std is the group's, the whole batch's, or 1 with no eps.

    NaN rewards are left out of mean and std and get advantage 0; so does a group's only verdict. These are TRL 1.16's
    conventions, to which the golden values belong. Dr.GRPO is scale="none".
    """
    stats = group_statistics(rewards, ddof)
    centred = rewards - stats.mean[:, None]
    known = ~jnp.isnan(rewards) & (stats.verdicts > 1)[:, None]
    match scale:
        case "group" | None:
            centred = centred / (jnp.sqrt(stats.variance) + eps)[:, None]
        case "batch":
            batch = group_statistics(rewards.reshape(1, -1), ddof)
            centred = centred / (jnp.sqrt(batch.variance) + eps)
        case "none":
            pass
        case _:
            raise ValueError(f"scale={scale!r}: choose group, batch or none")
    return jnp.where(known, centred, 0.0)


def group(config: CreditConfig) -> Credit:
    """Stateless group-relative credit."""

    def estimate(
        state: tuple[()], ids: Int[Array, "B"], rewards: Float[Array, "B G"]
    ) -> tuple[Float[Array, "B G"], tuple[()]]:
        del ids
        return group_advantages(rewards, config.scale, config.ddof, config.eps), state

    return Credit(init=lambda num_prompts: (), estimate=estimate)
