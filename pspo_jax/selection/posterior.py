"""Selectors that keep a Beta belief of each prompt's success probability and choose by it.

MoPPS (arXiv 2507.04632) draws a success probability from each belief and takes the prompts nearest to one half. SPO
(arXiv 2509.13232) draws prompts in proportion to sqrt(v (1 - v)) + floor, where v is the belief's mean. posterior_mixed
ranks prompts by what makes a rollout worth its cost: the probability that the next group of this size is mixed,
1 - E[p^G] - E[(1-p)^G]. For G = 8 and p = 0.05 this probability is 0.34, where 4 p (1 - p) is 0.19.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.beliefs import (
    Beliefs,
    Population,
    current,
    init_beliefs,
    mean,
    p_mixed,
    update_beliefs,
    update_population,
)
from pspo_jax.selection.interface import InitFn, PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


class LearnBeliefsFn(Protocol):
    """A scorer's `learn` whose state is Beliefs and a Population."""

    def __call__(
        self, beliefs: Beliefs, population: Population, update: VisitUpdate, /
    ) -> tuple[Beliefs, Population]: ...


def tracker(forgetting: ForgettingConfig, toward_prior: bool = True) -> tuple[InitFn, LearnBeliefsFn]:
    """A scorer's `init` and `learn` whose per-prompt state is Beliefs and whose shared state is the Population.

    Args:
      toward_prior: see `update_beliefs`.
    """

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[Beliefs, Population]:
        return init_beliefs(forgetting, rows)

    def learn(beliefs: Beliefs, population: Population, update: VisitUpdate) -> tuple[Beliefs, Population]:
        stats = update.stats
        before = current(forgetting, beliefs, population, stats.last_step, stats.now)
        policy_drift = jnp.asarray(update.outcome.policy_drift, jnp.float32)
        after = update_beliefs(
            forgetting, before, population, update.successes, update.failures, policy_drift, toward_prior
        )
        return after, update_population(population, beliefs, after, stats.visits == 0, update.is_last_entry)

    return init, learn


def mopps(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """The prompts of a pool of candidates whose drawn success probability is nearest to one half."""
    init, learn = tracker(forgetting)

    def candidate_score(
        key: Key[Array, ""], beliefs: Beliefs, population: Population, stats: PromptStats
    ) -> Float[Array, "m"]:
        belief = current(forgetting, beliefs, population, stats.last_step, stats.now)
        return -jnp.abs(jax.random.beta(key, belief.a, belief.b) - 0.5)

    def priority(beliefs: Beliefs, population: Population, stats: PromptStats) -> Float[Array, "m"]:
        expected = mean(current(forgetting, beliefs, population, stats.last_step, stats.now))
        return 1 - 2 * jnp.abs(expected - 0.5)

    return Scorer("candidates", init, learn, _ones, candidate_score=candidate_score, priority=priority)


def posterior_mixed(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """The prompts whose next group is most likely mixed, by their beliefs or by a draw from these (Thompson)."""
    init, learn = tracker(forgetting)

    def expected(beliefs: Beliefs, population: Population, stats: PromptStats) -> Float[Array, "m"]:
        belief = current(forgetting, beliefs, population, stats.last_step, stats.now)
        return p_mixed(belief.a, belief.b, context.group_size)

    def drawn(key: Key[Array, ""], beliefs: Beliefs, population: Population, stats: PromptStats) -> Float[Array, "m"]:
        belief = current(forgetting, beliefs, population, stats.last_step, stats.now)
        p = jax.random.beta(key, belief.a, belief.b)
        return 1 - p**context.group_size - (1 - p) ** context.group_size

    if config.draw == "thompson":
        return Scorer("candidates", init, learn, _ones, candidate_score=drawn, priority=expected)
    return Scorer("top", init, learn, expected, time_dependent=forgetting.shrinkage > 0)


def spo(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Draws in proportion to the standard deviation of the reward under the tracked value, plus a floor."""
    init, learn = tracker(forgetting, toward_prior=False)
    floor = 0.05 if config.floor is None else config.floor

    def score(beliefs: Beliefs, population: Population, stats: PromptStats) -> Float[Array, "m"]:
        value = mean(current(forgetting, beliefs, population, stats.last_step, stats.now))
        return jnp.sqrt(value * (1 - value)) + floor

    return Scorer("draw", init, learn, score, time_dependent=forgetting.shrinkage > 0)


def _ones(beliefs: Beliefs, population: Population, stats: PromptStats) -> Float[Array, "m"]:
    return jnp.ones(stats.rows.shape)
