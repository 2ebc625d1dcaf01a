"""GRESO (arXiv 2506.02177): prompts whose groups keep having no variance are skipped, ever more often.

With z zero-variance groups in a row, an epoch keeps a prompt with probability max(base^z, floor). Passing a prompt over
until it is kept is a geometric number of epochs, which is drawn at once, when z changes: nothing is drawn in vain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.stats import hash_rows
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate
from pspo_jax.selection.uniform import shuffled


class GresoState(NamedTuple):
    rounds: Int[Array, "R"]
    """Epochs behind the prompt, visited or skipped."""
    streak: Int[Array, "R"]
    """z, at most 127."""


def keep_probability(config: SelectionConfig, streak: Int[Array, "m"]) -> Float[Array, "m"]:
    return jnp.maximum(jnp.float32(config.greso_base) ** streak, config.greso_floor)


def greso(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Shuffled epochs as `uniform`, with prompts skipped."""
    del forgetting

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Any, Any]:
        return GresoState(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int8)), ()

    def learn(own: GresoState, world: Any, news: VisitUpdate) -> tuple[Any, Any]:
        longer = jnp.minimum(own.streak.astype(jnp.int32) + 1, 127)
        streak = jnp.where(news.judged, jnp.where(news.mixed, 0, longer), own.streak)
        keep = keep_probability(config, streak)
        step = jnp.asarray(news.look.now).astype(jnp.uint32)
        noise = hash_rows(news.look.rows, jnp.uint32(sizes.seed) ^ (step * jnp.uint32(0x9E3779B1)))
        # 24 bits, the most that stay below 1 as a float32.
        u = ((noise >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
        # P(skips >= n) = (1 - keep)^n
        skips = jnp.where(keep >= 1, 0.0, jnp.log(u) / jnp.log1p(-jnp.minimum(keep, 1 - 1e-6)))
        rounds = own.rounds + 1 + jnp.floor(jnp.minimum(skips, 1e5)).astype(jnp.int32)
        return GresoState(rounds, streak.astype(jnp.int8)), world

    def tie(own: GresoState, look: PromptStats) -> Float[Array, "m"]:
        return shuffled(own.rounds, look, sizes.seed)

    return Scorer(
        "top",
        init,
        learn,
        score=lambda own, world, look: -own.rounds.astype(jnp.float32),
        tie=tie,
        starts_anew=True,
        priority=lambda own, world, look: keep_probability(config, own.streak),
    )
