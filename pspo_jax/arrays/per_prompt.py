"""Arrays with one row per prompt: how long they are, how they follow changed data, and what is done with duplicates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

FANOUT = 128
"""Per-prompt arrays are padded to whole blocks of this many rows."""


def padded_rows(num_prompts: int) -> int:
    """The number of rows R of a per-prompt array.

    Rows come in whole blocks of `FANOUT`. Large data sets have whole blocks of blocks, which every mesh divides.
    """
    blocks = -(-num_prompts // FANOUT)
    if blocks > FANOUT:
        blocks = -(-blocks // FANOUT) * FANOUT
    return blocks * FANOUT


def follow_rows(old: PyTree, fresh: PyTree, places: Int[Array, "N"]) -> PyTree:
    """The per-prompt state for changed data: a known prompt keeps its old row, a new one has that of `fresh`.

    Args:
      old: the state before the change. Its per-prompt arrays have one row per prompt of the old data, then padding;
        its scalars stay as they are.
      fresh: the initial state of the new data.
      places: each new prompt's row in the old data; -1 = the prompt is new.
    """

    def one(before: Array, new: Array) -> Array:
        if not before.ndim:
            return before
        old_row = jnp.pad(places, (0, new.shape[0] - places.shape[0]), constant_values=-1)
        known = (old_row >= 0).reshape(-1, *[1] * (before.ndim - 1))
        return jnp.where(known, before[jnp.maximum(old_row, 0)], new)

    return jax.tree.map(one, old, fresh)


def last_of_each(ids: Int[Array, "B"]) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Whether an entry is the last one of its prompt, and a number for each distinct prompt, for segment sums."""
    _, group = jnp.unique(ids, size=ids.shape[0], return_inverse=True)
    place = jnp.arange(ids.shape[0])
    return jax.ops.segment_max(place, group, ids.shape[0])[group] == place, group


def summed(values: Array, group: Int[Array, "B"]) -> Array:
    """For each entry, the sum of the values of all entries of its prompt.

    Args:
      group: the prompts' numbers, as `last_of_each` returns them.
    """
    return jax.ops.segment_sum(values, group, values.shape[0])[group]
