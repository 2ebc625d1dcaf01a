"""Defaults that follow from the task, and how fields are set: one way for flags, files and callers in Python.

A config remembers which of its fields were given (`Config.given`). `replace` adds to them and lets all the others
follow the task, so that a config holds the same values whichever way its fields came in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pspo_jax.config.fields import ConfigError, convert, kinds, nearest
from pspo_jax.config.schema import Config

TEXT_DEFAULTS: dict[str, Any] = {
    "task.train_prompts": 0,
    "task.heldout_prompts": 256,
    "sft.steps": 0,
    "model.compute_dtype": None,
    "model.scan_unroll": 1,
    "model.remat": None,
    "rollout.prompts": 16,
    "rollout.max_new_tokens": 1024,
    "rollout.prompt_bucket": 64,
    "loss.microbatch_rows": 8,
    "optimizer.learning_rate": 1e-6,
    "optimizer.b2": 0.999,
    "eval.samples": 1,
}
"""Defaults of a task of text, in place of the embedded task's, whose rates and lengths would ruin a language model."""
COUNTDOWN_DEFAULTS: dict[str, Any] = {
    "task.train_prompts": 4096,
    "sft.steps": 1500,
    "rollout.max_new_tokens": 24,
}
"""Defaults of countdown in its own alphabet."""
LORA_DEFAULTS: dict[str, Any] = {"optimizer.learning_rate": 5e-6, "model.param_dtype": "bfloat16"}
"""Defaults with lora.rank > 0; they win over those of the task."""
FOLLOWERS = tuple(TEXT_DEFAULTS | COUNTDOWN_DEFAULTS | LORA_DEFAULTS)
"""Fields whose default follows the task or lora.rank."""


def uses_char_tokenizer(config: Config) -> bool:
    """Whether the task speaks an alphabet of its own and not a checkpoint's language."""
    if config.task.mixture is not None:
        return False
    alone = config.model.source is None and config.model.tokenizer is None
    return config.task.name == "arithmetic" or (config.task.name == "countdown" and alone)


def defaults_of(config: Config) -> dict[str, Any]:
    """Every field's default, by its dotted name, for this config's task and adapters.

    It depends on task.name, task.mixture, model.source, model.tokenizer and lora.rank alone.
    """
    values = flatten(type(config)())
    if not uses_char_tokenizer(config):
        values |= TEXT_DEFAULTS
    elif config.task.name == "countdown":
        values |= COUNTDOWN_DEFAULTS
    if config.lora.rank:
        values |= LORA_DEFAULTS
    return values


def given_fields(config: Config) -> frozenset[str]:
    """Fields that somebody has set."""
    values = flatten(config)
    if config.given is None:
        plain = flatten(type(config)())
        return frozenset(name for name, value in values.items() if value != plain[name])
    # What dataclasses.replace has changed is on no record.
    defaults = defaults_of(config)
    return config.given | {name for name in FOLLOWERS if values[name] != defaults[name]}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, for a config or any nested dict of one."""
    nested = config
    if dataclasses.is_dataclass(config):
        nested = {
            stage.name: vars(getattr(config, stage.name))
            for stage in dataclasses.fields(config)
            if dataclasses.is_dataclass(getattr(config, stage.name))
        }
    out: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with dotted fields set: `replace(c, {"run.steps": 3})`; those that nobody set follow the task.

    Raises:
      ConfigError: there is no such field, or the value has another type than the field.
    """
    converted = {}
    for key, value in values.items():
        stage, _, name = check_name(config, key).partition(".")
        converted[key] = convert(key, kinds(getattr(config, stage))[name], value)
    return with_given(config, converted)


def with_given(config: Config, values: Mapping[str, Any]) -> Config:
    """`replace` for values that have their fields' types already."""
    given = given_fields(config) | values.keys()
    config = dataclasses.replace(_put(config, values), given=given)
    defaults = defaults_of(config)
    return _put(config, {name: defaults[name] for name in FOLLOWERS if name not in given})


def check_name(config: Config, key: Any) -> str:
    """The name of a field, or ConfigError with the nearest one there is."""
    known = flatten(config)
    if key not in known:
        raise ConfigError(f"{key}: there is no such field{nearest(str(key), known)}")
    return key


def _put(config: Config, values: Mapping[str, Any]) -> Config:
    stages: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        stage, _, name = key.partition(".")
        stages.setdefault(stage, {})[name] = value
    return dataclasses.replace(
        config, **{stage: dataclasses.replace(getattr(config, stage), **fields) for stage, fields in stages.items()}
    )
