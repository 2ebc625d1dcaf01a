"""Rewards to advantages. An estimator is pure functions over per-prompt arrays; see `interface` for the contract.

A new estimator is one module here and one line in `ESTIMATORS`, or a function outside the package that
`advantage.name=module:function` names.
"""

import dataclasses
from collections.abc import Callable

from pspo_jax.advantages.ers import ers, published_code_ers
from pspo_jax.advantages.group import (
    group,
    group_advantages,
    maxrl,
    maxrl_advantages,
    opo,
    opo_advantages,
    rloo,
    rloo_advantages,
)
from pspo_jax.advantages.interface import AdvantageEstimator, MakeEstimator, OverBatchFn, divide_by_deviation
from pspo_jax.advantages.tracked import divide_by_rms, tracked_baseline
from pspo_jax.config.plugins import load_plugin
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig

ESTIMATORS: dict[str, MakeEstimator] = {
    "group": group,
    "ers": ers,
    "rloo": rloo,
    "tracked_baseline": tracked_baseline,
    "opo": opo,
    "maxrl": maxrl,
}
"""Constructor of each estimator, by the name that `advantage.name` gives it."""

BATCH_SCALES: dict[str, Callable[[AdvantageConfig], OverBatchFn]] = {
    "group": divide_by_deviation,
    "rloo": divide_by_deviation,
    "opo": divide_by_deviation,
    "tracked_baseline": divide_by_rms,
}
"""For each estimator that reads advantage.scale=batch, the division by a scale of the batch."""


def make(config: AdvantageConfig, forgetting: ForgettingConfig, batch_differs: bool = False) -> AdvantageEstimator:
    """The estimator that `config.name` names.

    Args:
      config: a resolved config, whose name is not None.
      batch_differs: whether the batch that trains is another than what is rolled out at a time, as under dynamic
        sampling and replay. The division by a scale of the batch is then left to `AdvantageEstimator.over_batch`.

    Raises:
      ConfigError: the name is module:function, and there is no such function.
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
    "maxrl",
    "maxrl_advantages",
    "opo",
    "opo_advantages",
    "published_code_ers",
    "rloo",
    "rloo_advantages",
    "tracked_baseline",
]
