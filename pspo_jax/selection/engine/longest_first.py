"""Any selector's batch in the order of expected length, so that refilled slots start with the longest completions.

If the longest row starts last, all other slots wait for it; to start with the longest is the classic rule for machines
that share jobs. The order does not change which prompts are drawn, nor their loss weights.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from pspo_jax.arrays.per_prompt import follow_rows, padded_rows
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.distributed.mesh import ROWS, size_along
from pspo_jax.selection.interface import PromptMetadata, Selector, Step

_LATEST_WEIGHT = 0.5
"""Weight of a visit's lengths against those of earlier visits, as a policy's lengths drift."""


class LengthState(NamedTuple):
    """The state of a selector, and the lengths of completions."""

    selector: PyTree
    """State of the selector whose batches are ordered."""
    prompt_lengths: Float[Array, "R"]
    """Expected completion length of each prompt in tokens, a moving average over visits; 0 = never visited."""
    mean_length: Float[Array, ""]
    """The same over all prompts, which is the expected length of a new prompt."""


def longest_first(selector: Selector, chunks: int = 1) -> Selector:
    """The selector with its batches in the order of expected length, and with lengths as a part of its state.

    Each device refills its slots from its own rows, and each chunk of the batch is a rollout of its own. Prompts are
    therefore interleaved over devices and chunks, so that each of them starts with its longest prompts.

    Args:
      chunks: rollout.chunks.
    """

    def init(num_prompts: int, metadata: PromptMetadata | None = None) -> LengthState:
        return LengthState(selector.init(num_prompts, metadata), jnp.zeros(padded_rows(num_prompts)), jnp.zeros(()))

    def select(
        state: LengthState, key: Key[Array, ""], step: Step, batch: int, pending: Int[Array, "m"] | None = None
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], LengthState]:
        others = () if pending is None else (pending,)
        ids, weight, inner = selector.select(state.selector, key, step, batch, *others)
        known = state.prompt_lengths[ids]
        expected = jnp.where(known > 0, known, state.mean_length)
        parts = chunks * size_along(jax.sharding.get_abstract_mesh().shape, ROWS)
        order = interleave(jnp.argsort(-expected, stable=True), parts)
        return ids[order], weight[order], state._replace(selector=inner)

    def observe(state: LengthState, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step) -> LengthState:
        lengths = jnp.asarray(outcome.lengths).mean(axis=1)

        def averaged(before: Array, now: Array) -> Array:
            return jnp.where(before > 0, (1 - _LATEST_WEIGHT) * before + _LATEST_WEIGHT * now, now)

        # If a prompt is twice in a batch, the larger value stays, whatever the order of the writes is.
        prompt_lengths = state.prompt_lengths.at[ids].set(0.0)
        prompt_lengths = prompt_lengths.at[ids].max(averaged(state.prompt_lengths[ids], lengths))
        inner = selector.observe(state.selector, ids, outcome, step)
        return LengthState(inner, prompt_lengths, averaged(state.mean_length, lengths.mean()))

    def follow(state: LengthState, fresh: LengthState, places: Int[Array, "N"]) -> LengthState:
        return LengthState(
            selector.follow(state.selector, fresh.selector, places),
            follow_rows(state.prompt_lengths, fresh.prompt_lengths, places),
            state.mean_length,
        )

    return Selector(
        init,
        select,
        observe,
        follow,
        batch_metrics=lambda state, ids, step: selector.batch_metrics(state.selector, ids, step),
        outcome_metrics=lambda state, ids, outcome, step: selector.outcome_metrics(state.selector, ids, outcome, step),
        summary=lambda state, step: selector.summary(state.selector, step),
        to_table=lambda state, step: selector.to_table(state.selector, step),
    )


def interleave(order: Int[Array, "B"], parts: int) -> Int[Array, "B"]:
    """`order` split into equal parts in turns, so that each part begins with one of the first entries."""
    return order.reshape(-1, parts).T.reshape(-1)
