"""Selectors that keep a Beta belief of each prompt's success probability and choose by it.

MoPPS (arXiv 2507.04632) draws a success probability from each belief and takes the prompts nearest to one half. SPO
(arXiv 2509.13232) draws prompts in proportion to sqrt(v (1 - v)) + floor, where v is the belief's mean. posterior_mixed
ranks prompts by what makes a rollout worth its cost: the probability that the next group of this size is mixed,
1 - E[p^G] - E[(1-p)^G]. For G = 8 and p = 0.05 this probability is 0.34, where 4 p (1 - p) is 0.19. With
`selection.bins`, the prompts of a bin share what is believed of them (`bins.py`); with `selection.predictor`, it is
predicted from a prompt's features (`predictor.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

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
from pspo_jax.selection.bins import follow_bins, init_bins, learn_bins, read_bins
from pspo_jax.selection.interface import (
    InitFn,
    LearnFn,
    PromptMetadata,
    PromptStats,
    Scorer,
    ScorerFollowFn,
    ScorerMetricsFn,
    SelectorContext,
    VisitUpdate,
)
from pspo_jax.selection.predictor import (
    follow_predictor,
    init_predictor,
    learn_predictor,
    predictor_metrics,
    read_predictor,
)

SharedPrior = Literal["none", "bins", "predictor"]
"""How other prompts decide the mean of a prompt's prior: not at all, as those of its bin, or by a prediction."""


class ReadFn(Protocol):
    """Turns the state into beliefs."""

    def __call__(self, per_prompt: PyTree, shared: PyTree, stats: PromptStats, /) -> Beliefs:
        """The belief about each of m prompts as of step `stats.now`."""
        ...


class Tracker(NamedTuple):
    """Beliefs as parts of a scorer: `init`, `learn` and `follow` are the scorer's own.

    The per-prompt state is Beliefs and the shared state a Population; with bins they are BinnedBeliefs and BinCounts,
    with a predictor PredictedBeliefs and a Regression.
    """

    init: InitFn
    learn: LearnFn
    read: ReadFn
    follow: ScorerFollowFn | None
    changes_with_time: bool
    """Whether the belief about a prompt changes in steps in which it is not visited."""
    metrics: ScorerMetricsFn | None = None
    """Metrics of a round, as `Scorer.metrics`; None = there are none."""


def shared_prior(config: SelectionConfig) -> SharedPrior:
    """The shared prior that the config asks for."""
    if config.predictor not in (None, "none"):
        return "predictor"
    return "none" if config.bins in (None, "none") else "bins"


def tracker(forgetting: ForgettingConfig, prior: SharedPrior = "none", toward_prior: bool = True) -> Tracker:
    """The beliefs of a scorer.

    Args:
      prior: how other prompts decide the mean of a prompt's prior.
      toward_prior: see `update_beliefs`; with a shared prior, forgetting always leads to it.
    """
    if prior == "bins":
        learn_in, read_in = partial(learn_bins, forgetting), partial(read_bins, forgetting)
        return Tracker(init_bins, learn_in, read_in, follow_bins, changes_with_time=True)
    if prior == "predictor":
        return Tracker(
            init_predictor,
            partial(learn_predictor, forgetting),
            partial(read_predictor, forgetting),
            follow_predictor,
            changes_with_time=True,
            metrics=partial(predictor_metrics, forgetting),
        )

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

    def read(beliefs: Beliefs, population: Population, stats: PromptStats) -> Beliefs:
        return current(forgetting, beliefs, population, stats.last_step, stats.now)

    return Tracker(init, learn, read, None, forgetting.shrinkage > 0)


def mopps(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """The prompts of a pool of candidates whose drawn success probability is nearest to one half."""
    beliefs = tracker(forgetting, shared_prior(config))

    def candidate_score(
        key: Key[Array, ""], per_prompt: PyTree, shared: PyTree, stats: PromptStats
    ) -> Float[Array, "m"]:
        belief = beliefs.read(per_prompt, shared, stats)
        return -jnp.abs(jax.random.beta(key, belief.a, belief.b) - 0.5)

    def priority(per_prompt: PyTree, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        expected = mean(beliefs.read(per_prompt, shared, stats))
        return 1 - 2 * jnp.abs(expected - 0.5)

    return Scorer(
        "candidates",
        beliefs.init,
        beliefs.learn,
        _ones,
        candidate_score=candidate_score,
        follow=beliefs.follow,
        metrics=beliefs.metrics,
        priority=priority,
    )


def posterior_mixed(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """The prompts whose next group is most likely mixed, by their beliefs or by a draw from these (Thompson)."""
    beliefs = tracker(forgetting, shared_prior(config))

    def expected(per_prompt: PyTree, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        belief = beliefs.read(per_prompt, shared, stats)
        return p_mixed(belief.a, belief.b, context.group_size)

    def drawn(key: Key[Array, ""], per_prompt: PyTree, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        belief = beliefs.read(per_prompt, shared, stats)
        p = jax.random.beta(key, belief.a, belief.b)
        return 1 - p**context.group_size - (1 - p) ** context.group_size

    init, learn, _, follow, changes, metrics = beliefs
    if config.draw == "thompson":
        return Scorer(
            "candidates",
            init,
            learn,
            _ones,
            candidate_score=drawn,
            follow=follow,
            metrics=metrics,
            priority=expected,
        )
    return Scorer("top", init, learn, expected, follow=follow, metrics=metrics, time_dependent=changes)


def spo(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Draws in proportion to the standard deviation of the reward under the tracked value, plus a floor."""
    beliefs = tracker(forgetting, toward_prior=False)
    floor = 0.05 if config.floor is None else config.floor

    def score(per_prompt: Beliefs, shared: Population, stats: PromptStats) -> Float[Array, "m"]:
        value = mean(beliefs.read(per_prompt, shared, stats))
        return jnp.sqrt(value * (1 - value)) + floor

    return Scorer("draw", beliefs.init, beliefs.learn, score, time_dependent=beliefs.changes_with_time)


def _ones(per_prompt: PyTree, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
    return jnp.ones(stats.rows.shape)
