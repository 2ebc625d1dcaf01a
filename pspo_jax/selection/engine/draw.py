"""The choice of a batch: the best prompts, a weighted draw or the best candidates, exploration, filling of gaps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.selection.engine import tree
from pspo_jax.selection.engine.selector import (
    MIN_WEIGHT,
    Engine,
    SelectorState,
    advance_to,
    eligible_weight,
    take_rows,
    without_pending,
)
from pspo_jax.selection.engine.stats import PADDING, age_key, eligibility
from pspo_jax.selection.interface import PromptStats, Ranked, Step

_MIN_LOSS_WEIGHT = 1e-30
"""Smallest loss weight; no loss weight is 0."""


class QuotaPart(NamedTuple):
    """The part of a batch that one quota has. Its arrays have the size of the largest part that it can have."""

    slot: int
    """Index of the quota in `Shares.parts`."""
    preferred: Int[Array, ""] | int
    """Number of prompts that the scorer chooses."""
    explored: Int[Array, ""] | int
    """Number of prompts that are drawn uniformly."""
    max_preferred: int
    """Upper bound of `preferred`."""
    max_explored: int
    """Upper bound of `explored`."""


def select(
    engine: Engine,
    state: SelectorState,
    key: Key[Array, ""],
    step: Step,
    batch: int,
    pending: Int[Array, "m"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"], SelectorState]:
    """Ids [batch], loss weights [batch] in (0, 1], and the state at `step` with the quotas' carry after this batch.

    Args:
      pending: prompts that are drawn only where there are no others, -1 = none.
    """
    after = advance_to(engine, state, step)
    state = after if pending is None else without_pending(engine, after, pending)
    parts, carry = _divide_batch(engine, state, batch)
    chosen = [_choose_part(engine, state, part, jax.random.fold_in(key, part.slot), step, pending) for part in parts]
    ids, used, chance = (jnp.concatenate(x) for x in zip(*chosen, strict=True))
    if engine.shares.slots > 1:
        places = jnp.argsort(~used, stable=True)[:batch]
        # If a task has fewer prompts than its quota takes, prompts of other tasks fill the gaps; none comes twice.
        ids = _fill_gaps(engine, state, None, ids[places], jnp.ones(batch, bool), step, pending)
        chance = chance[places]
    beta = annealed(engine.config.correction or 0.0, engine.config.correction_end, step, engine.context.steps)
    # A prompt that did not come by its weight has no probability of its own; it counts as the likeliest of the batch.
    likeliest = chance.max()
    chance = jnp.where(chance > 0, chance, jnp.where(likeliest > 0, likeliest, 1.0))
    least = chance.min()
    weight = jnp.exp(beta * jnp.log(jnp.maximum(least / chance, _MIN_LOSS_WEIGHT)))
    weight = jnp.where(chance <= least, 1.0, jnp.clip(weight, _MIN_LOSS_WEIGHT, 1.0))
    return ids, weight, after._replace(carry=carry)


def _divide_batch(
    engine: Engine, state: SelectorState, batch: int
) -> tuple[list[QuotaPart], Int[Array, "2 slots"] | None]:
    """The part of each quota in the batch, and the carry afterwards (see `SelectorState.carry`)."""
    explored = round(engine.config.exploration * batch)
    shares = engine.shares
    if state.carry is None:
        return [QuotaPart(0, batch - explored, explored, batch - explored, explored)], None
    counts, carry = shares.divide(state.carry[0], batch)
    uniform, carry_uniform = shares.divide_within(state.carry[1], explored, counts)
    parts = []
    for slot, part in enumerate(shares.parts):
        # This bound holds for any carry; the tighter `Shares.most` holds only if all batches have one size.
        most = min(batch, (batch * part + 2 * shares.total - 1) // shares.total)
        parts.append(QuotaPart(slot, counts[slot] - uniform[slot], uniform[slot], most, min(most, explored)))
    return parts, jnp.stack([carry, carry_uniform])


def annealed(start: float, end: float | None, step: Step, steps: int) -> Float[Array, ""]:
    """A value that goes linearly from `start` at step 0 to `end` at the last step; `end` None = it stays at `start`."""
    if end is None:
        return jnp.float32(start)
    return start + (end - start) * jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)


def _choose_part(
    engine: Engine,
    state: SelectorState,
    part: QuotaPart,
    key: Key[Array, ""],
    step: Step,
    pending: Int[Array, "m"] | None,
) -> tuple[Int[Array, "k"], Bool[Array, "k"], Float[Array, "k"]]:
    """Prompts of one quota, whether each place is used, and each prompt's inclusion probability."""
    main_key, explore_key = jax.random.split(key)
    none = jnp.zeros(0, jnp.int32)
    ids = _preferred(engine, state, part.slot, part.max_preferred, main_key, step) if part.max_preferred else none
    used = jnp.arange(part.max_preferred) < part.preferred
    if part.max_explored:
        taken = jnp.where(used, ids, -1)
        ids = jnp.concatenate([ids, _explored(engine, state, part.slot, part.max_explored, explore_key, taken)])
        used = jnp.concatenate([used, jnp.arange(part.max_explored) < part.explored])
    ids = _fill_gaps(engine, state, part.slot, ids, used, step, pending)
    return ids, used, _inclusion_probability(engine, state, part, ids)


def _preferred(engine: Engine, state: SelectorState, slot: int, k: int, key: Array, step: Step) -> Int[Array, "k"]:
    """The k prompts of a quota that the scorer chooses; -1 = there are no more.

    With several quotas the best prompts come first, as only some of the k places may be used.
    """
    scorer, levels = engine.scorer, state.levels
    if scorer.mode == "top":
        assert levels.best is not None and state.tie is not None
        lists = [
            Ranked(*tree.top(levels.best, slot * engine.pools + p, state.score, state.tie, state.label, k))
            for p in range(engine.pools)
        ]
        ranked = lists[0] if scorer.merge_pools is None else scorer.merge_pools(lists, step, k, state.last_rollout_step)
        rows = jnp.where(ranked.key > -jnp.inf, ranked.rows, -1)
        if scorer.merge_pools is None and engine.shares.slots > 1:
            rows = rows[jnp.lexsort((ranked.rows, -ranked.tie, -ranked.key))]
        return rows
    assert levels.weights is not None
    leaves = tree.Leaves(state.score, state.label, slot)
    if scorer.mode == "draw":
        if engine.config.replacement:
            return tree.descend(levels.weights, leaves, key, k)
        return tree.draw(levels.weights, leaves, key, k)
    pool_key, score_key = jax.random.split(key)
    size = max(k, min(k * engine.config.candidates, state.score.shape[0]))
    pool = tree.draw(levels.weights, leaves, pool_key, size)
    rows = jnp.maximum(pool, 0)
    visit_stats = take_rows(state.visit_stats, rows)
    assert scorer.candidate_score is not None
    value = scorer.candidate_score(
        score_key,
        take_rows(state.per_prompt, rows),
        state.shared,
        PromptStats(rows, visit_stats.last_step, visit_stats.visits, step),
    )
    return pool[jax.lax.top_k(jnp.where(pool >= 0, value, -jnp.inf), k)[1]]


def _explored(engine: Engine, state: SelectorState, slot: int, k: int, key: Array, taken: Array) -> Int[Array, "k"]:
    """k eligible prompts of a quota that are not in `taken`, drawn uniformly."""
    eligible = state.levels.eligible
    assert eligible is not None
    first = slot * engine.pools
    merged = tree.Sums(*(x[first : first + engine.pools].sum(0, keepdims=True) for x in eligible))
    leaves = tree.Leaves(
        state.score,
        state.label,
        0,
        lambda score: eligible_weight(engine, score),
        lambda label: label // engine.pools == slot,
    )
    return tree.draw(merged, leaves, key, k, taken)


def _fill_gaps(
    engine: Engine,
    state: SelectorState,
    slot: int | None,
    ids: Int[Array, "k"],
    used: Bool[Array, "k"],
    step: Step,
    pending: Int[Array, "m"] | None,
) -> Int[Array, "k"]:
    """`ids` with its gaps filled by ineligible prompts: resting ones, then excluded and pending ones, the oldest visit
    first.

    Args:
      slot: the quota whose prompts fill the gaps; None = all prompts.
      ids: chosen prompts; -1 = a gap.
      used: whether each place belongs to the batch.
    Returns:
      ids, with -1 where the quota has no more prompts.
    """

    def fill() -> Array:
        rows = jnp.arange(state.score.shape[0], dtype=jnp.int32)
        in_quota = state.label >= 0 if slot is None else (state.label // engine.pools == slot) & (state.label >= 0)
        key = jnp.where(in_quota, -eligibility(engine.config, state.visit_stats, step).astype(jnp.float32), -jnp.inf)
        if pending is not None:
            last = jnp.where(key > -jnp.inf, -float(PADDING), key)
            key = key.at[jnp.where(pending >= 0, pending, len(rows))].min(last[pending], mode="drop")
        if not engine.config.replacement:
            key = key.at[jnp.where(used & (ids >= 0), ids, len(rows))].set(-jnp.inf, mode="drop")
        tie, label = age_key(rows, state.visit_stats.last_step, engine.context.seed), jnp.where(in_quota, 0, -1)
        best = tree.top(tree.build_maxima(key, tie, label, 1), 0, key, tie, label, len(ids))
        order = jnp.lexsort((-best[2], -best[1]))
        # With replacement there may be fewer prompts than gaps; the prompts then fill the gaps in turns.
        available = (best[1] > -jnp.inf).sum()
        gap = jnp.maximum(jnp.cumsum(used & (ids < 0)) - 1, 0)
        gap = gap % jnp.maximum(available, 1) if engine.config.replacement else gap
        return jnp.where(ids >= 0, ids, jnp.where(gap < available, best[0][order][gap], -1))

    return jax.lax.cond((used & (ids < 0)).any(), fill, lambda: ids).astype(jnp.int32)


def _inclusion_probability(
    engine: Engine, state: SelectorState, part: QuotaPart, ids: Int[Array, "k"]
) -> Float[Array, "k"]:
    """P(q) of each prompt at this draw; 0 if it did not come by its weight, or if selection.correction is off.

    A prompt that fills a gap did not come by its weight. Neither did a prompt of the smallest weight, which is drawn
    only if no others are left.
    """
    if engine.scorer.mode != "draw" or not (engine.config.correction or engine.config.correction_end):
        return jnp.zeros(len(ids))
    assert state.levels.weights is not None
    weight = state.score[ids]
    p = weight / state.levels.weights.two[part.slot].sum()
    if part.max_explored:
        assert state.levels.eligible is not None
        explored = part.explored / (part.preferred + part.explored)
        p = (1 - explored) * p + explored / state.levels.eligible.two[part.slot].sum()
    return jnp.where((ids >= 0) & (weight > MIN_WEIGHT), p * engine.shares.share(part.slot), 0.0)
