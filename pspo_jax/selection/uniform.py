"""Uniform selection: shuffled epochs, without replacement."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.stats import hash_rows, sortable_float
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


def shuffled(rounds: Int[Array, "m"], look: PromptStats, seed: int) -> Float[Array, "m"]:
    """The order of an epoch: pseudo-random in the prompt and in the epochs that it has behind it."""
    return sortable_float(
        hash_rows(look.rows, jnp.uint32(seed) + rounds.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)) >> 2
    )


def uniform(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Every prompt once an epoch, in an order drawn afresh for each epoch.

    The prompts with the fewest epochs behind them come first, so a batch that reaches over the end of an epoch takes
    the rest of it and the first of the next, distinct for any N >= batch, and an epoch can be resumed anywhere.
    """
    del config, forgetting

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Any, Any]:
        return jnp.zeros(rows, jnp.int32), ()

    def learn(rounds: Int[Array, "B"], world: Any, news: VisitUpdate) -> tuple[Any, Any]:
        return rounds + 1, world

    return Scorer(
        "top",
        init,
        learn,
        score=lambda rounds, world, look: -rounds.astype(jnp.float32),
        tie=lambda rounds, look: shuffled(rounds, look, sizes.seed),
        starts_anew=True,
        prefers=False,
        priority=lambda rounds, world, look: jnp.ones(rounds.shape),
    )
