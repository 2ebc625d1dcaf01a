"""Selectors that keep a Beta belief of each prompt's success probability and choose by it.

MoPPS (arXiv 2507.04632) draws a success probability from each belief and takes those nearest to one half. SPO (arXiv
2509.13232) draws prompts in proportion to sqrt(v (1 - v)) + floor, v the belief's mean. posterior_mixed ranks by what
makes a rollout worth its cost: the probability that the next group of this size is mixed,
1 - E[p^G] - E[(1-p)^G]. For G = 8 and p = .05 that is .34, where 4 p (1 - p) is .19.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.beliefs import Beliefs, Population, counted, current, init_beliefs, learned, mean, p_mixed
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


def tracker(forgetting: ForgettingConfig, toward_prior: bool = True) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A scorer's `init` and `learn` where its state is Beliefs and the Population."""

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Beliefs, Population]:
        return init_beliefs(forgetting, rows)

    def learn(own: Beliefs, world: Population, news: VisitUpdate) -> tuple[Beliefs, Population]:
        now = current(forgetting, own, world, news.look.last, news.look.now)
        policy_drift = jnp.asarray(news.outcome.policy_drift, jnp.float32)
        new = learned(forgetting, now, world, news.successes, news.failures, policy_drift, toward_prior)
        return new, counted(world, own, new, news.look.visits == 0, news.writes)

    return init, learn


def mopps(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """The prompts of a pool of candidates whose drawn success probability is nearest to one half."""
    init, learn = tracker(forgetting)

    def candidate_score(key: Key[Array, ""], own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
        belief = current(forgetting, own, world, look.last, look.now)
        return -jnp.abs(jax.random.beta(key, belief.a, belief.b) - 0.5)

    def priority(own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
        return 1 - 2 * jnp.abs(mean(current(forgetting, own, world, look.last, look.now)) - 0.5)

    return Scorer("candidates", init, learn, _ones, candidate_score=candidate_score, priority=priority)


def posterior_mixed(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """The prompts whose next group is most likely mixed, under their beliefs or a draw from these."""
    init, learn = tracker(forgetting)

    def expected(own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
        belief = current(forgetting, own, world, look.last, look.now)
        return p_mixed(belief.a, belief.b, sizes.group_size)

    def drawn(key: Key[Array, ""], own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
        belief = current(forgetting, own, world, look.last, look.now)
        p = jax.random.beta(key, belief.a, belief.b)
        return 1 - p**sizes.group_size - (1 - p) ** sizes.group_size

    if config.draw == "thompson":
        return Scorer("candidates", init, learn, _ones, candidate_score=drawn, priority=expected)
    return Scorer("top", init, learn, expected, moves=forgetting.shrinkage > 0)


def spo(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Draws in proportion to the standard deviation of the reward under the tracked value, plus a floor."""
    init, learn = tracker(forgetting, toward_prior=False)
    floor = 0.05 if config.floor is None else config.floor

    def score(own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
        value = mean(current(forgetting, own, world, look.last, look.now))
        return jnp.sqrt(value * (1 - value)) + floor

    return Scorer("draw", init, learn, score, moves=forgetting.shrinkage > 0)


def _ones(own: Beliefs, world: Population, look: PromptStats) -> Float[Array, "m"]:
    return jnp.ones(look.rows.shape)
