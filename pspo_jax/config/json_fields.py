"""Config fields that are JSON: task.mixture and task.options."""

from __future__ import annotations

import json
import math
import typing
from typing import Any

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, TaskName


def options(text: str) -> dict[str, Any]:
    """task.options as a dict."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"task.options={text!r}: is not JSON ({error}); such as '{{\"max_animals\": 5}}'") from error
    if not isinstance(value, dict):
        raise ConfigError(f"task.options={text!r}: must be a JSON object")
    return value


def mixture(c: Config) -> list[tuple[Config, float]]:
    """The tasks of task.mixture, each as a config of its own, and their weights; empty if there is none."""
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


def _check_name(item: dict[str, Any]) -> None:
    """A task of a mixture is one of text, by name."""
    where = f"task.mixture={str(item)[:80]}"
    texts = [name for name in typing.get_args(TaskName) if name not in ("arithmetic", "own")]
    if "name" not in item:
        raise ConfigError(f"{where}: lacks a name; name a task of text, one of {', '.join(texts)}")
    if item["name"] not in texts:
        raise ConfigError(
            f"{where}: name={item['name']!r} cannot be mixed; name a task of text, one of {', '.join(texts)}"
        )
    if "mixture" in item:
        raise ConfigError(f"{where}: holds a mixture of its own; name a task of text, and list its tasks beside it")


def labels(c: Config) -> tuple[str, ...]:
    """What quotas and metrics call the tasks of a mixture: the label, else the name, with a number where that is taken.

    Raises:
      ConfigError: a label is no text that a quota could name, or stands twice.
    """
    if c.task.mixture is None:
        return (str(c.task.name),)
    items = json.loads(c.task.mixture)
    given = [item["label"] for item in items if "label" in item]
    for label in given:
        if not isinstance(label, str) or not label.strip() or set(label) & set(",="):
            raise ConfigError(f"task.mixture: label={label!r} must be text without a comma or =")
        if given.count(label) > 1:
            raise ConfigError(f"task.mixture: label={label!r} stands twice; choose another for one of them")
    out: list[str] = []
    for item in items:
        name, number = item.get("label", item["name"]), 1
        while "label" not in item and name in {*out, *given}:
            number += 1
            name = f"{item['name']}_{number}"
        out.append(name)
    return tuple(out)
