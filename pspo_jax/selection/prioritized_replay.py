"""Prioritized Replay (Fatemi, arXiv 2601.02648): prompts ranked by p (1 - p); solved and unsolved ones are retested.

    priority omega = mean (r_i - p)^2 = p (1 - p),   p the success probability of the prompt

A prompt whose group was all right (p = 1, solved) or all wrong (p = 0, unsolved) leaves the ranking for a pool. Every
`retest_every` steps a share of the batch is filled from each pool; the prompts that have been due longest come first. A
retest that changes nothing doubles the prompt's own wait, and a mixed group brings the prompt back to the ranking. The
paper leaves the periods and shares open; the values here are this package's. A prompt that was never tried has
omega = 1/4, the largest value there is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, PyTree

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.beliefs import Beliefs, mean
from pspo_jax.selection.bins import BinnedBeliefs
from pspo_jax.selection.engine.selector import LOWEST_SCORE
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Ranked, Scorer, SelectorContext, Step, VisitUpdate
from pspo_jax.selection.posterior import shared_prior, tracker
from pspo_jax.selection.predictor import PredictedBeliefs

RANKED, SOLVED, UNSOLVED = 0, 1, 2
MAX_WAIT = 2**20
"""Longest wait between two retests, in steps."""


class RetestState(NamedTuple):
    """Per-prompt arrays of the selector."""

    beliefs: Beliefs | BinnedBeliefs | PredictedBeliefs | None
    """Beliefs of the success probability; None = the estimate is the last group's success."""
    last_success: Float[Array, "R"] | None
    """Mean success of the last group, 1/2 before there is one; None = the estimate is the belief."""
    pool: Int[Array, "R"]
    """RANKED, SOLVED or UNSOLVED."""
    due: Int[Array, "R"]
    """Step from which a solved or unsolved prompt may be retested."""
    wait: Int[Array, "R"]
    """Steps between the last test and `due`."""


def prioritized_replay(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """The top B prompts by omega, ties by the oldest visit, with retests.

    It is long because the functions of a scorer close over one tracker and one set of settings.
    """
    by_last = config.estimate == "last"
    tracked = tracker(forgetting, "none" if by_last else shared_prior(config))
    follow_beliefs = tracked.follow
    shares_prior = follow_beliefs is not None

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[RetestState, PyTree]:
        beliefs, shared = tracked.init(num_prompts, rows, metadata)
        per_prompt = RetestState(
            beliefs=None if by_last else beliefs,
            last_success=jnp.full(rows, 0.5, jnp.float32) if by_last else None,
            pool=jnp.zeros(rows, jnp.int8),
            due=jnp.zeros(rows, jnp.int32),
            wait=jnp.zeros(rows, jnp.int32),
        )
        return per_prompt, shared

    def learn(state: RetestState, shared: PyTree, update: VisitUpdate) -> tuple[RetestState, PyTree]:
        beliefs, last_success = state.beliefs, state.last_success
        if last_success is not None:
            last_success = jnp.where(update.has_verdict, update.success, last_success)
        if beliefs is not None:
            beliefs, shared = tracked.learn(beliefs, shared, update)
        pool, wait = _next_retest(state, update, config.retest_every)
        return RetestState(beliefs, last_success, pool, update.stats.now + wait, wait), shared

    def omega(state: RetestState, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        p = state.last_success
        if p is None:
            assert state.beliefs is not None
            p = mean(tracked.read(state.beliefs, shared, stats))
        value = p * (1 - p)
        # Its bin or its features say something about a prompt that was never tried.
        return value if shares_prior else jnp.where(stats.last_step < 0, 0.25, value)

    def score(state: RetestState, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        return jnp.where(state.pool == RANKED, omega(state, shared, stats), -state.due.astype(jnp.float32))

    def priority(state: RetestState, shared: PyTree, stats: PromptStats) -> Float[Array, "m"]:
        return jnp.where(state.pool == RANKED, omega(state, shared, stats), 0.0)

    def follow(
        old: tuple[RetestState, PyTree], fresh: tuple[RetestState, PyTree], places: Int[Array, "N"]
    ) -> tuple[RetestState, PyTree]:
        assert follow_beliefs is not None
        beliefs, shared = follow_beliefs((old[0].beliefs, old[1]), (fresh[0].beliefs, fresh[1]), places)
        others: RetestState = follow_rows(old[0]._replace(beliefs=None), fresh[0]._replace(beliefs=None), places)
        return others._replace(beliefs=beliefs), shared

    def merge_pools(pools: list[Ranked], step: Step, k: int, last_rollout_step: Step) -> Ranked:
        return with_retests(config, pools, step, k, last_rollout_step)

    return Scorer(
        "top",
        init,
        learn,
        score,
        pools=("ranked", "solved", "unsolved"),
        pool_ids=lambda state, stats: state.pool.astype(jnp.int32),
        merge_pools=merge_pools,
        time_dependent=tracked.changes_with_time,
        follow=follow if shares_prior else None,
        metrics=tracked.metrics,
        priority=priority,
    )


def _next_retest(
    state: RetestState, update: VisitUpdate, retest_every: int
) -> tuple[Int8[Array, "m"], Int[Array, "m"]]:
    """The pool of each visited prompt after its verdict, and the steps until its retest, doubled if it stays there."""
    new_pool = jnp.where(update.success >= 1, SOLVED, jnp.where(update.success <= 0, UNSOLVED, RANKED))
    pool = jnp.where(update.has_verdict, new_pool, state.pool)
    unchanged = (pool == state.pool) & update.has_verdict
    wait = jnp.where(unchanged, jnp.minimum(2 * state.wait, MAX_WAIT), retest_every)
    return pool.astype(jnp.int8), jnp.where(update.has_verdict, wait, state.wait)


def with_retests(config: SelectionConfig, pools: list[Ranked], step: Step, k: int, last_rollout_step: Step) -> Ranked:
    """The best k prompts of three pools, in four tiers.

    Retests that are due come first, then the ranking, then solved and unsolved prompts that are not due, then prompts
    that rest. Retests take part in the first round of each `retest_every` steps, even if the first of these steps has
    no round.
    """
    retests_due = step // config.retest_every > last_rollout_step // config.retest_every
    share = config.retest_share
    retests = max(1, round(share * k)) if share else 0
    tiers = []
    for pool, ranked in enumerate(pools):
        eligible = ranked.key > LOWEST_SCORE
        if pool == RANKED:
            tiers.append(jnp.where(eligible, 2, 0))
            continue
        order = jnp.lexsort((ranked.rows, -ranked.tie, -ranked.key))
        place = jnp.zeros(k, jnp.int32).at[order].set(jnp.arange(k, dtype=jnp.int32))
        due = eligible & (-ranked.key <= step) & retests_due & (place < retests)
        tiers.append(jnp.where(due, 3, jnp.where(eligible, 1, 0)))
    tier = jnp.concatenate(tiers)
    rows, key, tie = (jnp.concatenate([getattr(p, name) for p in pools]) for name in Ranked._fields)
    best = jnp.lexsort((rows, -tie, -key, -tier))[:k]
    return Ranked(rows[best], key[best], tie[best])
