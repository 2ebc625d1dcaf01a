"""Algorithms as presets: each names a selector, an advantage estimator, a replay strategy and a loss.

`PRESETS` lists the fields that each name fills; a field that the user sets overrides its preset.
`training/algorithm.py` turns a resolved config into the strategies themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from pspo_jax.config.defaults import flatten
from pspo_jax.config.defaults import replace as replace_fields
from pspo_jax.config.fields import ConfigError, Value, nearest
from pspo_jax.config.plugins import is_plugin
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import ESTIMATORS, REPLAYS, SELECTORS, SURROGATES, AlgorithmName, LossName
from pspo_jax.config.unread_fields import is_read

_GRPO: dict[str, Value] = {"advantage.name": "group", "advantage.scale": "group", "loss.name": "dapo"}
_MEAN_ONLY: dict[str, Value] = {"advantage.scale": "none", "loss.name": "dapo"}

PRESETS: dict[AlgorithmName, dict[str, Value]] = {
    "grpo": {"selection.name": "uniform", **_GRPO},
    "dr_grpo": {
        "selection.name": "uniform",
        "advantage.name": "group",
        "advantage.scale": "none",
        "loss.name": "dr_grpo",
    },
    "rloo": {"selection.name": "uniform", "advantage.name": "rloo", **_MEAN_ONLY},
    "opo": {"selection.name": "uniform", "advantage.name": "opo", **_MEAN_ONLY},
    "maxrl": {"selection.name": "uniform", "advantage.name": "maxrl", "loss.name": "dapo"},
    "ers": {**_GRPO, "selection.name": "uniform", "advantage.name": "ers"},
    "pps": {"selection.name": "pps", **_GRPO},
    "pspo": {**_GRPO, "selection.name": "pps", "advantage.name": "ers"},
    "prioritized_replay": {"selection.name": "prioritized_replay", "advantage.name": "group", **_MEAN_ONLY},
    "mopps": {"selection.name": "mopps", **_GRPO},
    "posterior_mixed": {"selection.name": "posterior_mixed", **_GRPO},
    "spo": {
        "selection.name": "spo",
        "advantage.name": "tracked_baseline",
        "advantage.scale": "batch",
        "loss.name": "dapo",
    },
    "greso": {"selection.name": "greso", **_GRPO},
    "difficulty_pools": {"selection.name": "difficulty_pools", **_GRPO},
    "curriculum": {"selection.name": "curriculum", **_GRPO},
    "dapo": {"selection.name": "uniform", "rollout.dynamic_sampling_rounds": 10, **_GRPO},
    "grpo_filter": {"selection.name": "uniform", "replay.name": "filter", **_GRPO},
    "popo": {"selection.name": "uniform", "replay.name": "popo", **_GRPO},
    "learnability_replay": {
        "selection.name": "posterior_mixed",
        "selection.predictor": "hidden_states",
        "replay.name": "aper",
        **_GRPO,
    },
    "aper": {"selection.name": "uniform", "replay.name": "aper", **_GRPO},
}
_REST: dict[str, Value] = {"replay.name": "none", "rollout.dynamic_sampling_rounds": 1}
"""Fields that every algorithm fills whose preset does not name them."""

_CLIP: dict[str, Value] = {
    "loss.surrogate": "clip",
    "loss.ratio": "token",
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
}
_SEQUENCE: dict[str, Value] = {**_CLIP, "loss.clip_low": 3e-4, "loss.clip_high": 4e-4}
LOSSES: dict[LossName, dict[str, Value]] = {
    "grpo": {**_CLIP, "loss.aggregation": "grpo"},
    "bnpo": {**_CLIP, "loss.aggregation": "bnpo"},
    "dr_grpo": {**_CLIP, "loss.aggregation": "dr_grpo"},
    "dapo": {**_CLIP, "loss.aggregation": "dapo"},
    "cispo": {**_CLIP, "loss.surrogate": "cispo", "loss.clip_high": 4.0, "loss.aggregation": "dapo"},
    "gspo": {**_SEQUENCE, "loss.ratio": "sequence", "loss.aggregation": "grpo"},
    "gspo_token": {**_SEQUENCE, "loss.ratio": "sequence_token", "loss.aggregation": "grpo"},
    "sapo": {**_CLIP, "loss.surrogate": "sapo", "loss.aggregation": "grpo"},
    "vespo": {**_CLIP, "loss.surrogate": "vespo", "loss.aggregation": "dapo"},
    "luspo": {**_SEQUENCE, "loss.ratio": "sequence", "loss.aggregation": "luspo"},
    "reinforce": {**_CLIP, "loss.surrogate": "reinforce", "loss.aggregation": "dapo"},
}
"""Loss -> the fields that it fills."""

_SELECTION: dict[str, Value] = {
    "selection.cooldown": 0,
    "selection.correction": 0.0,
    "selection.floor": 0.1,
    "selection.bins": "none",
    "selection.predictor": "none",
    "forgetting.prior_strength": "fixed",
    "forgetting.mode": "fixed",
}
SELECTION_PRESETS: dict[str, dict[str, Value]] = {
    "pps": {**_SELECTION, "selection.correction": 0.4},
    # Without a pause the best prompts of a ranking would be drawn again and again, and the others never.
    "prioritized_replay": {**_SELECTION, "selection.cooldown": 5},
    "posterior_mixed": {**_SELECTION, "selection.cooldown": 5},
    "spo": {**_SELECTION, "selection.floor": 0.05, "forgetting.mode": "policy_drift"},
}
"""Selector -> the fields that it fills, whatever the algorithm; `_SELECTION` holds for the other selectors."""


CHOICES: dict[str, Collection[str]] = {
    "algorithm.name": PRESETS,
    "selection.name": SELECTORS,
    "advantage.name": ESTIMATORS,
    "replay.name": REPLAYS,
    "loss.name": LOSSES,
    "loss.surrogate": SURROGATES,
}
"""Field that names an entry of a table -> the names in that table."""
PLUGINS = ("selection.name", "advantage.name", "loss.surrogate")
"""Fields that also take a user's own function as module:function."""


def resolve(config: Config) -> Config:
    """A copy of `config` in which presets, of the algorithm, then the selector and loss, fill fields that are None.

    Fields that no part of the run reads stay None. All fields of the result count as given, so that a later `replace`
    changes no other field.

    Raises:
      ConfigError: a field names an entry that its table does not have.
    """
    config = replace_fields(config, {})
    filled: set[str] = set()
    for decide in (
        _algorithm_preset,
        lambda c: SELECTION_PRESETS.get(c.selection.name or "", _SELECTION),
        lambda c: LOSSES[c.loss.name or ""],
    ):
        check_choices(config)
        current = flatten(config)
        values = {k: v for k, v in decide(config).items() if current[k] is None}
        filled |= values.keys()
        config = replace_fields(config, values)
    config = replace_fields(config, {name: None for name in sorted(filled) if not is_read(name, config)})
    return dataclasses.replace(config, given=frozenset(flatten(config)))


def _algorithm_preset(c: Config) -> dict[str, Value]:
    """The fields that the algorithm fills, adapted to the estimator."""
    preset = _REST | PRESETS[c.algorithm.name]
    if c.advantage.name == "tracked_baseline" and preset.get("advantage.scale") == "group":
        preset["advantage.scale"] = "batch"  # a group has no deviation around a tracked baseline
    return preset


def check_choices(config: Config) -> None:
    """Raise ConfigError for a field that names an entry which its table does not have."""
    values = flatten(config)
    for field, table in CHOICES.items():
        name = values[field]
        if name is None:
            continue
        assert isinstance(name, str)
        plugin = field in PLUGINS and is_plugin(name)
        if name not in table and not plugin:
            raise ConfigError(f"{field}={name!r}: choose one of {', '.join(table)}{nearest(name, table)}")
