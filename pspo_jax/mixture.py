"""Config fields that are JSON: task.mixture and task.options."""

from __future__ import annotations

import json
import math
from typing import Any

from pspo_jax.config import Config, ConfigError, replace


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
    for values, weight in zip(tasks, weights, strict=True):
        if "name" not in values:
            raise ConfigError(f'task.mixture={str(values)[:80]}: has no name; add one, such as "name": "math"')
        if values["name"] == "arithmetic" or "mixture" in values:
            raise ConfigError(f"task.mixture={str(values)[:80]}: is no task of text; name one, such as math")
        values = {"mixture": None, **values}
        fields = {f"task.{k}": json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}
        try:
            part = replace(c, fields)
        except ConfigError as error:
            raise ConfigError(f"task.mixture={str(values)[:80]}: {error}") from error
        out.append((part, weight))
    return out
