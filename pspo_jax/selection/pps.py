"""Prompt-level prioritised sampling (PPS), the selection half of PSPO (Zhu et al., AAAI-26).

    p_q = |A_q| + floor,   P(q) = p_q^lambda / sum_k p_k^lambda,   w_q = (1 / (N P(q)))^beta / max over the batch

The published code draws a whole epoch before the first update and weights samples by their own new advantage. Here, as
in the paper's formulas, priorities act on the very next draw, and w_q uses P(q) at draw time, one weight for the group.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.draw import annealed
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


def pps(config: SelectionConfig, forgetting: ForgettingConfig, sizes: SelectorContext) -> Scorer:
    """Draw prompts in proportion to priority^lambda; the state is the priority p_q."""
    del forgetting
    floor = 0.1 if config.floor is None else config.floor

    def init(num_prompts: int, rows: int, columns: PromptMetadata | None) -> tuple[Any, Any]:
        return jnp.full(rows, config.initial, jnp.float32), ()

    def learn(priority: Float[Array, "B"], world: Any, news: VisitUpdate) -> tuple[Any, Any]:
        signal = news.outcome.raw_advantages if config.signal == "raw" else news.outcome.advantages
        magnitude = jnp.abs(signal)
        valid = ~jnp.isnan(news.outcome.rewards)
        judged = valid.any(axis=1)
        match config.statistic:
            case "last":
                value = magnitude[:, -1]
                judged = valid[:, -1]
            case "mean":
                value = jnp.where(valid, magnitude, 0).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
            case "max":
                value = jnp.where(valid, magnitude, 0).max(axis=1)
        # A prompt without a verdict keeps its priority: nothing was learned about it.
        return jnp.where(judged, value + floor, priority), world

    def score(priority: Float[Array, "m"], world: Any, look: PromptStats) -> Float[Array, "m"]:
        return priority ** annealed(config.exponent, config.exponent_end, look.now, sizes.steps)

    return Scorer(
        "draw",
        init,
        learn,
        score,
        moves=config.exponent_end is not None,
        priority=lambda priority, world, look: priority,
    )
