"""What a reward is worth. A credit is pure functions over its own per-prompt state; a new one is a file and a line."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pspo_jax.advantages.ers import ers, released
from pspo_jax.advantages.group import group, group_advantages, opo, opo_advantages, rloo, rloo_advantages
from pspo_jax.advantages.interface import AdvantageEstimator, over_deviation
from pspo_jax.advantages.tracked import over_size, tracked_baseline
from pspo_jax.config.plugins import load_plugin
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig

ESTIMATORS: dict[str, Callable[[AdvantageConfig, ForgettingConfig], AdvantageEstimator]] = {
    "group": group,
    "ers": ers,
    "rloo": rloo,
    "tracked_baseline": tracked_baseline,
    "opo": opo,
}

BATCH_SCALES: dict[str, Callable[[AdvantageConfig], Callable[..., Any]]] = {
    "group": over_deviation,
    "rloo": over_deviation,
    "opo": over_deviation,
    "tracked_baseline": over_size,
}
"""How the credits that advantage.scale=batch is for divide by a scale of the batch."""


def make(config: AdvantageConfig, forgetting: ForgettingConfig, batch_differs: bool = False) -> AdvantageEstimator:
    """The credit that `config.name` names.

    Args:
      batch_differs: whether the batch that trains is another than what is rolled out at a time, as under dynamic
        sampling and replay. A scale of the batch is then left to `Credit.over_batch`.
    """
    assert config.name is not None
    if config.name not in ESTIMATORS:
        return load_plugin("advantage.name", config.name)(config, forgetting)
    if not batch_differs or config.scale != "batch" or config.name not in BATCH_SCALES:
        return ESTIMATORS[config.name](config, forgetting)
    unscaled = ESTIMATORS[config.name](dataclasses.replace(config, scale="none"), forgetting)
    return unscaled._replace(over_batch=BATCH_SCALES[config.name](config))


__all__ = [
    "BATCH_SCALES",
    "ESTIMATORS",
    "AdvantageEstimator",
    "ers",
    "group",
    "group_advantages",
    "make",
    "opo",
    "opo_advantages",
    "released",
    "rloo",
    "rloo_advantages",
    "tracked_baseline",
]
