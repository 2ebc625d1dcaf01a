"""What every selector keeps of each prompt, and which prompts may be drawn."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.config.strategies import SelectionConfig

ELIGIBLE, RESTING, EXCLUDED, PADDING = 0, 1, 2, 3
"""Tiers: where too few prompts are eligible, a batch is filled from the next tier, oldest visit first."""
_LOWEST = 0x00800000
"""Bits of the smallest normal float32: larger bit patterns are larger floats, in the same order."""
_STEPS = 2**20


class VisitStats(NamedTuple):
    """15 bytes a prompt; rows beyond the prompts are padding."""

    last: Int[Array, "R"]
    """Step of the last visit; -1 = never."""
    visits: Int[Array, "R"]
    """Groups rolled out."""
    unjudged: Int[Array, "R"]
    """Visits without any verdict so far, at most 127; -1 = it had one."""
    success: Float[Array, "R"]
    """Mean success at its last visit with a verdict; NaN = none."""
    kind: Int[Array, "R"]
    """Its task; -1 = padding."""


def init_stats(num_prompts: int, rows: int, kind: Int[Array, "N"] | None) -> VisitStats:
    """A book without visits."""
    kinds = jnp.zeros(num_prompts, jnp.int16) if kind is None else kind.astype(jnp.int16)
    return VisitStats(
        last=jnp.full(rows, -1, jnp.int32),
        visits=jnp.zeros(rows, jnp.int32),
        unjudged=jnp.zeros(rows, jnp.int8),
        success=jnp.full(rows, jnp.nan, jnp.float32),
        kind=jnp.pad(kinds, (0, rows - num_prompts), constant_values=-1),
    )


def eligibility(config: SelectionConfig, book: VisitStats, now: Int[Array, ""]) -> Int[Array, "..."]:
    """Whether a prompt may be drawn at step `now`, and if not, why."""
    resting = (book.visits > 0) & (book.last + (config.cooldown or 0) >= now)
    excluded = jnp.zeros_like(resting)
    if config.max_visits:
        excluded |= book.visits >= config.max_visits
    if config.max_unjudged:
        excluded |= book.unjudged >= config.max_unjudged
    out = jnp.where(excluded, EXCLUDED, jnp.where(resting, RESTING, ELIGIBLE))
    return jnp.where(book.kind < 0, PADDING, out)


def record_visit(
    book: VisitStats, judged: Bool[Array, "B"], success: Float[Array, "B"], times: Int[Array, "B"], step: Int[Array, ""]
) -> VisitStats:
    """Rows of B prompts after `times` visits each."""
    tried = jnp.minimum(book.unjudged.astype(jnp.int32) + times, 127).astype(jnp.int8)
    return VisitStats(
        last=jnp.full_like(book.last, step),
        visits=book.visits + times,
        unjudged=jnp.where(judged | (book.unjudged < 0), jnp.int8(-1), tried),
        success=jnp.where(judged, success, book.success),
        kind=book.kind,
    )


def age_key(rows: Int[Array, "..."], last: Int[Array, "..."], seed: int) -> Float[Array, "..."]:
    """A tie-breaker: never visited first, then the oldest visit, then pseudo-random; larger = earlier.

    Steps are told apart up to 2^20.
    """
    noise = hash_rows(rows, seed)
    age = _STEPS - 1 - jnp.minimum(last, _STEPS - 1)
    seen = (age.astype(jnp.uint32) << 10) | (noise >> 22)
    return sortable_float(jnp.where(last < 0, jnp.uint32(2**30) + (noise >> 3), seen))


def sortable_float(number: Array) -> Float[Array, "..."]:
    """uint32 below 2 x 10^9 as finite floats of the same order, for which top_k is fast."""
    return jax.lax.bitcast_convert_type(number.astype(jnp.uint32) + _LOWEST, jnp.float32)


def hash_rows(rows: Int[Array, "..."], seed: int | Array) -> Array:
    """A pseudo-random uint32 for each row: the finaliser of MurmurHash3, twice."""
    seed = jnp.asarray(seed).astype(jnp.uint32)
    return _murmur_mix(_murmur_mix(rows.astype(jnp.uint32) ^ _murmur_mix(seed + jnp.uint32(0x9E3779B9))) + seed)


def _murmur_mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
