"""An algorithm is a composition: a selector, a credit, a replay and loss settings.

`PRESETS` says what each name stands for; a field that the user sets wins over its preset. `build` turns a resolved
config into the strategies themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pspo_jax import credit, replay, selection
from pspo_jax.config import AlgorithmName, Config, flatten
from pspo_jax.config import replace as replace_fields

_GROUP = {"credit.name": "group", "credit.scale": "group"}
_COMMON = {"objective.aggregation": "dapo"}

PRESETS: dict[AlgorithmName, dict[str, Any]] = {
    "grpo": {"selection.name": "uniform", **_GROUP, **_COMMON},
    "dr_grpo": {
        "selection.name": "uniform",
        "credit.name": "group",
        "credit.scale": "none",
        "objective.aggregation": "dr_grpo",
    },
    "ers": {"selection.name": "uniform", "credit.name": "ers", "credit.scale": "group", **_COMMON},
    "pps": {"selection.name": "pps", **_GROUP, **_COMMON},
    "pspo": {"selection.name": "pps", "credit.name": "ers", "credit.scale": "group", **_COMMON},
}


class Algorithm(NamedTuple):
    """The strategies of one algorithm; each is pure functions over its own state."""

    selector: selection.Selector
    credit: credit.Credit
    replay: replay.Replay


def resolve(config: Config) -> Config:
    """`config` with every None that the algorithm decides filled from its preset."""
    current = flatten(config)
    preset = PRESETS[config.algorithm.name]
    return replace_fields(config, {k: v for k, v in preset.items() if current[k] is None})


def build(config: Config) -> Algorithm:
    """The strategies that a config names; fields left at None follow `algorithm.name`."""
    config = resolve(config)
    return Algorithm(
        selector=selection.SELECTORS[config.selection.name](config.selection),  # type: ignore[index]
        credit=credit.CREDITS[config.credit.name](config.credit),  # type: ignore[index]
        replay=replay.none(),
    )
