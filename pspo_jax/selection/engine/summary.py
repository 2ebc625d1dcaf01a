"""Reports about a selector's state: metrics of a batch, a summary of all prompts, a table of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.per_prompt import last_of_each
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.selection.engine.selector import Engine, SelectorState, score_all, take_rows, visit_update
from pspo_jax.selection.engine.stats import ELIGIBLE, EXCLUDED, RESTING, eligibility
from pspo_jax.selection.interface import BatchMetrics, DataSummary, PromptStats, Step

BINS = 30


def batch_metrics(engine: Engine, state: SelectorState, ids: Int[Array, "B"], step: Step) -> BatchMetrics:
    """Metrics of a batch before it is observed; docs/metrics.md explains them."""
    visit_stats = take_rows(state.visit_stats, ids)
    new = visit_stats.visits == 0
    ordered = jnp.sort(ids)
    out = {
        "selection/new": new.mean(),
        "selection/reuse": visit_stats.visits.astype(jnp.float32).mean(),
        "selection/age": jnp.where(new, 0, step - visit_stats.last_step).sum() / jnp.maximum((~new).sum(), 1),
        "selection/not_eligible": (eligibility(engine.config, visit_stats, step) != ELIGIBLE).mean(),
        "selection/distinct": 1 + (ordered[1:] != ordered[:-1]).sum(),
    }
    if engine.pools > 1:
        pool = state.label[ids].astype(jnp.int32) % engine.pools
        out |= {f"selection/from_{name}": (pool == i).sum() for i, name in enumerate(engine.scorer.pools)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in out.items()}


def outcome_metrics(
    engine: Engine, state: SelectorState, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step
) -> BatchMetrics:
    """The scorer's own metrics of a round before it is observed; docs/metrics.md explains them."""
    if engine.scorer.metrics is None:
        return {}
    visits = take_rows(state.visit_stats, ids)
    is_last_entry, group = last_of_each(ids)
    stats = PromptStats(ids, visits.last_step, visits.visits, step)
    update = visit_update(engine.config, outcome, stats, group, is_last_entry)
    return engine.scorer.metrics(take_rows(state.per_prompt, ids), state.shared, update)


def summary(engine: Engine, state: SelectorState, step: Step) -> DataSummary:
    """Scalars and histograms over all prompts, at the cost of one pass over them."""
    scored = score_all(engine, state, step)
    real = state.visit_stats.task_ids >= 0
    n = real.sum()
    eligible = scored.tier == ELIGIBLE
    priority = jnp.where(eligible & real, jnp.maximum(scored.priority, 0), 0.0)
    share = priority / jnp.maximum(priority.sum(), 1e-30)
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
    visits = jnp.where(real, state.visit_stats.visits, 0).astype(jnp.float32)
    out = {
        "selection/priority_entropy": entropy,
        "selection/effective_prompts": jnp.exp(entropy),
        "selection/never_seen": (real & (state.visit_stats.visits == 0)).sum() / n,
        "selection/visits_mean": visits.sum() / n,
        "selection/visits_max": visits.max(),
        "selection/eligible": (eligible & real).sum(),
        "selection/resting": (scored.tier == RESTING).sum(),
        "selection/excluded": (scored.tier == EXCLUDED).sum(),
    }
    if engine.pools > 1:
        pool = state.label.astype(jnp.int32) % engine.pools
        out |= {f"selection/pool_{name}": (real & (pool == i)).sum() for i, name in enumerate(engine.scorer.pools)}
    histograms = {"visits": histogram(jnp.where(real, visits, jnp.nan))}
    if engine.scorer.has_priority:
        histograms["priority"] = histogram(jnp.where(real, scored.priority, jnp.nan))
    return {name: jnp.asarray(value, jnp.float32) for name, value in out.items()} | histograms


def histogram(values: Float[Array, "R"]) -> dict[str, Array]:
    """BINS counts, and BINS + 1 edges, between the smallest and the largest of the finite values."""
    known = jnp.isfinite(values)
    low, high = jnp.where(known, values, jnp.inf).min(), jnp.where(known, values, -jnp.inf).max()
    width = jnp.maximum(high - low, 1e-9) / BINS
    place = jnp.clip(((values - low) / width).astype(jnp.int32), 0, BINS - 1)
    counts = jax.ops.segment_sum(known.astype(jnp.int32), jnp.where(known, place, BINS), BINS + 1)[:BINS]
    return {"counts": counts, "edges": low + width * jnp.arange(BINS + 1)}


def to_table(engine: Engine, state: SelectorState, step: Step) -> dict[str, Array]:
    """Per-prompt arrays [R], rows of padding included."""
    return {
        "visits": state.visit_stats.visits,
        "last_step": state.visit_stats.last_step,
        "success": state.visit_stats.success,
        "priority": jnp.where(engine.scorer.has_priority, score_all(engine, state, step).priority, jnp.nan),
    }
