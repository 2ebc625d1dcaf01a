"""What is believed of each prompt's success probability, and how beliefs are forgotten: one mechanism for all.

A belief is a Beta(a, b) distribution. A group with s successes and f failures changes it to

    a <- a0 + rho (a - a0) + s,    b <- b0 + rho (b - b0) + f

with the prior (a0, b0) and a discount rho of the past: fixed, or tied to how far the policy has moved since the last
visit, rho = clip(2^(-D / half_life), low, high), D the mean |change of log-prob| per token summed over the steps
between (SPO, arXiv 2509.13232, measures D on a stored response instead). Between visits a belief drifts toward the
population: its distance from the prior shrinks by `shrinkage` a step, and the prior's mean is then that of all prompts
that were seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig


class Beliefs(NamedTuple):
    """Per prompt; as of its last visit."""

    a: Float[Array, "R"]
    """Pseudo-count of successes."""
    b: Float[Array, "R"]
    """Pseudo-count of failures."""
    moved: Float[Array, "R"]
    """The policy's movement up to then, see `TrainState.movement`."""


class Population(NamedTuple):
    """All prompts that were seen."""

    total: Float[Array, ""]
    """Sum of their beliefs' means."""
    seen: Float[Array, ""]
    """How many they are."""


def init_beliefs(config: ForgettingConfig, rows: int) -> tuple[Beliefs, Population]:
    """Every prompt at the prior."""
    beliefs = Beliefs(
        jnp.full(rows, config.prior_successes, jnp.float32),
        jnp.full(rows, config.prior_failures, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    return beliefs, Population(jnp.float32(0), jnp.float32(0))


def current(
    config: ForgettingConfig, beliefs: Beliefs, population: Population, last: Int[Array, "..."], now: Int[Array, ""]
) -> Beliefs:
    """Beliefs at step `now`, drifted since their last visit; prompts without one are at the prior."""
    if not config.shrinkage:
        return beliefs
    age = jnp.maximum(now - 1 - last, 0).astype(jnp.float32)
    keep = jnp.exp(age * jnp.log1p(-jnp.float32(min(config.shrinkage, 1 - 1e-7))))
    a0, b0 = _prior(config, population)
    seen = last >= 0
    return beliefs._replace(
        a=jnp.where(seen, a0 + keep * (beliefs.a - a0), a0), b=jnp.where(seen, b0 + keep * (beliefs.b - b0), b0)
    )


def learned(
    config: ForgettingConfig,
    beliefs: Beliefs,
    population: Population | None,
    successes: Float[Array, "B"],
    failures: Float[Array, "B"],
    policy_drift: Float[Array, ""],
    toward_prior: bool = True,
) -> Beliefs:
    """Beliefs of B prompts, already `current`, after a group each.

    Args:
      population: what beliefs return to where they drift; None with toward_prior=False.
      movement: the policy's, up to the step at which the groups were rolled out.
      toward_prior: False = forget everything, a <- rho a + s, as SPO does.
    """
    rho = discount(config, policy_drift - beliefs.moved)
    a0, b0 = _prior(config, population) if toward_prior else (0.0, 0.0)
    judged = successes + failures > 0
    return Beliefs(
        jnp.where(judged, a0 + rho * (beliefs.a - a0) + successes, beliefs.a),
        jnp.where(judged, b0 + rho * (beliefs.b - b0) + failures, beliefs.b),
        jnp.where(judged, policy_drift, beliefs.moved),
    )


def discount(config: ForgettingConfig, moved: Float[Array, "B"]) -> Float[Array, "B"]:
    """rho, the weight of the past."""
    if config.mode == "fixed":
        return jnp.full_like(moved, config.discount)
    return jnp.clip(jnp.exp2(-moved / config.half_life), config.low, config.high)


def counted(
    population: Population, before: Beliefs, after: Beliefs, first: Array, writes: Array | bool = True
) -> Population:
    """The population after some beliefs changed; `first` marks prompts seen for the first time."""
    change = mean(after) - jnp.where(first, 0.0, mean(before))
    return Population(
        population.total + jnp.where(writes, change, 0.0).sum(),
        population.seen + (first & writes).sum(),
    )


def mean(beliefs: Beliefs) -> Float[Array, "..."]:
    """Expected success probability."""
    return beliefs.a / (beliefs.a + beliefs.b)


def p_mixed(a: Float[Array, "..."], b: Float[Array, "..."], group_size: int) -> Float[Array, "..."]:
    """Probability under Beta(a, b) that a group is neither all right nor all wrong: 1 - E[p^G] - E[(1-p)^G]."""
    total = a + b
    right = wrong = jnp.ones_like(total)
    for i in range(group_size):
        right = right * (a + i) / (total + i)
        wrong = wrong * (b + i) / (total + i)
    return 1 - right - wrong


def _prior(config: ForgettingConfig, population: Population | None) -> tuple[Array | float, Array | float]:
    a0, b0 = config.prior_successes, config.prior_failures
    if not config.shrinkage or population is None:
        return a0, b0
    strength = a0 + b0
    share = (population.total + a0) / (population.seen + strength)
    return strength * share, strength * (1 - share)
