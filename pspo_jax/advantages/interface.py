"""The contract of an advantage estimator, and the statistics of groups that estimators share.

Letters: B groups, G completions per group, N prompts in the dataset.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig, Scale


class InitFn(Protocol):
    """Makes an estimator's state before the first step."""

    def __call__(self, num_prompts: int, /) -> PyTree:
        """Per-prompt arrays with `per_prompt.padded_rows(num_prompts)` rows; () = there is nothing to remember."""
        ...


class EstimateFn(Protocol):
    """Turns the rewards of a batch into advantages, and remembers what later steps need."""

    def __call__(
        self,
        state: PyTree,
        ids: Int[Array, "B"],
        rewards: Float[Array, "B G"],
        lengths: Int[Array, "B G"] | None = None,
        policy_drift: Float[Array, ""] | float = 0.0,
        /,
    ) -> tuple[Float[Array, "B G"], PyTree]:
        """The advantages, and the state after the batch.

        Args:
          state: the state of `InitFn`, or of the batch before.
          ids: row of each group's prompt in the dataset. If a prompt is there twice, both groups see the same history,
            and the last group with a usable verdict is kept.
          rewards: reward of each completion. NaN = no verdict: it is left out of every statistic, and its advantage
            is 0.
          lengths: tokens of each completion.
          policy_drift: `TrainState.policy_drift` when the completions were sampled.
        """
        ...


class FollowFn(Protocol):
    """Carries an estimator's state over to changed data."""

    def __call__(self, old: PyTree, fresh: PyTree, places: Int[Array, "N"], /) -> PyTree:
        """The state for the new prompts.

        Args:
          fresh: the state that `InitFn` makes for the new prompts.
          places: each new prompt's row in the old data; -1 = the prompt is new.
        """
        ...


class OverBatchFn(Protocol):
    """Divides advantages by a scale of the batch that trains."""

    def __call__(
        self, advantages: Float[Array, "B G"], rewards: Float[Array, "B G"], counted: Bool[Array, "B"], /
    ) -> Float[Array, "B G"]:
        """The divided advantages; only the groups that are `counted` are in the batch and enter the scale."""
        ...


class AdvantageEstimator(NamedTuple):
    """How rewards become advantages, as pure functions over a state of per-prompt arrays."""

    init: InitFn
    estimate: EstimateFn
    follow: FollowFn = follow_rows
    over_batch: OverBatchFn | None = None
    """Applied to the batch that trains, after replay and dynamic sampling; None = `estimate` has done everything."""


class MakeEstimator(Protocol):
    """Makes an estimator from its part of the config. `advantage.name=module:function` names one of a user's own."""

    def __call__(self, config: AdvantageConfig, forgetting: ForgettingConfig, /) -> AdvantageEstimator:
        """The estimator for a resolved config."""
        ...


class GroupStatistics(NamedTuple):
    """Statistics of each group over the rewards that are not NaN."""

    judged: Float[Array, "B"]
    """Number of rewards that are not NaN."""
    mean: Float[Array, "B"]
    """Mean reward; 0 without any."""
    variance: Float[Array, "B"]
    """Sum of squared deviations / max(judged - ddof, 1)."""


def group_statistics(rewards: Float[Array, "B G"], ddof: int) -> GroupStatistics:
    """Mean and variance of each group over the rewards that are not NaN."""
    valid = ~jnp.isnan(rewards)
    count = valid.sum(axis=1).astype(jnp.float32)
    # The mean is taken about the first reward, so that the mean of equal rewards is exact: a rounding of it would be an
    # advantage.
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
    """Centred rewards as advantages: divided by the std of the group or of the batch plus eps, or left as they are.

    Args:
      centred: rewards less their baseline.
      rewards: the rewards, whose standard deviation is taken.
      known: completions with an advantage; the others get 0.
      scale: None = group.
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


def divide_by_deviation(config: AdvantageConfig) -> OverBatchFn:
    """Division by the standard deviation of the batch's rewards plus eps."""

    def over_batch(
        advantages: Float[Array, "B G"], rewards: Float[Array, "B G"], counted: Bool[Array, "B"]
    ) -> Float[Array, "B G"]:
        in_batch = jnp.where(counted[:, None], rewards, jnp.nan).reshape(1, -1)
        return advantages / (jnp.sqrt(group_statistics(in_batch, config.ddof).variance) + config.eps)

    return over_batch
