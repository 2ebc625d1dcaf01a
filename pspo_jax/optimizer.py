"""optax chains from a config, and the learning rate of an update."""

from __future__ import annotations

from typing import Any

import jax
import optax

from pspo_jax.config import Config, OptimizerConfig, SftConfig


def updates_per_step(config: Config) -> int:
    """Optimizer updates in a training step."""
    return config.objective.num_iterations * config.objective.minibatches


def schedule(config: OptimizerConfig | SftConfig, updates: int) -> optax.Schedule:
    """Linear warm-up, then cosine to final_fraction of the peak (or constant), over `updates` updates."""
    peak = config.learning_rate
    if isinstance(config, OptimizerConfig) and config.schedule == "constant":
        return optax.schedules.warmup_constant_schedule(peak / (config.warmup + 1), peak, config.warmup)
    # The first update would have rate 0 if the ramp began there.
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / (config.warmup + 1),
        peak_value=peak,
        warmup_steps=config.warmup,
        decay_steps=max(updates, config.warmup + 1),
        end_value=peak * config.final_fraction,
    )


def adamw(config: OptimizerConfig | SftConfig, updates: int) -> optax.GradientTransformation:
    """Clipped AdamW; weight decay on matrices only, not on norms and biases."""
    b1, eps = (config.b1, config.eps) if isinstance(config, OptimizerConfig) else (0.9, 1e-8)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, updates),
            b1=b1,
            b2=config.b2,
            eps=eps,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: Any) -> Any:
    def one(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:])
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(one, params)
