"""From a scorer to a selector: what is kept of prompts, scored, and observed. `choice.py` draws from it.

The state is arrays over prompts and small tables above them (`tree.py`). A step writes the rows of its own prompts, of
those whose cooldown ends and, where scores change with time, of a few blocks in turn: nothing passes over all prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.per_prompt import FANOUT, follow_rows, last_of_each, padded_rows, summed
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import SelectionConfig
from pspo_jax.selection.engine import tree
from pspo_jax.selection.engine.quotas import Shares, shares_of
from pspo_jax.selection.engine.stats import (
    ELIGIBLE,
    EXCLUDED,
    RESTING,
    VisitStats,
    age_key,
    eligibility,
    init_stats,
    record_visit,
)
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate

REFRESH_STEPS = 256
"""Where scores change with time, no score is older than this many steps."""
REFRESH_BLOCKS = 128
"""At least this many blocks are scored anew at each step, so that up to 16,384 prompts are always up to date."""
LEAST, MOST = 1e-30, 1e30
"""Weights of prompts that may be drawn are kept within these."""
KEYS = {RESTING: -1e30, EXCLUDED: -2e30}
"""Keys of prompts that may not be drawn: below all scores, and above padding's -inf."""
ABLE = -1e29
"""All scores are above it."""


class Engine(NamedTuple):
    """What a selector's functions know without being told."""

    scorer: Scorer
    config: SelectionConfig
    sizes: SelectorContext
    shares: Shares

    @property
    def pools(self) -> int:
        return len(self.scorer.pools)

    @property
    def classes(self) -> int:
        return self.shares.slots * self.pools

    @property
    def cooldown(self) -> int:
        return self.config.cooldown or 0


class Levels(NamedTuple):
    """The levels above the leaves; None = the selector has no use for them."""

    best: tree.Maxima | None
    weights: tree.Sums | None
    able: tree.Sums | None
    """Counts of the prompts that may be drawn."""


class SelectorState(NamedTuple):
    """Bytes a prompt: 15 of the book, 4 of the score, 4 of the tie (mode top), 2 of the class, and the scorer's own."""

    book: VisitStats
    own: Any
    """The scorer's per-prompt arrays."""
    world: Any
    """The scorer's scalars."""
    score: Float[Array, "R"]
    """As of the last time that the prompt was scored; where it may not be drawn, its tier's key, or weight 0."""
    tie: Float[Array, "R"] | None
    label: Int[Array, "R"]
    """Class: quota and pool; -1 = padding."""
    levels: Levels
    resting: Int[Array, "cooldown rounds*B"] | None
    """Prompts of the last steps, whose cooldown will end; -1 = none. None = there is no cooldown."""
    now: Int[Array, ""]
    """The step that scores are of: the next one."""
    last_round: Int[Array, ""]
    """The last step with a round; -1 = none."""
    carry: Int[Array, "2 slots"] | None
    """How far each quota is behind its share, of all prompts and of those drawn uniformly; None = no quotas."""


class Moment(NamedTuple):
    """The fields of the state that say when it is: the last three of `SelectorState`."""

    now: Int[Array, ""]
    last_round: Int[Array, ""]
    carry: Int[Array, "2 slots"] | None


class Scored(NamedTuple):
    """Some rows, scored."""

    score: Float[Array, "m"]
    tie: Float[Array, "m"]
    label: Int[Array, "m"]
    priority: Float[Array, "m"]
    """What reports show; NaN for padding."""
    tier: Int[Array, "m"]


def engine(scorer: Scorer, config: SelectionConfig, sizes: SelectorContext) -> Engine:
    """Raises ConfigError for quotas that do not fit the tasks."""
    return Engine(scorer, config, sizes, shares_of(config.quotas, sizes.kinds))


def init(e: Engine, num_prompts: int, columns: PromptMetadata | None = None) -> SelectorState:
    """Raises ConfigError for fewer prompts than a batch takes."""
    if num_prompts < e.sizes.batch and not e.config.replacement:
        raise ConfigError(
            f"rollout.prompts={e.sizes.batch}: prompts are drawn without replacement, and there are "
            f"{num_prompts}; lower it"
        )
    rows = padded_rows(num_prompts)
    book = init_stats(num_prompts, rows, columns.kind if columns else None)
    own, world = e.scorer.init(num_prompts, rows, columns)
    width = e.sizes.rounds * e.sizes.batch
    resting = jnp.full((e.cooldown, width), -1, jnp.int32) if e.cooldown else None
    carry = jnp.zeros((2, e.shares.slots), jnp.int32) if e.shares.slots > 1 else None
    return _indexed(e, book, own, world, resting, Moment(jnp.int32(0), jnp.int32(-1), carry))


def passed(e: Engine, state: SelectorState, step: Int[Array, ""]) -> SelectorState:
    """The state at `step`, if steps have passed in which nothing was rolled out.

    Cooldowns end and scores are refreshed as in steps with a round.
    """
    if state.resting is None and not e.scorer.moves:
        return state._replace(now=jnp.maximum(state.now, step).astype(jnp.int32))
    # Nothing else changes, and what a loop carries may be copied.
    fixed = state._replace(score=None, tie=None, label=None, levels=None, resting=None, now=None)  # type: ignore[arg-type]

    def one(moving: tuple[Any, ...]) -> tuple[Any, ...]:
        score, tie, label, levels, resting, now = moving
        state = fixed._replace(score=score, tie=tie, label=label, levels=levels, resting=resting, now=now + 1)
        touched, blocks = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
        if state.resting is not None:
            slot = now % e.cooldown
            touched = jnp.maximum(state.resting[slot], 0)
            blocks = touched // FANOUT
            state = state._replace(resting=state.resting.at[slot].set(-1))
        if e.scorer.moves:
            touched, blocks = _with_turn(state, touched, blocks)
        state = _scored_anew(e, state, touched, blocks)
        return state.score, state.tie, state.label, state.levels, state.resting, state.now

    start = state.score, state.tie, state.label, state.levels, state.resting, state.now
    score, tie, label, levels, resting, now = jax.lax.while_loop(lambda moving: moving[-1] < step, one, start)
    return fixed._replace(score=score, tie=tie, label=label, levels=levels, resting=resting, now=now)


def observe(
    e: Engine, state: SelectorState, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Int[Array, ""]
) -> SelectorState:
    """The state after a round's groups. Of a prompt that is named twice, counts are of all its groups."""
    state = passed(e, state, step)
    again = state.now == step + 1
    writes, group = last_of_each(ids)
    before = take(state.book, ids)
    news = _news(e.config, outcome, PromptStats(ids, before.last, before.visits, step), group, writes)
    own, world = e.scorer.learn(take(state.own, ids), state.world, news)
    book = record_visit(before, news.judged, news.success, summed(jnp.ones_like(ids), group), step)
    place = jnp.where(writes, ids, state.score.shape[0])
    state = state._replace(
        book=_put(state.book, place, book),
        own=_put(state.own, place, own),
        world=world,
        now=jnp.asarray(step + 1, jnp.int32),
        last_round=jnp.asarray(step, jnp.int32),
    )
    touched = ids
    if state.resting is not None:
        slot = step % e.cooldown
        there = state.resting[slot]
        # A step's later rounds stand beside its first one, which took the place of those whose cooldown ends.
        ended = jnp.where(again, -1, there)
        touched = jnp.concatenate([ids, jnp.where(ended >= 0, ended, ids[0])])
        kept = jnp.where(again, there, -1)
        row = jax.lax.dynamic_update_slice(kept, ids.astype(jnp.int32), ((kept >= 0).sum(),))
        state = state._replace(resting=state.resting.at[slot].set(row))
    blocks = touched // FANOUT
    if e.scorer.moves:
        touched, blocks = _with_turn(state, touched, blocks)
    return _scored_anew(e, state, touched, blocks)


def follow(e: Engine, old: SelectorState, fresh: SelectorState, places: Int[Array, "N"]) -> SelectorState:
    """The state for changed data: visits and beliefs follow their prompts, and everything is scored anew."""
    known = jnp.where(places >= 0, places, old.score.shape[0])
    rows = jnp.arange(places.shape[0], dtype=jnp.int32)
    new_row = jnp.full(old.score.shape[0], -1, jnp.int32).at[known].set(rows, mode="drop")
    resting = old.resting
    if resting is not None:
        resting = jnp.where(resting >= 0, new_row[jnp.maximum(resting, 0)], -1)
    book = follow_rows(old.book, fresh.book, places)._replace(kind=fresh.book.kind)
    own = fresh.own if e.scorer.starts_anew else follow_rows(old.own, fresh.own, places)
    world = fresh.world if e.scorer.starts_anew else old.world
    return _indexed(e, book, own, world, resting, Moment(old.now, old.last_round, old.carry))


def evaluate(e: Engine, book: VisitStats, own: Any, world: Any, rows: Int[Array, "m"], now: Int[Array, ""]) -> Scored:
    """Score some rows; `book` and `own` are theirs."""
    look = PromptStats(rows, book.last, book.visits, now)
    able = eligibility(e.config, book, now)
    raw = e.scorer.score(own, world, look)
    tie = age_key(rows, book.last, e.sizes.seed)
    if e.scorer.tie is not None:
        tie = jnp.where(able == ELIGIBLE, e.scorer.tie(own, look), tie)
    if e.scorer.mode == "top":
        score = raw
        for level, key in KEYS.items():
            score = jnp.where(able == level, key, score)
        score = jnp.where(book.kind < 0, -jnp.inf, score)
    else:
        weight = jnp.ones(raw.shape) if e.scorer.mode == "candidates" else jnp.clip(raw, LEAST, MOST)
        score = jnp.where(able == ELIGIBLE, weight, 0.0)
    label = e.shares.slot(book.kind) * e.pools + e.scorer.pool(own, look)
    shown = raw if e.scorer.priority is None else e.scorer.priority(own, world, look)
    return Scored(
        score,
        tie,
        jnp.where(book.kind < 0, -1, label).astype(jnp.int16),
        jnp.where(book.kind < 0, jnp.nan, shown),
        able,
    )


def evaluate_all(e: Engine, state: SelectorState, now: Int[Array, ""]) -> Scored:
    """One pass over the data set."""
    return evaluate(e, state.book, state.own, state.world, jnp.arange(state.score.shape[0], dtype=jnp.int32), now)


def able_weight(e: Engine, score: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 for prompts that may be drawn, by their scores."""
    return (score > (ABLE if e.scorer.mode == "top" else 0)).astype(jnp.float32)


def take(per_prompt: Any, rows: Int[Array, "m"]) -> Any:
    """Some rows of every per-prompt array."""
    return jax.tree.map(lambda x: x[rows], per_prompt)


def _put(per_prompt: Any, rows: Int[Array, "m"], values: Any) -> Any:
    """Every per-prompt array with some rows replaced; a row beyond the end is none."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v.astype(x.dtype), mode="drop"), per_prompt, values)


def _news(
    config: SelectionConfig, outcome: RolloutOutcome, look: PromptStats, group: Array, writes: Array
) -> VisitUpdate:
    signal = outcome.rewards if config.success == "reward" or outcome.verdicts is None else outcome.verdicts
    judged = ~jnp.isnan(signal)
    if config.success_threshold is None:
        success = jnp.clip(signal, 0, 1)
    else:
        success = jnp.where(signal >= config.success_threshold, 1.0, 0.0)
    verdicts = summed(jnp.where(judged, success, 0).sum(1), group)
    count = summed(judged.sum(1).astype(jnp.float32), group)
    rewarded = ~jnp.isnan(outcome.rewards)
    low = jnp.where(rewarded, outcome.rewards, jnp.inf).min(1)
    high = jnp.where(rewarded, outcome.rewards, -jnp.inf).max(1)
    return VisitUpdate(
        look=look,
        judged=count > 0,
        successes=verdicts,
        failures=count - verdicts,
        success=verdicts / jnp.maximum(count, 1),
        mixed=high > low,
        outcome=outcome,
        writes=writes,
    )


def _indexed(e: Engine, book: VisitStats, own: Any, world: Any, resting: Array | None, at: Moment) -> SelectorState:
    """The state with everything scored: one pass."""
    rows = jnp.arange(book.last.shape[0], dtype=jnp.int32)
    found = evaluate(e, book, own, world, rows, at.now)
    top = e.scorer.mode == "top"
    levels = Levels(
        tree.build_maxima(found.score, found.tie, found.label, e.classes) if top else None,
        None if top else tree.build_sums(found.score, found.label, e.classes),
        tree.build_sums(able_weight(e, found.score), found.label, e.classes) if e.config.exploration else None,
    )
    tie = found.tie if top else None
    return SelectorState(book, own, world, found.score, tie, found.label, levels, resting, *at)


def _scored_anew(e: Engine, state: SelectorState, rows: Int[Array, "m"], blocks: Int[Array, "n"]) -> SelectorState:
    """The state with some rows, of some blocks, scored anew, and the tables above them."""
    found = evaluate(e, take(state.book, rows), take(state.own, rows), state.world, rows, state.now)
    score, label = state.score.at[rows].set(found.score), state.label.at[rows].set(found.label)
    tie = None if state.tie is None else state.tie.at[rows].set(found.tie)
    block_score, block_label = tree.block_rows(score, blocks), tree.block_rows(label, blocks)
    best, weights, able = state.levels
    if best is not None and tie is not None:
        best = tree.update_maxima(best, blocks, block_score, tree.block_rows(tie, blocks), block_label)
    if weights is not None:
        weights = tree.update_sums(weights, blocks, block_score, block_label)
    if able is not None:
        able = tree.update_sums(able, blocks, able_weight(e, block_score), block_label)
    return state._replace(score=score, tie=tie, label=label, levels=Levels(best, weights, able))


def _with_turn(
    state: SelectorState, touched: Int[Array, "m"], blocks: Int[Array, "n"]
) -> tuple[Int[Array, "m"], Int[Array, "n"]]:
    """Rows to be scored anew and their blocks, with those whose turn it is."""
    turn = _blocks_in_turn(state)
    rows = (turn[:, None] * FANOUT + jnp.arange(FANOUT, dtype=jnp.int32)).reshape(-1)
    return jnp.concatenate([touched, rows]), jnp.concatenate([blocks, turn])


def _blocks_in_turn(state: SelectorState) -> Int[Array, "n"]:
    """The blocks whose turn it is to be scored anew."""
    blocks = state.score.shape[0] // FANOUT
    count = min(blocks, max(REFRESH_BLOCKS, -(-blocks // REFRESH_STEPS)))
    # Modulo first: the product must stay within int32 however long the run is.
    return ((state.now % blocks) * count + jnp.arange(count, dtype=jnp.int32)) % blocks
