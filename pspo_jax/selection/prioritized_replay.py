"""Prioritized Replay (Fatemi, arXiv 2601.02648): problems ranked by p (1 - p), solved and unsolved ones retested.

    priority omega = mean (r_i - p)^2 = p (1 - p),   p the success probability of the problem

A problem whose group was all right (p = 1, solved) or all wrong (p = 0, unsolved) leaves the ranking for a pool. Every
`retest_every` steps a share of the batch is filled from each pool, those due first that have been due longest; a retest
that changes nothing doubles the problem's own wait, and a mixed group brings it back. The paper leaves the periods and
shares open; these are ours. Problems that were never tried have omega = 1/4, the largest there is.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.beliefs import Beliefs, Population, current, init_beliefs, mean
from pspo_jax.selection.engine.selector import ABLE
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Ranked, Scorer, SelectorContext, VisitUpdate
from pspo_jax.selection.posterior import tracker

RANKED, SOLVED, UNSOLVED = 0, 1, 2
MAX_WAIT = 2**20


class ReplayState(NamedTuple):
    beliefs: Beliefs | None
    last: Float[Array, "R"] | None
    """Mean success of the last group, where that is the estimate; 1/2 before there is one."""
    pool: Int[Array, "R"]
    due: Int[Array, "R"]
    """Of a problem in a pool, the step from which it may be retested."""
    wait: Int[Array, "R"]


def prioritized_replay(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """The top B by omega, ties by the oldest visit, with retests."""
    _, learn_beliefs = tracker(forgetting)
    by_last = config.estimate == "last"

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[ReplayState, Population]:
        beliefs, population = init_beliefs(forgetting, rows)
        own = ReplayState(
            beliefs=None if by_last else beliefs,
            last=jnp.full(rows, 0.5, jnp.float32) if by_last else None,
            pool=jnp.zeros(rows, jnp.int8),
            due=jnp.zeros(rows, jnp.int32),
            wait=jnp.zeros(rows, jnp.int32),
        )
        return own, population

    def learn(own: ReplayState, world: Population, news: VisitUpdate) -> tuple[ReplayState, Population]:
        beliefs, last = own.beliefs, own.last
        if last is not None:
            last = jnp.where(news.judged, news.success, last)
        else:
            beliefs, world = learn_beliefs(beliefs, world, news)
        found = jnp.where(news.success >= 1, SOLVED, jnp.where(news.success <= 0, UNSOLVED, RANKED))
        pool = jnp.where(news.judged, found, own.pool)
        same = (pool == own.pool) & news.judged
        wait = jnp.where(same, jnp.minimum(2 * own.wait, MAX_WAIT), config.retest_every)
        wait = jnp.where(news.judged, wait, own.wait)
        return ReplayState(beliefs, last, pool.astype(jnp.int8), news.look.now + wait, wait), world

    def omega(own: ReplayState, world: Population, look: PromptStats) -> Float[Array, "m"]:
        p = own.last
        if p is None:
            assert own.beliefs is not None
            p = mean(current(forgetting, own.beliefs, world, look.last, look.now))
        return jnp.where(look.last < 0, 0.25, p * (1 - p))

    def score(own: ReplayState, world: Population, look: PromptStats) -> Float[Array, "m"]:
        return jnp.where(own.pool == RANKED, omega(own, world, look), -own.due.astype(jnp.float32))

    def merge(pools: list[Ranked], step: Int[Array, ""], k: int, last_round: Int[Array, ""]) -> Ranked:
        return with_retests(config, pools, step, k, last_round)

    return Scorer(
        "top",
        init,
        learn,
        score,
        pools=("ranked", "solved", "unsolved"),
        pool=lambda own, look: own.pool.astype(jnp.int32),
        merge=merge,
        moves=forgetting.shrinkage > 0,
        priority=lambda own, world, look: jnp.where(own.pool == RANKED, omega(own, world, look), 0.0),
    )


def with_retests(
    config: SelectionConfig, pools: list[Ranked], step: Int[Array, ""], k: int, last_round: Int[Array, ""]
) -> Ranked:
    """The batch: retests that are due, then the ranking, then pools whose time has not come, then what rests.

    Retests have their turn in the first round of each `retest_every` steps, whether or not their first step has one.
    """
    turn = step // config.retest_every > last_round // config.retest_every
    share = config.retest_share
    retests = max(1, round(share * k)) if share else 0
    tiers = []
    for pool, ranked in enumerate(pools):
        able = ranked.key > ABLE
        if pool == RANKED:
            tiers.append(jnp.where(able, 2, 0))
            continue
        order = jnp.lexsort((ranked.rows, -ranked.tie, -ranked.key))
        place = jnp.zeros(k, jnp.int32).at[order].set(jnp.arange(k, dtype=jnp.int32))
        due = able & (-ranked.key <= step) & turn & (place < retests)
        tiers.append(jnp.where(due, 3, jnp.where(able, 1, 0)))
    tier = jnp.concatenate(tiers)
    rows, key, tie = (jnp.concatenate([getattr(p, name) for p in pools]) for name in Ranked._fields)
    best = jnp.lexsort((rows, -tie, -key, -tier))[:k]
    return Ranked(rows[best], key[best], tie[best])
