"""Uniform selection: shuffled epochs, without replacement."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pspo_jax.config import SelectionConfig
from pspo_jax.selection.base import Selector
from pspo_jax.state import Outcome


class UniformState(NamedTuple):
    order: Int[Array, "N"]
    """The current epoch's permutation of the prompts."""
    cursor: Int[Array, ""]
    """How many of them are used; N = the next draw shuffles."""


def uniform(config: SelectionConfig | None = None) -> Selector:
    """Every prompt once an epoch, in an order drawn afresh for each epoch.

    A batch that reaches over the end of an epoch is filled from the next one, whose order puts the prompts that the
    batch already holds last: ids in a batch are distinct for any N >= batch, and no prompt is skipped.
    """
    del config

    def init(num_prompts: int) -> UniformState:
        return UniformState(jnp.arange(num_prompts, dtype=jnp.int32), jnp.int32(num_prompts))

    def select(
        state: UniformState, key: Key[Array, ""], step: Int[Array, ""], batch: int
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], UniformState]:
        del step
        n = state.order.shape[0]
        place = state.cursor + jnp.arange(batch)

        def reshuffle(order: Int[Array, "N"]) -> Int[Array, "N"]:
            in_batch = jnp.zeros(n).at[order].set(jnp.arange(n) >= state.cursor)
            return jnp.argsort(jax.random.uniform(key, (n,)) + in_batch).astype(jnp.int32)

        wraps = state.cursor + batch > n
        following = jax.lax.cond(wraps, reshuffle, lambda order: order, state.order)
        ids = jnp.where(place < n, state.order[jnp.minimum(place, n - 1)], following[place % n])
        cursor = jnp.where(wraps, state.cursor + batch - n, state.cursor + batch).astype(jnp.int32)
        return ids, jnp.ones(batch), UniformState(following, cursor)

    def observe(state: UniformState, ids: Int[Array, "B"], outcome: Outcome, step: Int[Array, ""]) -> UniformState:
        del ids, outcome, step
        return state

    def follow(state: UniformState, fresh: UniformState, places: Int[Array, "N"]) -> UniformState:
        """Changed data begins a new epoch: a permutation of other rows means nothing."""
        del state, places
        return fresh

    return Selector(init, select, observe, follow)
