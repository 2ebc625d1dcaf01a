"""The tasks of text that generate their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import Stratum
from pspo_jax.data.loading import Source
from pspo_jax.data.synthetic import countdown, reasoning_gym, text_suite

GENERATED_PROMPTS = 10_000
"""Training prompts of a generated task if task.train_prompts is 0."""


class Generator(Protocol):
    """Generates `count` rows, of which the last task.heldout_prompts are held out.

    With strata, further rows follow. Their column difficulty and that of the rows before them have a number, and each
    stratum has as many rows as its share of the training prompts is, unless the task has fewer.
    """

    def __call__(self, config: Config, seed: int, count: int, strata: Sequence[Stratum] = ()) -> Source: ...


GENERATED: dict[str, Generator] = {
    "countdown": countdown.source,
    "reasoning_gym": reasoning_gym.source,
    "text_suite": text_suite.source,
}
"""The generator of each task."""
