"""Visits of each prompt, which every selector records, and the eligibility that follows from them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.config.strategies import SelectionConfig
from pspo_jax.selection.interface import Step

ELIGIBLE, RESTING, EXCLUDED, PADDING = 0, 1, 2, 3
"""Tiers of prompts. If too few prompts are eligible, a batch is filled from the next tier, oldest visit first."""
_SMALLEST_NORMAL_BITS = 0x00800000
"""Bits of the smallest normal float32. From here on, larger bit patterns are larger floats."""
_STEPS = 2**20
"""Number of steps that `age_key` tells apart."""


class VisitStats(NamedTuple):
    """Visits of each prompt, 15 bytes a prompt; rows beyond the prompts are padding."""

    last_step: Int[Array, "R"]
    """Step of the last visit; -1 = never visited."""
    visits: Int[Array, "R"]
    """Number of groups that were rolled out."""
    unjudged: Int[Array, "R"]
    """Number of visits before the first verdict, at most 127; -1 = the prompt has had a verdict."""
    success: Float[Array, "R"]
    """Mean success at the last visit with a verdict, in [0, 1]; NaN = there was none."""
    task_ids: Int[Array, "R"]
    """Index of the prompt's task in `SelectorContext.task_names`; -1 = padding."""


def init_stats(num_prompts: int, rows: int, task_ids: Int[Array | np.ndarray, "N"] | None) -> VisitStats:
    """Statistics of `num_prompts` prompts without visits, in `rows` rows."""
    known = jnp.zeros(num_prompts, jnp.int16) if task_ids is None else task_ids.astype(jnp.int16)
    return VisitStats(
        last_step=jnp.full(rows, -1, jnp.int32),
        visits=jnp.zeros(rows, jnp.int32),
        unjudged=jnp.zeros(rows, jnp.int8),
        success=jnp.full(rows, jnp.nan, jnp.float32),
        task_ids=jnp.pad(known, (0, rows - num_prompts), constant_values=-1),
    )


def eligibility(config: SelectionConfig, visit_stats: VisitStats, now: Step) -> Int[Array, "..."]:
    """Tier of each prompt at step `now`: ELIGIBLE, RESTING, EXCLUDED or PADDING."""
    resting = (visit_stats.visits > 0) & (visit_stats.last_step + (config.cooldown or 0) >= now)
    excluded = jnp.zeros_like(resting)
    if config.max_visits:
        excluded |= visit_stats.visits >= config.max_visits
    if config.max_unjudged:
        excluded |= visit_stats.unjudged >= config.max_unjudged
    tier = jnp.where(excluded, EXCLUDED, jnp.where(resting, RESTING, ELIGIBLE))
    return jnp.where(visit_stats.task_ids < 0, PADDING, tier)


def record_visit(
    visit_stats: VisitStats,
    has_verdict: Bool[Array, "B"],
    success: Float[Array, "B"],
    times: Int[Array, "B"],
    step: Step,
) -> VisitStats:
    """Statistics of B prompts after `times` visits each in one step.

    Args:
      visit_stats: the rows of these prompts before the visits.
      has_verdict: whether any completion has a verdict.
      success: mean success of the completions with a verdict.
    """
    unjudged = jnp.minimum(visit_stats.unjudged.astype(jnp.int32) + times, 127).astype(jnp.int8)
    return VisitStats(
        last_step=jnp.full_like(visit_stats.last_step, step),
        visits=visit_stats.visits + times,
        unjudged=jnp.where(has_verdict | (visit_stats.unjudged < 0), jnp.int8(-1), unjudged),
        success=jnp.where(has_verdict, success, visit_stats.success),
        task_ids=visit_stats.task_ids,
    )


def age_key(rows: Int[Array, "..."], last_step: Int[Array, "..."], seed: int) -> Float[Array, "..."]:
    """A tie-breaker, larger = earlier: prompts never visited, then the oldest visit; equal ones pseudo-randomly.

    Steps from 2^20 on count as equal.
    """
    noise = hash_rows(rows, seed)
    age = _STEPS - 1 - jnp.minimum(last_step, _STEPS - 1)
    seen = (age.astype(jnp.uint32) << 10) | (noise >> 22)
    return sortable_float(jnp.where(last_step < 0, jnp.uint32(2**30) + (noise >> 3), seen))


def sortable_float(number: Array) -> Float[Array, "..."]:
    """Finite float32 numbers in the order of uint32 numbers below 2 x 10^9; top_k is fast on floats."""
    return jax.lax.bitcast_convert_type(number.astype(jnp.uint32) + _SMALLEST_NORMAL_BITS, jnp.float32)


def hash_rows(rows: Int[Array, "..."], seed: int | Array) -> Array:
    """A pseudo-random uint32 for each row, by two passes of MurmurHash3's finaliser."""
    seed = jnp.asarray(seed).astype(jnp.uint32)
    return _murmur_mix(_murmur_mix(rows.astype(jnp.uint32) ^ _murmur_mix(seed + jnp.uint32(0x9E3779B9))) + seed)


def _murmur_mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
