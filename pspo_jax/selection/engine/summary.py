"""What a selector's state looks like: numbers of a draw, a survey of all prompts, a table of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.selection.engine.selector import Engine, SelectorState, evaluate_all, take
from pspo_jax.selection.engine.stats import ELIGIBLE, EXCLUDED, RESTING, eligibility

BINS = 30


def batch_metrics(e: Engine, state: SelectorState, ids: Int[Array, "B"], step: Int[Array, ""]) -> dict[str, Any]:
    """The batch, before it is observed."""
    book = take(state.book, ids)
    new = book.visits == 0
    ordered = jnp.sort(ids)
    out = {
        "selection/new": new.mean(),
        "selection/reuse": book.visits.astype(jnp.float32).mean(),
        "selection/age": jnp.where(new, 0, step - book.last).sum() / jnp.maximum((~new).sum(), 1),
        "selection/not_eligible": (eligibility(e.config, book, step) != ELIGIBLE).mean(),
        "selection/distinct": 1 + (ordered[1:] != ordered[:-1]).sum(),
    }
    if e.pools > 1:
        pool = state.label[ids].astype(jnp.int32) % e.pools
        out |= {f"selection/from_{name}": (pool == i).sum() for i, name in enumerate(e.scorer.pools)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in out.items()}


def summary(e: Engine, state: SelectorState, step: Int[Array, ""]) -> dict[str, Any]:
    """One pass over all prompts: scalars, and histograms as {"counts", "edges"}."""
    found = evaluate_all(e, state, step)
    real = state.book.kind >= 0
    n = real.sum()
    able = found.tier == ELIGIBLE
    priority = jnp.where(able & real, jnp.maximum(found.priority, 0), 0.0)
    share = priority / jnp.maximum(priority.sum(), 1e-30)
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
    visits = jnp.where(real, state.book.visits, 0).astype(jnp.float32)
    out = {
        "selection/priority_entropy": entropy,
        "selection/effective_prompts": jnp.exp(entropy),
        "selection/never_seen": (real & (state.book.visits == 0)).sum() / n,
        "selection/visits_mean": visits.sum() / n,
        "selection/visits_max": visits.max(),
        "selection/eligible": (able & real).sum(),
        "selection/resting": (found.tier == RESTING).sum(),
        "selection/excluded": (found.tier == EXCLUDED).sum(),
    }
    if e.pools > 1:
        pool = state.label.astype(jnp.int32) % e.pools
        out |= {f"selection/pool_{name}": (real & (pool == i)).sum() for i, name in enumerate(e.scorer.pools)}
    histograms = {"visits": histogram(jnp.where(real, visits, jnp.nan))}
    if e.scorer.prefers:
        histograms["priority"] = histogram(jnp.where(real, found.priority, jnp.nan))
    return {name: jnp.asarray(value, jnp.float32) for name, value in out.items()} | histograms


def histogram(values: Float[Array, "R"]) -> dict[str, Any]:
    """BINS counts between the smallest and the largest of the values that are not NaN."""
    known = jnp.isfinite(values)
    low, high = jnp.where(known, values, jnp.inf).min(), jnp.where(known, values, -jnp.inf).max()
    width = jnp.maximum(high - low, 1e-9) / BINS
    place = jnp.clip(((values - low) / width).astype(jnp.int32), 0, BINS - 1)
    counts = jax.ops.segment_sum(known.astype(jnp.int32), jnp.where(known, place, BINS), BINS + 1)[:BINS]
    return {"counts": counts, "edges": low + width * jnp.arange(BINS + 1)}


def to_table(e: Engine, state: SelectorState, step: Int[Array, ""]) -> dict[str, Any]:
    """Per-prompt arrays, padded rows and all."""
    return {
        "visits": state.book.visits,
        "last_step": state.book.last,
        "success": state.book.success,
        "priority": jnp.where(e.scorer.prefers, evaluate_all(e, state, step).priority, jnp.nan),
    }
