"""Baselines by difficulty: pools by the success of the last group, and a curriculum by a given column."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.config.text_fields import parse_weights
from pspo_jax.selection.interface import NoState, PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate

EASY, NORMAL, HARD = 0, 1, 2
Scalar = Float[Array, ""]


def difficulty_pools(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Draws in proportion to the weight of each prompt's pool (after prime-rl).

    The state is the pool of each prompt. A prompt that was not tried yet is in the normal pool.
    """
    del forgetting
    weights = parse_weights(config.pool_weights)

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[Int[Array, "R"], NoState]:
        return jnp.full(rows, NORMAL, jnp.int8), ()

    def learn(pool: Int[Array, "B"], shared: NoState, update: VisitUpdate) -> tuple[Int[Array, "B"], NoState]:
        hard, easy = update.success <= config.hard_to, update.success >= config.easy_from
        new_pool = jnp.where(hard, HARD, jnp.where(easy, EASY, NORMAL))
        return jnp.where(update.has_verdict, new_pool, pool), shared

    def score(pool: Int[Array, "m"], shared: NoState, stats: PromptStats) -> Float[Array, "m"]:
        return jnp.asarray(weights, jnp.float32)[pool.astype(jnp.int32)]

    return Scorer("draw", init, learn, score)


def curriculum(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Uniform draws among the easiest c(t) of the prompts, where c grows linearly to 1 (competence, Platanios et al.
    2019).

    The per-prompt state is the prompt's rank by difficulty, as the share of prompts that are easier. The shared state
    is the smallest c that leaves enough prompts for a batch.
    """
    del forgetting
    full_after = max(1, config.curriculum_steps or context.steps // 2)

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[Float[Array, "R"], Scalar]:
        if metadata is None or metadata.difficulty is None:
            raise ConfigError(
                "selection.difficulty_column=None: selection.name=curriculum needs each prompt's difficulty; "
                "name a column"
            )
        order = jnp.argsort(metadata.difficulty, stable=True)
        rank = jnp.zeros(num_prompts, jnp.float32).at[order].set(jnp.arange(num_prompts) / num_prompts)
        return jnp.pad(rank, (0, rows - num_prompts), constant_values=1), jnp.float32(context.batch / num_prompts)

    def learn(rank: Float[Array, "B"], smallest_share: Scalar, update: VisitUpdate) -> tuple[Float[Array, "B"], Scalar]:
        return rank, smallest_share

    def score(rank: Float[Array, "m"], smallest_share: Scalar, stats: PromptStats) -> Float[Array, "m"]:
        start = config.curriculum_start
        share = start + (1 - start) * jnp.clip(jnp.asarray(stats.now, jnp.float32) / full_after, 0, 1)
        return (rank < jnp.maximum(share, smallest_share)).astype(jnp.float32)

    return Scorer("draw", init, learn, score, time_dependent=True, resets_on_new_data=True)
