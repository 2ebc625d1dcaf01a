"""What selectors may know of prompts before the first step: their tasks, their difficulty."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import Float

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.data.task import PromptDataset
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.engine.quotas import check_prompts

DIFFICULTY_COLUMNS = ("difficulty", "level")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def load_metadata(config: Config, prompts: PromptDataset) -> tuple[tuple[str, ...], PromptMetadata | None]:
    """Names of the run's tasks, and the columns that the config's selector asks for; None = none.

    Raises:
      ConfigError: a quota asks for more prompts than its task has, or there is no difficulty to be found.
    """
    config = resolve(config)
    s = config.selection
    kinds: tuple[str, ...] = ()
    kind: Any = np.zeros(len(prompts.lengths), np.int16)
    if s.quotas.strip():
        names = [str(config.task.name)] * len(kind) if prompts.labels is None else list(prompts.labels)
        kinds, kind = _numbered(names)
        if not s.replacement:
            check_prompts(s.quotas, kinds, kind, round_prompts(config))
    difficulty: Any = _difficulty(s.difficulty_column, prompts) if s.name == "curriculum" else None
    if not kinds and difficulty is None:
        return (), None
    return kinds, PromptMetadata(kind, difficulty)


def _numbered(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    found, index = np.unique(np.array(names), return_inverse=True)
    return tuple(str(name) for name in found), index.astype(np.int16)


def _difficulty(column: str | None, prompts: PromptDataset) -> Float[np.ndarray, "N"]:
    """A number for each prompt; NaN, which counts as hardest, where there is none to be read."""
    if prompts.difficulty is not None and column is None:
        return prompts.difficulty
    for name in DIFFICULTY_COLUMNS if column is None else (column,):
        values = [] if prompts.column is None else prompts.column(name)
        numbers = np.array([_number(value) for value in values], np.float32)
        if np.isfinite(numbers).any():
            return numbers
    raise ConfigError(
        f"selection.difficulty_column={column}: selection.name=curriculum needs a column of numbers, and the data has "
        f"none {'by that name' if column else 'named ' + ' or '.join(DIFFICULTY_COLUMNS)}; name one"
    )


def _number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _NUMBER.search(value) if isinstance(value, str) else None
    return float(match.group()) if match else float("nan")
