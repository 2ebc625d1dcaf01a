"""reasoning-gym's procedural datasets as a task (`pip install 'pspo-jax[gym]'`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import options
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import Stratum
from pspo_jax.data.files import Record
from pspo_jax.data.loading import Question, Source, quiet_datasets
from pspo_jax.data.strata import counts_of, number_in, stratum_of
from pspo_jax.system.json_values import Json

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


_MOST_FURTHER = 16
"""Largest number of questions, as a multiple of a dataset's first ones, among which strata are looked for."""


class _Row(NamedTuple):
    """A question of a dataset."""

    dataset: str
    entry: int
    """Index of the question in its dataset."""
    size: int
    """Size of the dataset, with which it is made again."""
    question: str
    answer: str
    difficulty: float
    """The number in its metadata that task.difficulty_column names; NaN = there is none."""


def source(config: Config, seed: int, count: int, strata: Sequence[Stratum] = ()) -> Source:
    """`count` questions, from the datasets in task.dataset in turn. The verifier makes an entry again from its index.

    With strata, further questions follow (see `Generator`).

    Raises:
      ConfigError: the package is missing, has no such dataset, or refuses task.options; or strata are set, and no
        question has a number by the name of task.difficulty_column.
    """
    names = [name.strip() for name in (config.task.dataset or "").split(",") if name.strip()]
    if not names:
        raise ConfigError(f"task.dataset={config.task.dataset!r}: needs names of datasets, such as leg_counting")
    settings = options(config.task.options)
    size = -(-count // len(names))
    rows = list(_rows(config, names, settings, seed, size, range(count)))
    if strata:
        total = count - config.task.heldout_prompts
        if all(math.isnan(row.difficulty) for row in rows):
            raise _no_difficulty(config, names[0], settings, seed)
        rows += _further(config, names, settings, seed, size, rows, strata, counts_of(total, strata))
    columns: dict[str, list[object]] = {
        "question": [row.question for row in rows],
        "answer": [row.answer for row in rows],
        "dataset": [row.dataset for row in rows],
        "index": [row.entry for row in rows],
    }
    if strata:
        columns |= {"size": [row.size for row in rows], "difficulty": [row.difficulty for row in rows]}
    records = quiet_datasets().Dataset.from_dict(columns)

    def convert(record: Record, exact: Record | None = None) -> Question:
        given = {**settings, "size": record.get("size", size), "seed": seed}
        extra = {"dataset": record["dataset"], "options": given, "index": record["index"]}
        return Question(str(record["question"]), str(record["answer"]), extra)

    given = {**settings, "size": size, "seed": seed}
    return Source("reasoning_gym", "reasoning_gym", records, convert, json.dumps([names, given, count]))


def _rows(
    config: Config, names: Sequence[str], settings: dict[str, Json], seed: int, size: int, which: range
) -> Iterator[_Row]:
    """The questions `which` of datasets that take turns, each of which has `size` entries.

    Raises:
      ConfigError: the package is missing, has no such dataset, or refuses task.options.
    """
    made = {name: _dataset(config, name, {**settings, "size": size, "seed": seed}) for name in names}
    for i in which:
        name, index = names[i % len(names)], i // len(names)
        try:
            entry = made[name][index]
        except (TypeError, AssertionError, ValueError, IndexError) as error:  # some are only read here
            raise _refused(config, name, error) from error
        difficulty = number_in(entry["metadata"].get(config.task.difficulty_column or "difficulty"))
        yield _Row(name, index, size, str(entry["question"]), str(entry["answer"]), difficulty)


def _dataset(config: Config, name: str, given: dict[str, Json]) -> ProceduralDataset:
    """A dataset of the package.

    Raises:
      ConfigError: the package is missing, has no such dataset, or refuses task.options.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            "task.name=reasoning_gym: the package is not installed; pip install 'pspo-jax[gym]'"
        ) from error
    if name not in DATASETS:
        raise ConfigError(f"task.dataset={name}: reasoning-gym has no such dataset; it has {', '.join(DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, **given)
    except (TypeError, AssertionError, ValueError) as error:
        raise _refused(config, name, error) from error


def _further(
    config: Config,
    names: Sequence[str],
    settings: dict[str, Json],
    seed: int,
    size: int,
    known: Sequence[_Row],
    strata: Sequence[Stratum],
    counts: Sequence[int],
) -> list[_Row]:
    """Questions that are not in `known`: counts[i] of each stratum i, or all that are found."""
    found: list[_Row] = []
    missing = np.array(counts)
    taken = {row.question for row in known}
    which = range(len(known), _MOST_FURTHER * size * len(names))
    for row in _rows(config, names, settings, seed, _MOST_FURTHER * size, which):
        stratum = stratum_of(np.array([row.difficulty]), strata).item()
        if stratum >= 0 and missing[stratum] and row.question not in taken:
            taken.add(row.question)
            found.append(row)
            missing[stratum] -= 1
            if not missing.any():
                break
    return found


def _no_difficulty(config: Config, name: str, settings: dict[str, Json], seed: int) -> ConfigError:
    """The error that says which entries of a dataset's metadata are numbers."""
    metadata = _dataset(config, name, {**settings, "size": 1, "seed": seed})[0]["metadata"]
    numbers = [key for key, value in metadata.items() if key != "source_index" and type(value) in (int, float)]
    return ConfigError(
        f"task.difficulty_column={config.task.difficulty_column}: task.strata needs an entry of the questions' "
        f"metadata that is a number; {name} has {', '.join(numbers) or 'none'}"
    )


def _refused(config: Config, name: str, error: Exception) -> ConfigError:
    """The error that says that a dataset refuses task.options."""
    reason = " ".join(str(error).split())[:200]
    return ConfigError(f"task.options={config.task.options}: {name} refuses them ({reason}); change them")
