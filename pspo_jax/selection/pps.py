"""Prompt-level prioritised sampling (PPS), the selection half of PSPO (Zhu et al., AAAI-26).

    p_q = |A_q| + floor,   P(q) = p_q^lambda / sum_k p_k^lambda,   w_q = (1 / (N P(q)))^beta / max over the batch

The published code draws a whole epoch before the first update and weights samples by their own new advantage. Here, as
in the paper's formulas, priorities act on the very next draw, and w_q uses P(q) at draw time, one weight for the group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pspo_jax.config import SelectionConfig
from pspo_jax.selection.base import Selector
from pspo_jax.state import Outcome


class PpsState(NamedTuple):
    priority: Float[Array, "N"]


def pps(config: SelectionConfig) -> Selector:
    """Draw distinct prompts in proportion to |advantage|^lambda.

    Adding Gumbel noise to the log-weights and taking the top B is exact for successive draws without replacement.
    """

    def init(num_prompts: int) -> PpsState:
        return PpsState(jnp.full(num_prompts, config.initial, jnp.float32))

    def select(
        state: PpsState, key: Key[Array, ""], step: Int[Array, ""], batch: int
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], PpsState]:
        del step
        logits = config.exponent * jnp.log(state.priority)
        noise = jax.random.gumbel(key, logits.shape, mode="high")
        _, ids = jax.lax.top_k(logits + noise, batch)
        log_weight = -config.correction * jax.nn.log_softmax(logits)[ids]
        return ids.astype(jnp.int32), jnp.exp(log_weight - log_weight.max()), state

    def observe(state: PpsState, ids: Int[Array, "B"], outcome: Outcome, step: Int[Array, ""]) -> PpsState:
        del step
        signal = outcome.raw_advantages if config.signal == "raw" else outcome.advantages
        magnitude = jnp.abs(signal)
        valid = ~jnp.isnan(outcome.rewards)
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
        priority = jnp.where(judged, value + config.floor, state.priority[ids])
        return PpsState(state.priority.at[ids].set(priority))

    return Selector(init, select, observe)
