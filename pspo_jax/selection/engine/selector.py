"""The state that turns a scorer into a selector, and the functions that update it; `draw.py` draws batches from it.

The state is arrays over prompts and small tables above them (`tree.py`). A step writes three kinds of rows: its own
prompts, prompts whose cooldown ends and, where scores change with time, a few blocks in turn. No step passes over all
prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

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
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, Step, VisitUpdate

REFRESH_STEPS = 256
"""Largest age of a score in steps, where scores change with time."""
REFRESH_BLOCKS = 128
"""Smallest number of blocks that are scored anew at each step; up to 16,384 prompts are therefore always up to date."""
MIN_WEIGHT, MAX_WEIGHT = 1e-30, 1e30
"""Bounds to which the weights of eligible prompts are clipped."""
INELIGIBLE_KEYS = {RESTING: -1e30, EXCLUDED: -2e30}
"""Keys that stand in for the scores of ineligible prompts: below all scores, and above padding's -inf."""
PENDING_KEY = -3e30
"""Key that stands in for the score of a prompt whose group is pending."""
_NO_BLOCK = 2**30
"""Index of a block that no tree has."""
LOWEST_SCORE = -1e29
"""Lower bound of the scores of eligible prompts."""


class Engine(NamedTuple):
    """Static settings that all functions of a selector share."""

    scorer: Scorer
    config: SelectionConfig
    context: SelectorContext
    shares: Shares

    @property
    def pools(self) -> int:
        """Number of the scorer's pools."""
        return len(self.scorer.pools)

    @property
    def classes(self) -> int:
        """Number of classes, a quota slot and a pool each; class = slot x pools + pool."""
        return self.shares.slots * self.pools

    @property
    def cooldown(self) -> int:
        """Steps for which a prompt rests after a visit."""
        return self.config.cooldown or 0


class Levels(NamedTuple):
    """The tree's levels above the leaves; None = this selector does not need them."""

    best: tree.Maxima | None
    """Largest scores, in mode "top"."""
    weights: tree.Sums | None
    """Sums of weights, in the other modes."""
    eligible: tree.Sums | None
    """Counts of eligible prompts, with exploration."""


class SelectorState(NamedTuple):
    """The state of every selector that is made from a scorer.

    A prompt takes 15 bytes for visits, 4 for the score, 4 for the tie-breaker (mode "top"), 2 for the class, and the
    scorer's own arrays.
    """

    visit_stats: VisitStats
    per_prompt: PyTree
    """Per-prompt arrays of the scorer, [R, ...] each."""
    shared: PyTree
    """Shared state of the scorer."""
    score: Float[Array, "R"]
    """Score or weight of each prompt when it was last scored. An ineligible prompt has a key of `INELIGIBLE_KEYS` in
    mode "top" and weight 0 in the other modes."""
    tie: Float[Array, "R"] | None
    """Order of prompts with equal scores, larger = earlier; None = the mode is not "top"."""
    label: Int[Array, "R"]
    """Class of each prompt, see `Engine.classes`; -1 = padding."""
    levels: Levels
    resting: Int[Array, "cooldown rounds*B"] | None
    """Rows of the prompts that rest, by the step of their visit modulo the cooldown; -1 = none. None = there is no
    cooldown."""
    now: Int[Array, ""]
    """The next step; scores are those of this step."""
    last_rollout_step: Step
    """The last step with a round; -1 = none."""
    carry: Int[Array, "2 slots"] | None
    """Amount by which each quota is behind its share, of all prompts and of the uniformly drawn ones, in units of
    1 / `Shares.total` of a prompt; None = there are no quotas."""


class Clock(NamedTuple):
    """The last three fields of `SelectorState`."""

    now: Int[Array, ""]
    last_rollout_step: Step
    carry: Int[Array, "2 slots"] | None


class ScoredRows(NamedTuple):
    """Scores of m rows; the fields mean what they mean in `SelectorState`."""

    score: Float[Array, "m"]
    tie: Float[Array, "m"]
    label: Int[Array, "m"]
    priority: Float[Array, "m"]
    """Priority for reports; NaN for padding."""
    tier: Int[Array, "m"]
    """ELIGIBLE, RESTING, EXCLUDED or PADDING."""


class _Changing(NamedTuple):
    """The fields of the state that change in a step without a round."""

    score: Float[Array, "R"]
    tie: Float[Array, "R"] | None
    label: Int[Array, "R"]
    levels: Levels
    resting: Int[Array, "cooldown rounds*B"] | None
    now: Int[Array, ""]


def make_engine(scorer: Scorer, config: SelectionConfig, context: SelectorContext) -> Engine:
    """The settings of a selector.

    Raises:
      ConfigError: selection.quotas do not fit the tasks.
    """
    return Engine(scorer, config, context, shares_of(config.quotas, context.task_names))


def init(engine: Engine, num_prompts: int, metadata: PromptMetadata | None = None) -> SelectorState:
    """The state before the first step.

    Raises:
      ConfigError: there are fewer prompts than a batch takes.
    """
    if num_prompts < engine.context.batch and not engine.config.replacement:
        raise ConfigError(
            f"rollout.prompts={engine.context.batch}: prompts are drawn without replacement, and there are "
            f"{num_prompts}; lower it"
        )
    rows = padded_rows(num_prompts)
    visit_stats = init_stats(num_prompts, rows, metadata.task_ids if metadata else None)
    per_prompt, shared = engine.scorer.init(num_prompts, rows, metadata)
    width = engine.context.rounds * engine.context.batch
    resting = jnp.full((engine.cooldown, width), -1, jnp.int32) if engine.cooldown else None
    carry = jnp.zeros((2, engine.shares.slots), jnp.int32) if engine.shares.slots > 1 else None
    return _build_state(engine, visit_stats, per_prompt, shared, resting, Clock(jnp.int32(0), jnp.int32(-1), carry))


def advance_to(engine: Engine, state: SelectorState, step: Step) -> SelectorState:
    """The state at `step`, after any steps without a round.

    In such steps, too, cooldowns end and scores are refreshed.
    """
    if state.resting is None and not engine.scorer.time_dependent:
        return state._replace(now=jnp.maximum(state.now, step).astype(jnp.int32))

    before = state

    def one_step(changing: _Changing) -> _Changing:
        state = before._replace(**changing._asdict())
        now = state.now
        state = state._replace(now=now + 1)
        touched, blocks = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
        if state.resting is not None:
            slot = now % engine.cooldown
            touched = jnp.maximum(state.resting[slot], 0)
            blocks = touched // FANOUT
            state = state._replace(resting=state.resting.at[slot].set(-1))
        if engine.scorer.time_dependent:
            touched, blocks = _add_refreshed(state, touched, blocks)
        state = _rescore(engine, state, touched, blocks)
        return _changing(state)

    # The loop carries only the fields that change, because XLA may copy all that a loop carries.
    after = jax.lax.while_loop(lambda changing: changing.now < step, one_step, _changing(state))
    return before._replace(**after._asdict())


def _changing(state: SelectorState) -> _Changing:
    return _Changing(state.score, state.tie, state.label, state.levels, state.resting, state.now)


def observe(
    engine: Engine, state: SelectorState, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step
) -> SelectorState:
    """The state after a round. If a prompt is twice in the batch, its counts are sums over all its groups."""
    state = advance_to(engine, state, step)
    has_earlier_round = state.now == step + 1
    is_last_entry, group = last_of_each(ids)
    before = take_rows(state.visit_stats, ids)
    stats = PromptStats(ids, before.last_step, before.visits, step)
    update = visit_update(engine.config, outcome, stats, group, is_last_entry)
    per_prompt, shared = engine.scorer.learn(take_rows(state.per_prompt, ids), state.shared, update)
    visit_stats = record_visit(before, update.has_verdict, update.success, summed(jnp.ones_like(ids), group), step)
    place = jnp.where(is_last_entry, ids, state.score.shape[0])
    state = state._replace(
        visit_stats=put_rows(state.visit_stats, place, visit_stats),
        per_prompt=put_rows(state.per_prompt, place, per_prompt),
        shared=shared,
        now=jnp.asarray(step + 1, jnp.int32),
        last_rollout_step=jnp.asarray(step, jnp.int32),
    )
    touched = ids
    if state.resting is not None:
        slot = step % engine.cooldown
        held = state.resting[slot]
        # The first round of a step takes the place of the prompts whose cooldown ends; later rounds are added to it.
        ended = jnp.where(has_earlier_round, -1, held)
        touched = jnp.concatenate([ids, jnp.where(ended >= 0, ended, ids[0])])
        kept = jnp.where(has_earlier_round, held, -1)
        row = jax.lax.dynamic_update_slice(kept, ids.astype(jnp.int32), ((kept >= 0).sum(),))
        state = state._replace(resting=state.resting.at[slot].set(row))
    blocks = touched // FANOUT
    if engine.scorer.time_dependent:
        touched, blocks = _add_refreshed(state, touched, blocks)
    return _rescore(engine, state, touched, blocks)


def follow(engine: Engine, old: SelectorState, fresh: SelectorState, places: Int[Array, "N"]) -> SelectorState:
    """The state for changed data: visits and the scorer's arrays follow their prompts, and all prompts are scored anew.

    Args:
      old: the state for the old data.
      fresh: the result of `init` for the new data.
      places: old row of each new prompt; -1 = the prompt is new.
    """
    known = jnp.where(places >= 0, places, old.score.shape[0])
    rows = jnp.arange(places.shape[0], dtype=jnp.int32)
    new_row = jnp.full(old.score.shape[0], -1, jnp.int32).at[known].set(rows, mode="drop")
    resting = old.resting
    if resting is not None:
        resting = jnp.where(resting >= 0, new_row[jnp.maximum(resting, 0)], -1)
    visit_stats = follow_rows(old.visit_stats, fresh.visit_stats, places)._replace(task_ids=fresh.visit_stats.task_ids)
    if engine.scorer.resets_on_new_data:
        per_prompt, shared = fresh.per_prompt, fresh.shared
    elif engine.scorer.follow is not None:
        per_prompt, shared = engine.scorer.follow(
            (old.per_prompt, old.shared), (fresh.per_prompt, fresh.shared), places
        )
    else:
        per_prompt, shared = follow_rows(old.per_prompt, fresh.per_prompt, places), old.shared
    return _build_state(
        engine, visit_stats, per_prompt, shared, resting, Clock(old.now, old.last_rollout_step, old.carry)
    )


def score_rows(
    engine: Engine, visit_stats: VisitStats, per_prompt: PyTree, shared: PyTree, rows: Int[Array, "m"], now: Step
) -> ScoredRows:
    """Scores of m rows; `visit_stats` and `per_prompt` hold these rows alone."""
    stats = PromptStats(rows, visit_stats.last_step, visit_stats.visits, now)
    tier = eligibility(engine.config, visit_stats, now)
    raw = engine.scorer.score(per_prompt, shared, stats)
    tie = age_key(rows, visit_stats.last_step, engine.context.seed)
    if engine.scorer.tie_break is not None:
        tie = jnp.where(tier == ELIGIBLE, engine.scorer.tie_break(per_prompt, stats), tie)
    if engine.scorer.mode == "top":
        score = raw
        for level, key in INELIGIBLE_KEYS.items():
            score = jnp.where(tier == level, key, score)
        score = jnp.where(visit_stats.task_ids < 0, -jnp.inf, score)
    else:
        weight = jnp.ones(raw.shape) if engine.scorer.mode == "candidates" else jnp.clip(raw, MIN_WEIGHT, MAX_WEIGHT)
        score = jnp.where(tier == ELIGIBLE, weight, 0.0)
    label = engine.shares.slot(visit_stats.task_ids) * engine.pools + engine.scorer.pool_ids(per_prompt, stats)
    priority = raw if engine.scorer.priority is None else engine.scorer.priority(per_prompt, shared, stats)
    return ScoredRows(
        score,
        tie,
        jnp.where(visit_stats.task_ids < 0, -1, label).astype(jnp.int16),
        jnp.where(visit_stats.task_ids < 0, jnp.nan, priority),
        tier,
    )


def score_all(engine: Engine, state: SelectorState, now: Step) -> ScoredRows:
    """Scores of all rows, at the cost of one pass over them."""
    return score_rows(
        engine,
        state.visit_stats,
        state.per_prompt,
        state.shared,
        jnp.arange(state.score.shape[0], dtype=jnp.int32),
        now,
    )


def eligible_weight(engine: Engine, score: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 for the scores of eligible prompts, 0 for others."""
    return (score > (LOWEST_SCORE if engine.scorer.mode == "top" else 0)).astype(jnp.float32)


def take_rows(arrays: PyTree, rows: Int[Array, "m"]) -> PyTree:
    """The given rows of every per-prompt array."""
    return jax.tree.map(lambda x: x[rows], arrays)


def put_rows(arrays: PyTree, rows: Int[Array, "m"], values: PyTree) -> PyTree:
    """Every per-prompt array with the given rows replaced; rows beyond the end are ignored."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v.astype(x.dtype), mode="drop"), arrays, values)


def visit_update(
    config: SelectionConfig, outcome: RolloutOutcome, stats: PromptStats, group: Array, is_last_entry: Array
) -> VisitUpdate:
    """The results of a round as a scorer sees them.

    Args:
      stats: the visits of the round's prompts before it.
      group, is_last_entry: as `last_of_each` returns them.
    """
    signal = outcome.rewards if config.success == "reward" or outcome.verdicts is None else outcome.verdicts
    has_verdict = ~jnp.isnan(signal)
    if config.success_threshold is None:
        success = jnp.clip(signal, 0, 1)
    else:
        success = jnp.where(signal >= config.success_threshold, 1.0, 0.0)
    successes = summed(jnp.where(has_verdict, success, 0).sum(1), group)
    count = summed(has_verdict.sum(1).astype(jnp.float32), group)
    rewarded = ~jnp.isnan(outcome.rewards)
    low = jnp.where(rewarded, outcome.rewards, jnp.inf).min(1)
    high = jnp.where(rewarded, outcome.rewards, -jnp.inf).max(1)
    return VisitUpdate(
        stats=stats,
        has_verdict=count > 0,
        successes=successes,
        failures=count - successes,
        success=successes / jnp.maximum(count, 1),
        mixed=high > low,
        outcome=outcome,
        is_last_entry=is_last_entry,
    )


def _build_state(
    engine: Engine, visit_stats: VisitStats, per_prompt: PyTree, shared: PyTree, resting: Array | None, clock: Clock
) -> SelectorState:
    """The state with all prompts scored, at the cost of one pass over them."""
    rows = jnp.arange(visit_stats.last_step.shape[0], dtype=jnp.int32)
    scored = score_rows(engine, visit_stats, per_prompt, shared, rows, clock.now)
    top = engine.scorer.mode == "top"
    explores = engine.config.exploration > 0
    levels = Levels(
        tree.build_maxima(scored.score, scored.tie, scored.label, engine.classes) if top else None,
        None if top else tree.build_sums(scored.score, scored.label, engine.classes),
        tree.build_sums(eligible_weight(engine, scored.score), scored.label, engine.classes) if explores else None,
    )
    tie = scored.tie if top else None
    return SelectorState(visit_stats, per_prompt, shared, scored.score, tie, scored.label, levels, resting, *clock)


def _rescore(engine: Engine, state: SelectorState, rows: Int[Array, "m"], blocks: Int[Array, "n"]) -> SelectorState:
    """The state with the given rows scored anew, and with the levels above their blocks updated."""
    visit_stats, per_prompt = take_rows(state.visit_stats, rows), take_rows(state.per_prompt, rows)
    scored = score_rows(engine, visit_stats, per_prompt, state.shared, rows, state.now)
    score, label = state.score.at[rows].set(scored.score), state.label.at[rows].set(scored.label)
    tie = None if state.tie is None else state.tie.at[rows].set(scored.tie)
    return _with_levels(engine, state._replace(score=score, tie=tie, label=label), blocks)


def _with_levels(engine: Engine, state: SelectorState, blocks: Int[Array, "n"]) -> SelectorState:
    """The state with the levels above the given blocks computed anew; blocks beyond the end are ignored."""
    best, weights, eligible = state.levels
    block_score, block_label = tree.block_rows(state.score, blocks), tree.block_rows(state.label, blocks)
    if best is not None and state.tie is not None:
        best = tree.update_maxima(best, blocks, block_score, tree.block_rows(state.tie, blocks), block_label)
    if weights is not None:
        weights = tree.update_sums(weights, blocks, block_score, block_label)
    if eligible is not None:
        eligible = tree.update_sums(eligible, blocks, eligible_weight(engine, block_score), block_label)
    return state._replace(levels=Levels(best, weights, eligible))


def without_pending(engine: Engine, state: SelectorState, pending: Int[Array, "m"]) -> SelectorState:
    """The state in which these prompts are not eligible, and come after all others that are not; -1 = none.

    A batch is drawn from it and nothing else: it is not what the run goes on with.
    """
    value = PENDING_KEY if engine.scorer.mode == "top" else 0.0
    rows = jnp.where(pending >= 0, pending, state.score.shape[0])
    blocks = jnp.where(pending >= 0, pending // FANOUT, _NO_BLOCK)
    return _with_levels(engine, state._replace(score=state.score.at[rows].set(value, mode="drop")), blocks)


def _add_refreshed(
    state: SelectorState, touched: Int[Array, "m"], blocks: Int[Array, "n"]
) -> tuple[Int[Array, "m"], Int[Array, "n"]]:
    """The rows to score anew and their blocks, with the blocks whose turn it is added to both."""
    turn = _blocks_to_refresh(state)
    rows = (turn[:, None] * FANOUT + jnp.arange(FANOUT, dtype=jnp.int32)).reshape(-1)
    return jnp.concatenate([touched, rows]), jnp.concatenate([blocks, turn])


def _blocks_to_refresh(state: SelectorState) -> Int[Array, "n"]:
    """The blocks whose scores are refreshed in this step."""
    blocks = state.score.shape[0] // FANOUT
    count = min(blocks, max(REFRESH_BLOCKS, -(-blocks // REFRESH_STEPS)))
    # The modulo comes first because the product must stay within int32 however long the run is.
    return ((state.now % blocks) * count + jnp.arange(count, dtype=jnp.int32)) % blocks
