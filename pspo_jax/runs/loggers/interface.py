"""The contract of a logger: what a run hands to it, and what it can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pspo_jax.config.fields import Value
from pspo_jax.runs.completions import Line

CLOSE_SECONDS = 10.0
"""Seconds that the end of a run waits for a logger to take what is left."""


class Item(NamedTuple):
    """A step's line of metrics.jsonl, with the completions that were dumped in the step."""

    step: int
    metrics: dict[str, float]
    completions: list[Line] | None


class RunInfo(NamedTuple):
    """A run as a logger shows it."""

    project: str
    name: str
    id: str
    """Eight characters that identify the run; the run folder keeps them, so that a resumed run has the same."""
    folder: Path
    """The run folder, in which a logger may keep files of its own."""
    config: dict[str, Value]
    """Dotted field -> value."""


class LoggerRun(NamedTuple):
    """An open run of a logger. Its functions may raise whatever the logger's package raises."""

    reached: int
    """Last step that the logger already has of this run; -1 = none."""
    send: Callable[[Sequence[Item]], None]
    """Sends steps in ascending order. After an exception the same steps are sent again."""
    files: Callable[[Sequence[Path]], None]
    """Keeps files as artifacts."""
    end: Callable[[bool], int | None]
    """Ends the run, given whether it is finished; returns the last step that is known to be kept, None = not known."""


class OpenRun(NamedTuple):
    """The two functions that each logger's module offers."""

    check: Callable[[], str | None]
    """Says what is missing before a run can be opened, such as a key, and what to do; None = nothing is."""
    open: Callable[[RunInfo], LoggerRun]
    """Opens the run, or the same one again if the logger has it."""


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[object]]]:
    """The columns and rows of dumped completions, without their images."""
    columns = [name for name in dict.fromkeys(name for line in lines for name in line) if name != "images"]
    return columns, [[line.get(name) for name in columns] for line in lines]
