"""Prompt-level prioritised sampling (PPS), the selection half of PSPO (Zhu et al., AAAI-26).

    p_q = |A_q| + floor,   P(q) = p_q^lambda / sum_k p_k^lambda,   w_q = (1 / (N P(q)))^beta / max over the batch

The published code draws a whole epoch before the first update and weights samples by their own new advantage. This
module follows the paper's formulas: a priority acts on the very next draw, and w_q uses P(q) as it was at that draw, so
a group has one weight.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection.engine.draw import annealed
from pspo_jax.selection.interface import NoState, PromptMetadata, PromptStats, Scorer, SelectorContext, VisitUpdate


def pps(config: SelectionConfig, forgetting: ForgettingConfig, context: SelectorContext) -> Scorer:
    """Draws prompts in proportion to priority^lambda; the state is the priority p_q of each prompt."""
    del forgetting
    floor = 0.1 if config.floor is None else config.floor

    def init(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[Float[Array, "R"], NoState]:
        return jnp.full(rows, config.initial, jnp.float32), ()

    def learn(priority: Float[Array, "B"], shared: NoState, update: VisitUpdate) -> tuple[Float[Array, "B"], NoState]:
        outcome = update.outcome
        magnitude = jnp.abs(outcome.raw_advantages if config.signal == "raw" else outcome.advantages)
        valid = ~jnp.isnan(outcome.rewards)
        has_verdict = valid.any(axis=1)
        match config.statistic:
            case "last":
                value = magnitude[:, -1]
                has_verdict = valid[:, -1]
            case "mean":
                value = jnp.where(valid, magnitude, 0).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
            case "max":
                value = jnp.where(valid, magnitude, 0).max(axis=1)
        # A prompt without a verdict keeps its priority, because nothing was learned about it.
        return jnp.where(has_verdict, value + floor, priority), shared

    def score(priority: Float[Array, "m"], shared: NoState, stats: PromptStats) -> Float[Array, "m"]:
        return priority ** annealed(config.exponent, config.exponent_end, stats.now, context.steps)

    return Scorer(
        "draw",
        init,
        learn,
        score,
        time_dependent=config.exponent_end is not None,
        priority=lambda priority, shared, stats: priority,
    )
