"""Arrays with a row a prompt: how long they are, and how they follow changed data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FANOUT = 128
"""Per-prompt arrays are padded to whole blocks of this many rows."""


def padded_rows(num_prompts: int) -> int:
    """Rows R of a per-prompt array: whole blocks, and of large data whole blocks of blocks, which meshes divide."""
    blocks = -(-num_prompts // FANOUT)
    if blocks > FANOUT:
        blocks = -(-blocks // FANOUT) * FANOUT
    return blocks * FANOUT


def follow_rows(old: Any, fresh: Any, places: Int[Array, "N"]) -> Any:
    """Per-prompt state for changed data: each row of `fresh` whose prompt had a row takes it; scalars stay.

    Args:
      old: the state before, its per-prompt arrays with one row a prompt of the old data, and padding.
      fresh: the initial state of the new data.
      places: each new prompt's old row; -1 = it is new.
    """

    def one(before: Array, new: Array) -> Array:
        if not before.ndim:
            return before
        old_row = jnp.pad(places, (0, new.shape[0] - places.shape[0]), constant_values=-1)
        known = (old_row >= 0).reshape(-1, *[1] * (before.ndim - 1))
        return jnp.where(known, before[jnp.maximum(old_row, 0)], new)

    return jax.tree.map(one, old, fresh)


def last_of_each(ids: Int[Array, "B"]) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Whether no later entry is the same prompt, and a number for each distinct prompt, for segment sums."""
    _, group = jnp.unique(ids, size=ids.shape[0], return_inverse=True)
    place = jnp.arange(ids.shape[0])
    return jax.ops.segment_max(place, group, ids.shape[0])[group] == place, group


def summed(values: Array, group: Int[Array, "B"]) -> Array:
    """For each entry, the sum over all entries of its prompt."""
    return jax.ops.segment_sum(values, group, values.shape[0])[group]
