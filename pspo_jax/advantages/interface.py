"""The contract of a credit, and the statistics that credits share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.config.strategies import AdvantageConfig, Scale


class AdvantageEstimator(NamedTuple):
    """Which advantage, as pure functions over a per-prompt state S.

    init(num_prompts) -> S
    estimate(S, ids [B], rewards [B, G], lengths [B, G] = None, movement = 0) -> (advantages [B, G], S)
        A NaN reward is a missing verdict: left out of every statistic, advantage 0. lengths are tokens; movement is
        TrainState.movement. Of ids that are named twice, all see the same history, and the last usable one is kept.
    follow(S, fresh, places [N]) -> S
        The state for changed data: `fresh` is init's for the new prompts, `places` their old rows, -1 = new.
    over_batch(advantages [B, G], rewards [B, G], counted [B]) -> advantages
        Divided by a scale of the batch that trains, the groups that are counted in it; None = `estimate` has done all.
    """

    init: Callable[[int], Any]
    estimate: Callable[..., tuple[Any, Any]]
    follow: Callable[..., Any] = follow_rows
    over_batch: Callable[..., Any] | None = None


class GroupStatistics(NamedTuple):
    verdicts: Float[Array, "B"]
    """Rewards with a verdict."""
    mean: Float[Array, "B"]
    variance: Float[Array, "B"]
    """Divides by verdicts - ddof; 0 where that is not positive."""


def group_statistics(rewards: Float[Array, "B G"], ddof: int) -> GroupStatistics:
    """Mean and variance of each group over the rewards that are not NaN."""
    valid = ~jnp.isnan(rewards)
    count = valid.sum(axis=1).astype(jnp.float32)
    # About the first reward, so that the mean of equal rewards is exact: its rounding would be an advantage.
    first = jnp.take_along_axis(rewards, jnp.argmax(valid, axis=1)[:, None], axis=1)
    mean = jnp.where(count > 0, first[:, 0], 0) + jnp.where(valid, rewards - first, 0).sum(axis=1) / jnp.maximum(
        count, 1
    )
    squares = jnp.where(valid, (rewards - mean[:, None]) ** 2, 0).sum(axis=1)
    return GroupStatistics(count, mean, squares / jnp.maximum(count - ddof, 1))


def scaled(
    centred: Float[Array, "B G"],
    rewards: Float[Array, "B G"],
    known: Bool[Array, "B G"],
    scale: Scale | None,
    ddof: int,
    eps: float,
) -> Float[Array, "B G"]:
    """Rewards less a baseline as advantages: over the std of the group or the batch plus eps, or as they are.

    The std is of the rewards. What is not `known` gets 0.
    """
    match scale:
        case "group" | None:
            centred = centred / (jnp.sqrt(group_statistics(rewards, ddof).variance) + eps)[:, None]
        case "batch":
            batch = group_statistics(rewards.reshape(1, -1), ddof)
            centred = centred / (jnp.sqrt(batch.variance) + eps)
        case "none":
            pass
        case _:
            raise ValueError(f"scale={scale!r}: choose group, batch or none")
    return jnp.where(known, centred, 0.0)


def over_deviation(config: AdvantageConfig) -> Callable[..., Float[Array, "B G"]]:
    """`Credit.over_batch`: over the standard deviation of the batch's rewards plus eps."""

    def over_batch(
        advantages: Float[Array, "B G"], rewards: Float[Array, "B G"], counted: Bool[Array, "B"]
    ) -> Float[Array, "B G"]:
        of_batch = jnp.where(counted[:, None], rewards, jnp.nan).reshape(1, -1)
        return advantages / (jnp.sqrt(group_statistics(of_batch, config.ddof).variance) + config.eps)

    return over_batch
