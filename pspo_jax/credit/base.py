"""The contract of a credit, and the statistics that credits share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.state import follow_rows


class Credit(NamedTuple):
    """Which advantage, as pure functions over a per-prompt state S.

    init(num_prompts) -> S
    estimate(S, ids [B], rewards [B, G]) -> (advantages [B, G], S)
        A NaN reward is a missing verdict: left out of every statistic, advantage 0. ids are distinct.
    follow(S, fresh, places [N]) -> S
        The state for changed data: `fresh` is init's for the new prompts, `places` their old rows, -1 = new.
    """

    init: Callable[[int], Any]
    estimate: Callable[..., tuple[Any, Any]]
    follow: Callable[..., Any] = follow_rows


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
    mean = jnp.where(valid, rewards, 0).sum(axis=1) / jnp.maximum(count, 1)
    squares = jnp.where(valid, (rewards - mean[:, None]) ** 2, 0).sum(axis=1)
    return GroupStatistics(count, mean, squares / jnp.maximum(count - ddof, 1))
