"""A prompt's own successes and failures, kept apart from what other prompts say about it (`bins.py`, `predictor.py`).

At a visit, counts are multiplied by the discount rho of `beliefs.discount`; in each step without a visit, they lose the
share `shrinkage`. A prior that other prompts decide is added when a belief is read, so it can change without a visit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.config.strategies import ForgettingConfig
from pspo_jax.selection.beliefs import Beliefs, discount, kept
from pspo_jax.selection.interface import PromptStats, VisitUpdate


class OwnCounts(NamedTuple):
    """Counts of each prompt, as of its last visit."""

    successes: Float[Array, "R"]
    """Discounted count of its own successes."""
    failures: Float[Array, "R"]
    """Discounted count of its own failures."""
    policy_drift: Float[Array, "R"]
    """`TrainState.policy_drift` at the last visit."""


def init_counts(rows: int) -> OwnCounts:
    """Counts [rows] before any visit."""
    # Each array has a buffer of its own, because the training step donates its state.
    successes, failures, policy_drift = (jnp.zeros(rows, jnp.float32) for _ in range(3))
    return OwnCounts(successes, failures, policy_drift)


def learn_counts(config: ForgettingConfig, counts: OwnCounts, update: VisitUpdate) -> OwnCounts:
    """Counts of the round's prompts after the round; a prompt without a verdict keeps its counts."""
    drift = jnp.asarray(update.outcome.policy_drift, jnp.float32)
    now = _as_of_now(config, counts, update.stats)
    rho = jnp.where(update.has_verdict, discount(config, drift - counts.policy_drift), 1.0)
    return OwnCounts(
        rho * now.successes + update.successes,
        rho * now.failures + update.failures,
        jnp.where(update.has_verdict, drift, counts.policy_drift),
    )


def with_prior(
    config: ForgettingConfig,
    counts: OwnCounts,
    mean: Float[Array, "m"],
    stats: PromptStats,
    strength: Float[Array, "m"] | None = None,
) -> Beliefs:
    """The Beta belief about each of m prompts as of step `stats.now`: its own counts and a prior with this mean.

    Args:
      strength: number of completions that weigh as much as the prior; None = `prior_successes` + `prior_failures`.
    """
    if strength is None:
        strength = jnp.full_like(mean, config.prior_successes + config.prior_failures)
    now = _as_of_now(config, counts, stats)
    return Beliefs(strength * mean + now.successes, strength * (1 - mean) + now.failures, counts.policy_drift)


def _as_of_now(config: ForgettingConfig, counts: OwnCounts, stats: PromptStats) -> OwnCounts:
    """Counts that have shrunk in the steps since the last visit."""
    keep = kept(config, jnp.maximum(stats.now - 1 - stats.last_step, 0))
    return counts._replace(successes=keep * counts.successes, failures=keep * counts.failures)
