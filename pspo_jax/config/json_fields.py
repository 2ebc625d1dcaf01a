"""Config fields that are JSON: task.mixture and task.options."""

from __future__ import annotations

import json
import math
import typing

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, TextTaskName
from pspo_jax.system.json_values import Json


def options(text: str) -> dict[str, Json]:
    """The settings in task.options.

    Raises:
      ConfigError: the text is not a JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"task.options={text!r}: is not JSON ({error}); write an object such as '{{\"max_animals\": 5}}'"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"task.options={text!r}: must be a JSON object")
    return value


def mixture(c: Config) -> list[tuple[Config, float]]:
    """(config, weight) of each task in task.mixture; empty if the config has no mixture.

    Raises:
      ConfigError: the mixture is not a list of text tasks with weights above 0.
    """
    if c.task.mixture is None:
        return []
    try:
        items = json.loads(c.task.mixture)
        tasks = [{k: v for k, v in item.items() if k != "weight"} for item in items]
        weights = [float(item.get("weight", 1.0)) for item in items]
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"task.mixture={c.task.mixture[:80]!r}: must be a list of tasks ({error})") from error
    if not tasks or not all(0 < w < math.inf for w in weights):
        raise ConfigError(f"task.mixture={c.task.mixture[:80]!r}: needs at least one task, and weights above 0")
    out = []
    for item, values, weight in zip(items, tasks, weights, strict=True):
        _check_name(item)
        values = {"mixture": None, **{k: v for k, v in values.items() if k != "label"}}
        fields = {f"task.{k}": json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}
        try:
            part = replace(c, fields)
        except ConfigError as error:
            raise ConfigError(f"task.mixture={str(values)[:80]}: {error}") from error
        out.append((part, weight))
    return out


def _check_name(item: dict[str, Json]) -> None:
    """Raise ConfigError unless an entry of a mixture names a text task."""
    where = f"task.mixture={str(item)[:80]}"
    text_tasks = typing.get_args(TextTaskName)
    if "name" not in item:
        raise ConfigError(f"{where}: lacks a name; add one of {', '.join(text_tasks)}")
    if item["name"] not in text_tasks:
        raise ConfigError(f"{where}: name={item['name']!r} is not a text task; choose one of {', '.join(text_tasks)}")
    if "mixture" in item:
        raise ConfigError(f"{where}: contains another mixture; list its tasks beside this one")


def labels(c: Config) -> tuple[str, ...]:
    """Labels of the tasks of a mixture in quotas and metrics: the entry's label, else its name, numbered if repeated.

    Raises:
      ConfigError: a label is not a text that a quota can name, or appears twice.
    """
    if c.task.mixture is None:
        return (str(c.task.name),)
    items = json.loads(c.task.mixture)
    given = [item["label"] for item in items if "label" in item]
    for label in given:
        if not isinstance(label, str) or not label.strip() or set(label) & set(",="):
            raise ConfigError(f"task.mixture: label={label!r} must be text without a comma or =; choose another")
        if given.count(label) > 1:
            raise ConfigError(f"task.mixture: label={label!r} appears twice; choose another for one of them")
    out: list[str] = []
    for item in items:
        name, number = item.get("label", item["name"]), 1
        while "label" not in item and name in {*out, *given}:
            number += 1
            name = f"{item['name']}_{number}"
        out.append(name)
    return tuple(out)
