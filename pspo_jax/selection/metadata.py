"""Facts about prompts that selectors may use before the first step: tasks, difficulties and bins of either."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.plugins import is_plugin
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.data.strata import DIFFICULTY_COLUMNS, difficulties
from pspo_jax.data.task import PromptDataset
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.bins import MAX_BINS, number_bins
from pspo_jax.selection.engine.quotas import check_prompts


def load_metadata(config: Config, prompts: PromptDataset) -> tuple[tuple[str, ...], PromptMetadata | None]:
    """Names of the run's tasks, and what the config's selector reads of each prompt; () and None if it reads nothing.

    A user's own selector may read everything: the task, and the difficulty if the data has one. The features of
    `selection.predictor` are not among it, as they follow from weights.

    Raises:
      ConfigError: a quota asks for more prompts than its task has, the data has no difficulty, or too many tasks.
    """
    config = resolve(config)
    s = config.selection
    task_names: tuple[str, ...] = ()
    task_ids = np.zeros(len(prompts.lengths), np.int16)
    own = is_plugin(str(s.name))
    kind = kind_of_bins(config, prompts)
    if s.quotas.strip() or own or kind == "task":
        names = [str(config.task.name)] * len(task_ids) if prompts.labels is None else list(prompts.labels)
        task_names, task_ids = _numbered(names)
        if s.quotas.strip() and not s.replacement:
            check_prompts(s.quotas, task_names, task_ids, round_prompts(config))
    asked = s.name == "curriculum" or (own and (s.difficulty_column is not None or prompts.difficulty is not None))
    difficulty = _difficulty(s.difficulty_column, prompts) if asked else None
    bins = None
    if kind == "task":
        bins = _task_bins(task_names, task_ids)
    elif kind == "difficulty":
        bins = number_bins(_difficulty(s.difficulty_column, prompts))
    if not task_names and difficulty is None and bins is None and s.predictor in (None, "none"):
        return (), None
    return task_names, PromptMetadata(task_ids, difficulty, bins)


def kind_of_bins(config: Config, prompts: PromptDataset) -> str:
    """What the bins of prompts are: none, task or difficulty. Automatic ones are difficulties if the data has any."""
    s = config.selection
    if s.bins != "auto":
        return s.bins or "none"
    known = s.difficulty_column is not None or prompts.difficulty is not None
    known |= prompts.column is not None and difficulties(prompts.column, None) is not None
    return "difficulty" if known else "task"


def _task_bins(names: tuple[str, ...], ids: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """The bin of each prompt, its task."""
    if len(names) > MAX_BINS:
        raise ConfigError(
            f"selection.bins=task: the data has {len(names)} tasks, and there are at most {MAX_BINS} bins; choose "
            "difficulty or none"
        )
    return ids.astype(np.int8)


def _numbered(names: list[str]) -> tuple[tuple[str, ...], Int[np.ndarray, "N"]]:
    """The distinct names in order, and the index of each name among them."""
    found, index = np.unique(np.array(names), return_inverse=True)
    return tuple(str(name) for name in found), index.astype(np.int16)


def _difficulty(column: str | None, prompts: PromptDataset) -> Float[np.ndarray, "N"]:
    """Difficulty of each prompt; NaN, which counts as hardest, where no number can be read."""
    if prompts.difficulty is not None and column is None:
        return prompts.difficulty
    numbers = None if prompts.column is None else difficulties(prompts.column, column)
    if numbers is not None:
        return numbers
    raise ConfigError(
        f"selection.difficulty_column={column}: the selector needs a column of numbers, and the data has "
        f"none {'by that name' if column else 'named ' + ' or '.join(DIFFICULTY_COLUMNS)}; name one"
    )
