"""Defaults that follow the task, and `replace`, through which flags, files and Python callers all set fields.

A config remembers which of its fields the user gave (`Config.given`). `replace` adds to them and lets all other fields
follow the task, so that a config holds the same values whichever way its fields were set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pspo_jax.config.fields import ConfigError, Value, convert, field_types, nearest
from pspo_jax.config.schema import Config

TEXT_DEFAULTS: dict[str, Value] = {
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
"""Defaults of a text task. The embedded task's learning rate and lengths would ruin a language model."""
COUNTDOWN_DEFAULTS: dict[str, Value] = {
    "task.train_prompts": 4096,
    "sft.steps": 1500,
    "rollout.max_new_tokens": 24,
}
"""Defaults of countdown with the character tokenizer."""
SEGMENTS_DEFAULTS: dict[str, Value] = {
    "sft.steps": 1500,
    "model.qkv_bias": True,
    "rollout.max_new_tokens": 11,
    "rollout.prompt_bucket": 1,
    "optimizer.learning_rate": 4e-4,
    "eval.other_images": True,
}
"""Defaults of segments, whose policy has the parts of Qwen2.5-VL."""
LORA_DEFAULTS: dict[str, Value] = {"optimizer.learning_rate": 5e-6, "model.param_dtype": "bfloat16"}
"""Defaults with lora.rank > 0; they override those of the task."""
FOLLOWERS = tuple(TEXT_DEFAULTS | COUNTDOWN_DEFAULTS | SEGMENTS_DEFAULTS | LORA_DEFAULTS)
"""Fields whose default follows the task or lora.rank."""


def uses_char_tokenizer(config: Config) -> bool:
    """Whether the task is written in characters, with a tokenizer of its own, instead of a checkpoint's tokens."""
    if config.task.mixture is not None:
        return False
    alone = config.model.source is None and config.model.tokenizer is None
    return config.task.name in ("arithmetic", "segments") or (config.task.name == "countdown" and alone)


def defaults_of(config: Config) -> dict[str, Value]:
    """Dotted field name -> default, for this config's task and adapters.

    It depends only on task.name, task.mixture, model.source, model.tokenizer and lora.rank.
    """
    values = flatten(type(config)())
    if not uses_char_tokenizer(config):
        values |= TEXT_DEFAULTS
    elif config.task.name == "countdown":
        values |= COUNTDOWN_DEFAULTS
    elif config.task.name == "segments":
        values |= SEGMENTS_DEFAULTS
    if config.lora.rank:
        values |= LORA_DEFAULTS
    return values


def given_fields(config: Config) -> frozenset[str]:
    """Dotted names of the fields that the user has set."""
    values = flatten(config)
    if config.given is None:
        plain = flatten(type(config)())
        return frozenset(name for name, value in values.items() if value != plain[name])
    # `given` does not record what dataclasses.replace has changed.
    defaults = defaults_of(config)
    return config.given | {name for name in FOLLOWERS if values[name] != defaults[name]}


def flatten(config: Config) -> dict[str, Value]:
    """Dotted field name -> value."""
    return {
        f"{stage}.{name}": value
        for stage, section in vars(config).items()
        if dataclasses.is_dataclass(section)
        for name, value in vars(section).items()
    }


def replace(config: Config, values: Mapping[str, object]) -> Config:
    """A copy of `config` with fields set by their dotted names: `replace(c, {"run.steps": 3})`.

    Fields that the user has not set follow the task.

    Raises:
      ConfigError: a field does not exist, or a value has another type than its field.
    """
    converted = {}
    for key, value in values.items():
        stage, _, name = check_name(config, key).partition(".")
        converted[key] = convert(key, field_types(getattr(config, stage))[name], value)
    return with_given(config, converted)


def with_given(config: Config, values: Mapping[str, Value]) -> Config:
    """`replace` for values that already have the types of their fields."""
    given = frozenset(given_fields(config) | values.keys())
    config = dataclasses.replace(_put(config, values), given=given)
    defaults = defaults_of(config)
    return _put(config, {name: defaults[name] for name in FOLLOWERS if name not in given})


def check_name(config: Config, key: object) -> str:
    """`key` if a field has this dotted name.

    Raises:
      ConfigError: no field has this name; the message names the nearest one.
    """
    known = flatten(config)
    if not isinstance(key, str) or key not in known:
        raise ConfigError(f"{key}: there is no such field{nearest(str(key), known)}")
    return key


def _put(config: Config, values: Mapping[str, Value]) -> Config:
    """A copy of `config` with converted values set, by their dotted names."""
    stages: dict[str, dict[str, Value]] = {}
    for key, value in values.items():
        stage, _, name = key.partition(".")
        stages.setdefault(stage, {})[name] = value
    return dataclasses.replace(
        config, **{stage: dataclasses.replace(getattr(config, stage), **fields) for stage, fields in stages.items()}
    )
