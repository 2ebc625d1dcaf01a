"""GRESO (arXiv 2506.02177): prompts whose groups keep having no variance are skipped, ever more often.

With z zero-variance groups in a row, an epoch keeps a prompt with probability max(base^z, floor). The number of epochs
until a prompt is kept has a geometric distribution. It is drawn once, when z changes, so that no draw is rejected.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.stats import hash_rows
from pspo_jax.selection.interface import NoState, PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate
from pspo_jax.selection.uniform import shuffled


class GresoState(NamedTuple):
    """Per-prompt arrays of the selector."""

    epochs: Int[Array, "R"]
    """Number of epochs that the prompt has completed, visited or skipped."""
    streak: Int[Array, "R"]
    """Number of zero-variance groups in a row, z, at most 127."""


def keep_probability(config: SelectionConfig, streak: Int[Array, "m"]) -> Float[Array, "m"]:
    """Probability that an epoch keeps a prompt after `streak` zero-variance groups in a row."""
    return jnp.maximum(jnp.float32(config.greso_base) ** streak, config.greso_floor)


def greso(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Shuffled epochs as in `uniform`, in which some prompts are skipped."""
    del forgetting

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[GresoState, NoState]:
        return GresoState(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int8)), ()

    def learn(per_prompt: GresoState, shared: NoState, update: VisitUpdate) -> tuple[GresoState, NoState]:
        longer = jnp.minimum(per_prompt.streak.astype(jnp.int32) + 1, 127)
        streak = jnp.where(update.has_verdict, jnp.where(update.mixed, 0, longer), per_prompt.streak)
        keep = keep_probability(config, streak)
        step = jnp.asarray(update.stats.now).astype(jnp.uint32)
        noise = hash_rows(update.stats.rows, jnp.uint32(context.seed) ^ (step * jnp.uint32(0x9E3779B1)))
        # 24 bits are the most that stay below 1 as a float32.
        u = ((noise >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
        # P(skips >= n) = (1 - keep)^n
        skips = jnp.where(keep >= 1, 0.0, jnp.log(u) / jnp.log1p(-jnp.minimum(keep, 1 - 1e-6)))
        epochs = per_prompt.epochs + 1 + jnp.floor(jnp.minimum(skips, 1e5)).astype(jnp.int32)
        return GresoState(epochs, streak.astype(jnp.int8)), shared

    def tie_break(per_prompt: GresoState, stats: PromptStats) -> Float[Array, "m"]:
        return shuffled(per_prompt.epochs, stats, context.seed)

    return Scorer(
        "top",
        init,
        learn,
        score=lambda per_prompt, shared, stats: -per_prompt.epochs.astype(jnp.float32),
        tie_break=tie_break,
        resets_on_new_data=True,
        priority=lambda per_prompt, shared, stats: keep_probability(config, per_prompt.streak),
    )
