"""A baseline that is tracked per prompt, so that groups that are all right or all wrong still teach.

    A_i = (r_i - v) / scale,   v the mean of the prompt's Beta belief before this group

SPO (arXiv 2509.13232) and KRPO (arXiv 2505.07527) use a tracked value as the baseline. A group whose rewards are all
equal has no advantage within itself, but it has one against the value that was expected of its prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.advantages.interface import AdvantageEstimator, OverBatchFn, group_statistics
from pspo_jax.arrays.per_prompt import last_of_each, padded_rows
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig
from pspo_jax.selection.beliefs import Beliefs, init_beliefs, mean, update_beliefs


class TrackedState(NamedTuple):
    """The belief about each prompt."""

    beliefs: Beliefs
    """Beta belief about each prompt's success probability."""
    seen: Bool[Array, "R"]
    """Whether the prompt has had a group with a verdict."""


def tracked_baseline(config: AdvantageConfig, forgetting: ForgettingConfig) -> AdvantageEstimator:
    """Advantages against the mean of the prompt's belief, or against the group's mean at the first visit.

    The belief learns from rewards clipped to [0, 1]. scale="batch" divides by the root mean square of the batch's
    advantages plus eps; "none" does not divide.

    Raises:
      ConfigError: scale="group". A group's own standard deviation is 0 where its rewards are equal.
    """
    if config.scale == "group":
        raise ConfigError(
            "advantage.scale=group: advantage.name=tracked_baseline divides by nothing of a group; choose batch or none"
        )

    def init(num_prompts: int) -> TrackedState:
        rows = padded_rows(num_prompts)
        return TrackedState(init_beliefs(forgetting, rows)[0], jnp.zeros(rows, bool))

    def estimate(
        state: TrackedState,
        ids: Int[Array, "B"],
        rewards: Float[Array, "B G"],
        lengths: Int[Array, "B G"] | None = None,
        policy_drift: Float[Array, ""] | float = 0.0,
    ) -> tuple[Float[Array, "B G"], TrackedState]:
        del lengths
        stats, valid = group_statistics(rewards, config.ddof), ~jnp.isnan(rewards)
        before, seen = Beliefs(*(x[ids] for x in state.beliefs)), state.seen[ids]
        baseline = jnp.where(seen, mean(before), stats.mean)
        # A single verdict has an advantage against a history, and none against itself.
        known = valid & (seen | (stats.judged > 1))[:, None]
        centred = jnp.where(known, rewards - baseline[:, None], 0.0)
        if config.scale == "batch":
            # Advantages are divided by their own size: the standard deviation of a batch of equal rewards would be 0.
            centred = centred / (jnp.sqrt((centred**2).sum() / jnp.maximum(known.sum(), 1)) + config.eps)
        success = jnp.where(valid, jnp.clip(rewards, 0, 1), 0).sum(1)
        after = update_beliefs(
            forgetting,
            before,
            None,
            success,
            valid.sum(1) - success,
            jnp.asarray(policy_drift, jnp.float32),
            toward_prior=False,
        )
        judged, nowhere = valid.any(1), state.seen.shape[0]
        place = jnp.where(judged & last_of_each(jnp.where(judged, ids, nowhere))[0], ids, nowhere)
        put = [x.at[place].set(v, mode="drop") for x, v in zip(state.beliefs, after, strict=True)]
        return centred, TrackedState(Beliefs(*put), state.seen.at[place].set(True, mode="drop"))

    return AdvantageEstimator(init, estimate)


def divide_by_rms(config: AdvantageConfig) -> OverBatchFn:
    """Division by the root mean square of the batch's advantages plus eps."""

    def over_batch(
        advantages: Float[Array, "B G"], rewards: Float[Array, "B G"], counted: Bool[Array, "B"]
    ) -> Float[Array, "B G"]:
        known = ~jnp.isnan(rewards) & counted[:, None]
        squares = jnp.where(known, advantages**2, 0).sum()
        return advantages / (jnp.sqrt(squares / jnp.maximum(known.sum(), 1)) + config.eps)

    return over_batch
