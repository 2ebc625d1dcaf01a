"""The benchmarks of the papers: where their data are, and how a column becomes a gold answer."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import AnswerTransform, Config, TaskConfig, TaskName
from pspo_jax.data.loading import Source, from_data
from pspo_jax.data.synthetic.countdown import source as countdown_source
from pspo_jax.data.synthetic.text_suite import source as suite_source


class Benchmark(NamedTuple):
    """A data set on the hub. With a local file columns are found by their usual names."""

    hub: str
    split: str
    subset: str | None = None
    answer_column: str | None = None
    answer_transform: AnswerTransform | None = None
    name: TaskName = "math"


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", "main", name="gsm8k"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),
    "aime25": Benchmark("yentinglin/aime_2025", "train"),
    "amc23": Benchmark("knoveleng/AMC-23", "train"),
    "minerva": Benchmark("knoveleng/Minerva-Math", "train", None, "solution", "boxed"),
    "olympiadbench": Benchmark("knoveleng/OlympiadBench", "train"),
    "geometry3k": Benchmark("hiyouga/geometry3k", "test"),
}
FIVE = ("aime24", "math500", "amc23", "minerva", "olympiadbench")
"""Benchmarks whose plain mean the tables of PSPO and open-rs report."""
MADE = {"countdown": (countdown_source, 512), "text_suite": (suite_source, 768)}
"""Benchmarks that are generated: (config, seed, count) -> Source, and the number of problems."""
MADE_SEED = 20_260_101
"""Seed of their problems; no training seed should be this one."""
HELDOUT = "heldout"
"""A run's own held-out prompts."""
OWN: tuple[TaskName, ...] = ("math", "gsm8k", "multiple_choice", "python_function")
"""Names of the tasks that read data."""
NAMES = (*BENCHMARKS, *MADE, "arithmetic")


def benchmark_source(name: str, data: str | None, config: Config) -> Source:
    """The rows of a text benchmark, from `data` (a file, folder or hub id) or from where it is published.

    Raises:
      ConfigError: no such benchmark, or its data cannot be read.
    """
    if name in MADE:
        make, problems = MADE[name]
        return make(config, MADE_SEED, problems)
    if name not in BENCHMARKS and data is not None:  # a set of one's own, read as the config's task reads its data
        own = config.task if config.task.name in OWN else dataclasses.replace(config.task, name="math")
        return from_data(data, f"--data {name}", "test", own)._replace(name=name)
    if name not in BENCHMARKS:
        raise ConfigError(f"--benchmarks {name}: choose among {', '.join(NAMES)}")
    b = BENCHMARKS[name]
    task = TaskConfig(name=b.name, cache=config.task.cache)
    if data is None:
        task = dataclasses.replace(
            task, subset=b.subset, answer_column=b.answer_column, answer_transform=b.answer_transform
        )
        return from_data(b.hub, f"--benchmarks {name}: its data, --data {name}", b.split, task)._replace(name=name)
    return from_data(data, f"--data {name}", "test", task)._replace(name=name)
