"""Any selector's batch in the order of expected length, so that refilled slots start with the longest completions.

The longest row that starts last is what all other slots wait for; starting with it is the classic rule for machines
that share jobs. What is drawn, and with what weight, stays the selector's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.per_prompt import follow_rows, padded_rows
from pspo_jax.distributed.mesh import ROWS, size_along
from pspo_jax.selection.interface import Selector

_NEW = 0.5
"""Weight of a visit's lengths against those before: a policy's lengths drift."""


class Lengths(NamedTuple):
    selector: Any
    """The state of the selector."""
    of_prompt: Float[Array, "R"]
    """Tokens of a completion, averaged over visits; 0 = none yet."""
    of_all: Float[Array, ""]
    """The same over all prompts, which is what a new one is expected to have."""


def longest_first(selector: Selector, chunks: int = 1) -> Selector:
    """The selector with its batches in the order of expected length, and lengths as a part of its state.

    Each device refills its slots from its own rows, and each chunk of the batch is a rollout of its own: prompts are
    dealt to them in turns, so that each starts with its longest.

    Args:
      chunks: rollout.chunks.
    """

    def init(num_prompts: int, columns: Any = None) -> Lengths:
        return Lengths(selector.init(num_prompts, columns), jnp.zeros(padded_rows(num_prompts)), jnp.zeros(()))

    def select(state: Lengths, key: Any, step: Any, batch: int) -> tuple[Any, Any, Lengths]:
        ids, weight, inner = selector.select(state.selector, key, step, batch)
        known = state.of_prompt[ids]
        expected = jnp.where(known > 0, known, state.of_all)
        parts = chunks * size_along(jax.sharding.get_abstract_mesh().shape, ROWS)
        order = deal_by_length(jnp.argsort(-expected, stable=True), parts)
        return ids[order], weight[order], state._replace(selector=inner)

    def observe(state: Lengths, ids: Int[Array, "B"], outcome: Any, step: Any) -> Lengths:
        found = outcome.lengths.mean(axis=1)

        def moved(before: Array, now: Array) -> Array:
            return jnp.where(before > 0, (1 - _NEW) * before + _NEW * now, now)

        # A prompt may be twice in a batch: the larger value stays, whatever the order of the writes.
        after = state.of_prompt.at[ids].set(0.0).at[ids].max(moved(state.of_prompt[ids], found))
        inner = selector.observe(state.selector, ids, outcome, step)
        return Lengths(inner, after, moved(state.of_all, found.mean()))

    def follow(state: Lengths, fresh: Lengths, places: Int[Array, "N"]) -> Lengths:
        return Lengths(
            selector.follow(state.selector, fresh.selector, places),
            follow_rows(state.of_prompt, fresh.of_prompt, places),
            state.of_all,
        )

    return Selector(
        init,
        select,
        observe,
        follow,
        lambda state, ids, step: selector.batch_metrics(state.selector, ids, step),
        lambda state, step: selector.summary(state.selector, step),
        lambda state, step: selector.to_table(state.selector, step),
    )


def deal_by_length(order: Int[Array, "B"], parts: int) -> Int[Array, "B"]:
    """Dealt to equal parts in turns, the first of each part first."""
    return order.reshape(-1, parts).T.reshape(-1)
