"""reasoning-gym's procedural datasets as a task (`pip install 'pspo-jax[gym]'`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import options
from pspo_jax.config.schema import Config
from pspo_jax.data.files import Record
from pspo_jax.data.loading import Question, Source, quiet_datasets

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


def source(config: Config, seed: int, count: int) -> Source:
    """`count` questions, from the datasets in task.dataset in turn. The verifier makes an entry again from its index.

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
    names = [name.strip() for name in (config.task.dataset or "").split(",") if name.strip()]
    if not names:
        raise ConfigError(f"task.dataset={config.task.dataset!r}: needs names of datasets, such as leg_counting")
    settings = options(config.task.options)
    size = -(-count // len(names))
    made: dict[str, ProceduralDataset] = {}
    for name in names:
        if name not in DATASETS:
            raise ConfigError(f"task.dataset={name}: reasoning-gym has no such dataset; it has {', '.join(DATASETS)}")
        try:
            made[name] = reasoning_gym.create_dataset(name, **{**settings, "size": size, "seed": seed})
        except (TypeError, AssertionError, ValueError) as error:
            raise _refused(config, name, error) from error
    rows = [(names[i % len(names)], i // len(names)) for i in range(count)]
    entries = []
    for name, index in rows:
        try:
            entries.append(made[name][index])
        except (TypeError, AssertionError, ValueError, IndexError) as error:  # some are only read here
            raise _refused(config, name, error) from error
    records = quiet_datasets().Dataset.from_dict(
        {
            "question": [str(e["question"]) for e in entries],
            "answer": [str(e["answer"]) for e in entries],
            "dataset": [name for name, _ in rows],
            "index": [index for _, index in rows],
        }
    )
    given = {**settings, "size": size, "seed": seed}

    def convert(record: Record, exact: Record | None = None) -> Question:
        extra = {"dataset": record["dataset"], "options": given, "index": record["index"]}
        return Question(str(record["question"]), str(record["answer"]), extra)

    return Source("reasoning_gym", "reasoning_gym", records, convert, json.dumps([names, given, count]))


def _refused(config: Config, name: str, error: Exception) -> ConfigError:
    """The error that says that a dataset refuses task.options."""
    reason = " ".join(str(error).split())[:200]
    return ConfigError(f"task.options={config.task.options}: {name} refuses them ({reason}); change them")
