"""Baselines by difficulty: pools of what the last group was, and a curriculum by a given column."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.config.text_fields import parse_weights
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate

EASY, NORMAL, HARD = 0, 1, 2


def difficulty_pools(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Draws in proportion to the weight of a prompt's pool; one that was not tried is normal (after prime-rl)."""
    del forgetting
    weights = parse_weights(config.pool_weights)

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Any, Any]:
        return jnp.full(rows, NORMAL, jnp.int8), ()

    def learn(pool: Int[Array, "B"], world: Any, news: VisitUpdate) -> tuple[Any, Any]:
        hard, easy = news.success <= config.hard_to, news.success >= config.easy_from
        found = jnp.where(hard, HARD, jnp.where(easy, EASY, NORMAL))
        return jnp.where(news.judged, found, pool), world

    def score(pool: Int[Array, "m"], world: Any, look: PromptStats) -> Float[Array, "m"]:
        return jnp.asarray(weights, jnp.float32)[pool.astype(jnp.int32)]

    return Scorer("draw", init, learn, score)


def curriculum(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Uniform draws among the easiest c(t) of the prompts, c growing linearly to 1 (competence, Platanios et al. 2019).

    The state is each prompt's rank by difficulty, as the share of prompts that are easier.
    """
    del forgetting
    grown = max(1, config.curriculum_steps or sizes.steps // 2)

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Any, Any]:
        if columns is None or columns.difficulty is None:
            raise ConfigError(
                "selection.difficulty_column=None: selection.name=curriculum needs each prompt's difficulty; "
                "name a column"
            )
        order = jnp.argsort(columns.difficulty, stable=True)
        rank = jnp.zeros(num_prompts, jnp.float32).at[order].set(jnp.arange(num_prompts) / num_prompts)
        return jnp.pad(rank, (0, rows - num_prompts), constant_values=1), jnp.float32(sizes.batch / num_prompts)

    def learn(rank: Float[Array, "B"], least: Any, news: VisitUpdate) -> tuple[Any, Any]:
        return rank, least

    def score(rank: Float[Array, "m"], least: Float[Array, ""], look: PromptStats) -> Float[Array, "m"]:
        start = config.curriculum_start
        share = start + (1 - start) * jnp.clip(jnp.asarray(look.now, jnp.float32) / grown, 0, 1)
        return (rank < jnp.maximum(share, least)).astype(jnp.float32)

    return Scorer("draw", init, learn, score, moves=True, starts_anew=True)
