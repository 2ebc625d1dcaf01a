"""The choice of a batch: the best, draws in proportion, or candidates; exploration; and what fills a gap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pspo_jax.selection import tree
from pspo_jax.selection.base import Look, Ranked
from pspo_jax.selection.book import by_age, tier
from pspo_jax.selection.engine import Engine, SelectorState, able_weight, take


def select(
    e: Engine, state: SelectorState, key: Key[Array, ""], step: Int[Array, ""], batch: int
) -> tuple[Int[Array, "B"], Float[Array, "B"], SelectorState]:
    """Ids, loss weights, and the state, which a choice does not change."""
    ids, log_p = [], []
    for slot, count in enumerate(e.shares.counts(batch)):
        if count:
            found, chance = _choose(e, state, slot, count, jax.random.fold_in(key, slot), step)
            ids.append(found)
            log_p.append(chance + jnp.log(jnp.float32(count / batch)))
    beta = annealed(e.config.correction or 0.0, e.config.correction_end, step, e.sizes.steps)
    log_weight = -beta * jnp.concatenate(log_p)
    return jnp.concatenate(ids), jnp.exp(log_weight - log_weight.max()), state


def annealed(start: float, end: float | None, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """From `start` at step 0 to `end` at the last step, linearly; None = it stays."""
    if end is None:
        return jnp.float32(start)
    return start + (end - start) * jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)


def _choose(
    e: Engine, state: SelectorState, slot: int, k: int, key: Key[Array, ""], step: Int[Array, ""]
) -> tuple[Int[Array, "k"], Float[Array, "k"]]:
    """k prompts of a quota, and the logarithms of their probabilities if they are drawn in proportion."""
    main_key, explore_key = jax.random.split(key)
    explored = round(e.config.exploration * k)
    ids = _main(e, state, slot, k - explored, main_key, step) if explored < k else jnp.zeros(0, jnp.int32)
    if explored:
        ids = jnp.concatenate([ids, _uniform(e, state, slot, explored, explore_key, ids)])
    ids = _filled(e, state, slot, ids, step)
    return ids, _log_p(e, state, slot, ids, explored / k)


def _main(e: Engine, state: SelectorState, slot: int, k: int, key: Array, step: Array) -> Int[Array, "k"]:
    """What the selector prefers; -1 = there is nothing more to be had."""
    scorer, levels = e.scorer, state.levels
    if scorer.mode == "top":
        assert levels.best is not None and state.tie is not None
        lists = [
            Ranked(*tree.top(levels.best, slot * e.pools + p, state.score, state.tie, state.label, k))
            for p in range(e.pools)
        ]
        ranked = lists[0] if scorer.merge is None else scorer.merge(lists, step, k)
        return jnp.where(ranked.key > -jnp.inf, ranked.rows, -1)
    assert levels.weights is not None
    leaves = tree.Leaves(state.score, state.label, slot)
    if scorer.mode == "draw":
        if e.config.replacement:
            return tree.descend(levels.weights, leaves, key, k)
        return tree.draw(levels.weights, leaves, key, k)
    pool_key, score_key = jax.random.split(key)
    size = max(k, min(k * e.config.candidates, state.score.shape[0]))
    pool = tree.draw(levels.weights, leaves, pool_key, size)
    rows = jnp.maximum(pool, 0)
    book = take(state.book, rows)
    assert scorer.candidate_score is not None
    value = scorer.candidate_score(
        score_key, take(state.own, rows), state.world, Look(rows, book.last, book.visits, step)
    )
    return pool[jax.lax.top_k(jnp.where(pool >= 0, value, -jnp.inf), k)[1]]


def _uniform(e: Engine, state: SelectorState, slot: int, k: int, key: Array, taken: Array) -> Int[Array, "k"]:
    """Prompts of a quota that may be drawn and are not taken, each as likely as another."""
    able = state.levels.able
    assert able is not None
    first = slot * e.pools
    merged = tree.Sums(*(x[first : first + e.pools].sum(0, keepdims=True) for x in able))
    leaves = tree.Leaves(
        state.score, state.label, 0, lambda score: able_weight(e, score), lambda label: label // e.pools == slot
    )
    return tree.draw(merged, leaves, key, k, taken)


def _filled(e: Engine, state: SelectorState, slot: int, ids: Int[Array, "k"], step: Array) -> Int[Array, "k"]:
    """The batch with its gaps filled by prompts that may not be drawn: resting, then excluded, the oldest first."""

    def fill() -> Array:
        rows = jnp.arange(state.score.shape[0], dtype=jnp.int32)
        own = (state.label // e.pools == slot) & (state.label >= 0)
        key = jnp.where(own, -tier(e.config, state.book, step).astype(jnp.float32), -jnp.inf)
        key = key.at[jnp.where(ids >= 0, ids, len(rows))].set(-jnp.inf, mode="drop")
        tie, label = by_age(rows, state.book.last, e.sizes.seed), jnp.where(own, 0, -1)
        best = tree.top(tree.build_maxima(key, tie, label, 1), 0, key, tie, label, len(ids))
        order = jnp.lexsort((-best[2], -best[1]))
        gap = jnp.cumsum(ids < 0) - 1
        return jnp.where(ids >= 0, ids, best[0][order][jnp.maximum(gap, 0)])

    return jax.lax.cond((ids < 0).any(), fill, lambda: ids).astype(jnp.int32)


def _log_p(e: Engine, state: SelectorState, slot: int, ids: Int[Array, "k"], explored: float) -> Float[Array, "k"]:
    """log P(q) of each prompt within its quota, at the draw; 0 where there is nothing to correct for."""
    if e.scorer.mode != "draw" or not (e.config.correction or e.config.correction_end):
        return jnp.zeros(len(ids))
    assert state.levels.weights is not None
    weight = state.score[ids]
    p = (1 - explored) * weight / state.levels.weights.two[slot].sum()
    if explored:
        assert state.levels.able is not None
        p = p + explored / state.levels.able.two[slot].sum()
    # A prompt that fills a gap was not drawn in proportion to anything: it counts as the likeliest of the batch.
    likeliest = jnp.where(weight > 0, p, 0.0).max()
    return jnp.log(jnp.where(weight > 0, p, jnp.where(likeliest > 0, likeliest, 1.0)))
