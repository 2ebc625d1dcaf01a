"""Uniform selection: shuffled epochs, without replacement."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.stats import hash_rows, sortable_float
from pspo_jax.selection.interface import NoState, PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


def shuffled(epochs: Int[Array, "m"], stats: PromptStats, seed: int) -> Float[Array, "m"]:
    """A pseudo-random order of the prompts within an epoch, as a tie-breaker.

    Args:
      epochs: number of epochs that each prompt has completed; each epoch has an order of its own.
    """
    return sortable_float(
        hash_rows(stats.rows, jnp.uint32(seed) + epochs.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)) >> 2
    )


def uniform(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Every prompt once an epoch, in an order that is drawn anew for each epoch.

    The state is the number of epochs that each prompt has completed. The prompts with the fewest come first, so a batch
    that reaches over the end of an epoch takes the rest of that epoch and the first prompts of the next. A batch holds
    distinct prompts for any N >= batch, and a run can resume in the middle of an epoch.
    """
    del config, forgetting

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[Int[Array, "R"], NoState]:
        return jnp.zeros(rows, jnp.int32), ()

    def learn(epochs: Int[Array, "B"], shared: NoState, update: VisitUpdate) -> tuple[Int[Array, "B"], NoState]:
        return epochs + 1, shared

    return Scorer(
        "top",
        init,
        learn,
        score=lambda epochs, shared, stats: -epochs.astype(jnp.float32),
        tie_break=lambda epochs, stats: shuffled(epochs, stats, context.seed),
        resets_on_new_data=True,
        has_priority=False,
        priority=lambda epochs, shared, stats: jnp.ones(epochs.shape),
    )
