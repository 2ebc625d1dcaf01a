"""Beliefs about each prompt's success probability, and how they are forgotten; all strategies share this mechanism.

A belief is a Beta(a, b) distribution. A group with s successes and f failures changes it to

    a <- a0 + rho (a - a0) + s,    b <- b0 + rho (b - b0) + f

with the prior (a0, b0) and a discount rho of the past. The discount is fixed, or it depends on how far the policy has
moved since the prompt's last visit: rho = clip(2^(-D / half_life), low, high), where D is the mean |change of log-prob|
per token, summed over the steps between. (SPO, arXiv 2509.13232, measures D on a stored response instead.) Between
visits a belief moves toward the population: its distance from the prior shrinks by the factor 1 - `shrinkage` a step,
and the prior's mean is then the mean of all prompts that were seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.config.strategies import ForgettingConfig


class Beliefs(NamedTuple):
    """Beta distributions of the prompts' success probabilities, as of each prompt's last visit."""

    a: Float[Array, "R"]
    """Pseudo-count of successes."""
    b: Float[Array, "R"]
    """Pseudo-count of failures."""
    policy_drift: Float[Array, "R"]
    """`TrainState.policy_drift` at the last visit: mean |change of log-prob| per token, summed over steps."""


class Population(NamedTuple):
    """Totals over all prompts that were seen."""

    total: Float[Array, ""]
    """Sum of the means of their beliefs."""
    seen: Float[Array, ""]
    """Number of these prompts."""


def init_beliefs(config: ForgettingConfig, rows: int) -> tuple[Beliefs, Population]:
    """Beliefs [rows], all at the prior, and the population before any visit."""
    beliefs = Beliefs(
        jnp.full(rows, config.prior_successes, jnp.float32),
        jnp.full(rows, config.prior_failures, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    return beliefs, Population(jnp.float32(0), jnp.float32(0))


def current(
    config: ForgettingConfig,
    beliefs: Beliefs,
    population: Population,
    last_step: Int[Array, "..."],
    now: Int[Array, ""] | int,
) -> Beliefs:
    """Beliefs as of step `now`: they have moved toward the population since each prompt's last visit.

    Args:
      last_step: step of each prompt's last visit; -1 = never visited, and the belief is the prior.
    """
    if not config.shrinkage:
        return beliefs
    keep = kept(config, jnp.maximum(now - 1 - last_step, 0))
    a0, b0 = _prior(config, population)
    seen = last_step >= 0
    return beliefs._replace(
        a=jnp.where(seen, a0 + keep * (beliefs.a - a0), a0), b=jnp.where(seen, b0 + keep * (beliefs.b - b0), b0)
    )


def kept(config: ForgettingConfig, steps: Int[Array, "..."]) -> Float[Array, "..."]:
    """Share of a distance from the prior that is left after this many steps without a visit, (1 - shrinkage)^steps."""
    return jnp.exp(steps.astype(jnp.float32) * jnp.log1p(-jnp.float32(min(config.shrinkage, 1 - 1e-7))))


def update_beliefs(
    config: ForgettingConfig,
    beliefs: Beliefs,
    population: Population | None,
    successes: Float[Array, "B"],
    failures: Float[Array, "B"],
    policy_drift: Float[Array, ""],
    toward_prior: bool = True,
) -> Beliefs:
    """Beliefs of B prompts after one group each; a prompt without a verdict keeps its belief.

    Args:
      beliefs: the beliefs before, as `current` returns them.
      population: the population whose mean the prior has; None = the prior is the config's.
      policy_drift: `TrainState.policy_drift` when the groups were rolled out.
      toward_prior: True = forgetting leads to the prior; False = it leads to nothing, a <- rho a + s, as in SPO.
    """
    rho = discount(config, policy_drift - beliefs.policy_drift)
    a0, b0 = _prior(config, population) if toward_prior else (0.0, 0.0)
    has_verdict = successes + failures > 0
    return Beliefs(
        jnp.where(has_verdict, a0 + rho * (beliefs.a - a0) + successes, beliefs.a),
        jnp.where(has_verdict, b0 + rho * (beliefs.b - b0) + failures, beliefs.b),
        jnp.where(has_verdict, policy_drift, beliefs.policy_drift),
    )


def discount(config: ForgettingConfig, drift: Float[Array, "B"]) -> Float[Array, "B"]:
    """rho, the weight of the past, for prompts whose last visit is `drift` of the policy ago."""
    if config.mode == "fixed":
        return jnp.full_like(drift, config.discount)
    return jnp.clip(jnp.exp2(-drift / config.half_life), config.low, config.high)


def update_population(
    population: Population,
    before: Beliefs,
    after: Beliefs,
    first: Bool[Array, "B"],
    is_last_entry: Bool[Array, "B"] | bool = True,
) -> Population:
    """The population after the beliefs of B prompts changed.

    Args:
      first: whether the prompt is seen for the first time.
      is_last_entry: False for entries of a prompt that comes again later in the batch; they are not counted.
    """
    change = mean(after) - jnp.where(first, 0.0, mean(before))
    return Population(
        population.total + jnp.where(is_last_entry, change, 0.0).sum(),
        population.seen + (first & is_last_entry).sum(),
    )


def mean(beliefs: Beliefs) -> Float[Array, "..."]:
    """Expected success probability of each prompt."""
    return beliefs.a / (beliefs.a + beliefs.b)


def p_mixed(a: Float[Array, "..."], b: Float[Array, "..."], group_size: int) -> Float[Array, "..."]:
    """Probability under Beta(a, b) that a group of G completions is mixed: 1 - E[p^G] - E[(1-p)^G]."""
    total = a + b
    all_right = all_wrong = jnp.ones_like(total)
    for i in range(group_size):
        all_right = all_right * (a + i) / (total + i)
        all_wrong = all_wrong * (b + i) / (total + i)
    return 1 - all_right - all_wrong


def _prior(config: ForgettingConfig, population: Population | None) -> tuple[Array | float, Array | float]:
    a0, b0 = config.prior_successes, config.prior_failures
    if not config.shrinkage or population is None:
        return a0, b0
    strength = a0 + b0
    share = (population.total + a0) / (population.seen + strength)
    return strength * share, strength * (1 - share)
