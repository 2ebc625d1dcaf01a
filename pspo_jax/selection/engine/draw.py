"""The choice of a batch: the best, draws in proportion, or candidates; exploration; and what fills a gap."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.selection.engine import tree
from pspo_jax.selection.engine.selector import LEAST, Engine, SelectorState, able_weight, passed, take
from pspo_jax.selection.engine.stats import age_key, eligibility
from pspo_jax.selection.interface import PromptStats, Ranked

_SMALLEST = 1e-30
"""The smallest loss weight: none is 0."""


class Part(NamedTuple):
    """A quota's part of a batch. Shapes are those of the most that it can be."""

    slot: int
    preferred: Int[Array, ""] | int
    """Prompts that the selector prefers."""
    explored: Int[Array, ""] | int
    """Prompts that are drawn uniformly."""
    most_preferred: int
    most_explored: int


def select(
    e: Engine, state: SelectorState, key: Key[Array, ""], step: Int[Array, ""], batch: int
) -> tuple[Int[Array, "B"], Float[Array, "B"], SelectorState]:
    """Ids, loss weights, and the state: at `step`, and with what each quota is behind its share after this batch."""
    state = passed(e, state, step)
    parts, carry = _parts(e, state, batch)
    chosen = [_choose(e, state, part, jax.random.fold_in(key, part.slot), step) for part in parts]
    ids, used, chance = (jnp.concatenate(x) for x in zip(*chosen, strict=True))
    if e.shares.slots > 1:
        places = jnp.argsort(~used, stable=True)[:batch]
        # A task may have fewer prompts than its quota takes: others stand in, none comes twice.
        ids = _filled(e, state, None, ids[places], jnp.ones(batch, bool), step)
        chance = chance[places]
    beta = annealed(e.config.correction or 0.0, e.config.correction_end, step, e.sizes.steps)
    # What did not come by its weight has no chance of its own: it counts as the likeliest of the batch.
    likeliest = chance.max()
    chance = jnp.where(chance > 0, chance, jnp.where(likeliest > 0, likeliest, 1.0))
    least = chance.min()
    weight = jnp.exp(beta * jnp.log(jnp.maximum(least / chance, _SMALLEST)))
    weight = jnp.where(chance <= least, 1.0, jnp.clip(weight, _SMALLEST, 1.0))
    return ids, weight, state._replace(carry=carry)


def _parts(e: Engine, state: SelectorState, batch: int) -> tuple[list[Part], Int[Array, "2 slots"] | None]:
    """How the batch is divided among quotas, and what each is behind afterwards."""
    explored = round(e.config.exploration * batch)
    shares = e.shares
    if state.carry is None:
        return [Part(0, batch - explored, explored, batch - explored, explored)], None
    counts, carry = shares.divide(state.carry[0], batch)
    uniform, carry_uniform = shares.divide_within(state.carry[1], explored, counts)
    parts = []
    for slot, part in enumerate(shares.parts):
        # Whatever the carry: `Shares.most` is for batches of one size.
        most = min(batch, (batch * part + 2 * shares.whole - 1) // shares.whole)
        parts.append(Part(slot, counts[slot] - uniform[slot], uniform[slot], most, min(most, explored)))
    return parts, jnp.stack([carry, carry_uniform])


def annealed(start: float, end: float | None, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """From `start` at step 0 to `end` at the last step, linearly; None = it stays."""
    if end is None:
        return jnp.float32(start)
    return start + (end - start) * jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)


def _choose(
    e: Engine, state: SelectorState, part: Part, key: Key[Array, ""], step: Int[Array, ""]
) -> tuple[Int[Array, "k"], Bool[Array, "k"], Float[Array, "k"]]:
    """Prompts of a quota, which of these places are used, and the probability of each; 0 = it did not come by one."""
    main_key, explore_key = jax.random.split(key)
    none = jnp.zeros(0, jnp.int32)
    ids = _main(e, state, part.slot, part.most_preferred, main_key, step) if part.most_preferred else none
    used = jnp.arange(part.most_preferred) < part.preferred
    if part.most_explored:
        taken = jnp.where(used, ids, -1)
        ids = jnp.concatenate([ids, _uniform(e, state, part.slot, part.most_explored, explore_key, taken)])
        used = jnp.concatenate([used, jnp.arange(part.most_explored) < part.explored])
    ids = _filled(e, state, part.slot, ids, used, step)
    return ids, used, _inclusion_probability(e, state, part, ids)


def _main(e: Engine, state: SelectorState, slot: int, k: int, key: Array, step: Array) -> Int[Array, "k"]:
    """What the selector prefers, with several quotas the best first; -1 = there is nothing more to be had."""
    scorer, levels = e.scorer, state.levels
    if scorer.mode == "top":
        assert levels.best is not None and state.tie is not None
        lists = [
            Ranked(*tree.top(levels.best, slot * e.pools + p, state.score, state.tie, state.label, k))
            for p in range(e.pools)
        ]
        ranked = lists[0] if scorer.merge is None else scorer.merge(lists, step, k, state.last_round)
        rows = jnp.where(ranked.key > -jnp.inf, ranked.rows, -1)
        if scorer.merge is None and e.shares.slots > 1:
            rows = rows[jnp.lexsort((ranked.rows, -ranked.tie, -ranked.key))]
        return rows
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
        score_key, take(state.own, rows), state.world, PromptStats(rows, book.last, book.visits, step)
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


def _filled(
    e: Engine, state: SelectorState, slot: int | None, ids: Int[Array, "k"], used: Bool[Array, "k"], step: Array
) -> Int[Array, "k"]:
    """The batch with its gaps filled by prompts that may not be drawn: resting, then excluded, the oldest first.

    Args:
      slot: the quota whose prompts fill them; None = any. -1 = it has no more.
    """

    def fill() -> Array:
        rows = jnp.arange(state.score.shape[0], dtype=jnp.int32)
        own = state.label >= 0 if slot is None else (state.label // e.pools == slot) & (state.label >= 0)
        key = jnp.where(own, -eligibility(e.config, state.book, step).astype(jnp.float32), -jnp.inf)
        if not e.config.replacement:
            key = key.at[jnp.where(used & (ids >= 0), ids, len(rows))].set(-jnp.inf, mode="drop")
        tie, label = age_key(rows, state.book.last, e.sizes.seed), jnp.where(own, 0, -1)
        best = tree.top(tree.build_maxima(key, tie, label, 1), 0, key, tie, label, len(ids))
        order = jnp.lexsort((-best[2], -best[1]))
        # With replacement there may be fewer prompts than gaps, which then hold them in turns.
        there = (best[1] > -jnp.inf).sum()
        gap = jnp.maximum(jnp.cumsum(used & (ids < 0)) - 1, 0)
        gap = gap % jnp.maximum(there, 1) if e.config.replacement else gap
        return jnp.where(ids >= 0, ids, jnp.where(gap < there, best[0][order][gap], -1))

    return jax.lax.cond((used & (ids < 0)).any(), fill, lambda: ids).astype(jnp.int32)


def _inclusion_probability(e: Engine, state: SelectorState, part: Part, ids: Int[Array, "k"]) -> Float[Array, "k"]:
    """P(q) of each prompt in the batch at the draw; 0 where it did not come by its weight, or nothing is corrected.

    Prompts that fill a gap did not come by their weight, nor did those whose weight is the least there is: they are
    drawn where no others are left.
    """
    if e.scorer.mode != "draw" or not (e.config.correction or e.config.correction_end):
        return jnp.zeros(len(ids))
    assert state.levels.weights is not None
    weight = state.score[ids]
    p = weight / state.levels.weights.two[part.slot].sum()
    if part.most_explored:
        assert state.levels.able is not None
        explored = part.explored / (part.preferred + part.explored)
        p = (1 - explored) * p + explored / state.levels.able.two[part.slot].sum()
    return jnp.where((ids >= 0) & (weight > LEAST), p * e.shares.share(part.slot), 0.0)
