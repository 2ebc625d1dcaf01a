"""Progress on the screen: bars on a terminal, and a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

_SECONDS_BETWEEN_LINES = 5.0
"""Smallest number of seconds between two plain lines of a phase."""


class Progress:
    """Progress of the phases of a run, each with a count and a line of numbers."""

    def __init__(self, enabled: bool, quiet: bool = False):
        """
        Args:
          enabled: whether phases are shown.
          quiet: whether nothing at all is printed, as on processes that are not the primary one.
        """
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._enabled = enabled

    def say(self, text: str) -> None:
        """Print one line, even if phases are not shown."""
        self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `advance(count, numbers)`, which adds to the count of finished items and shows a line of numbers.

        The remaining time is estimated from the second call on, since the first call's time includes compilation.
        """
        if self._enabled and self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            with RichProgress(*columns, console=self.console) as bars:
                task = bars.add_task(name, total=total, completed=done, numbers="", start=False)

                def advance(count: int, numbers: str) -> None:
                    if bars.tasks[task].started:
                        bars.update(task, advance=count, numbers=numbers)
                    else:
                        bars.update(task, completed=done + count, numbers=numbers)
                        bars.start_task(task)

                yield advance
        elif self._enabled:
            yield self._plain(name, total, done)
        else:
            yield lambda count, numbers: None

    def _plain(self, name: str, total: int, done: int) -> Callable[[int, str], None]:
        shown = time.monotonic()
        first: tuple[float, int] | None = None
        """Time and count at the first call of `advance`."""

        def advance(count: int, numbers: str) -> None:
            nonlocal done, shown, first
            done += count
            now = time.monotonic()
            line = f"{name} {done}/{total}  {numbers}"
            if first is None:
                first = now, done
            else:
                line += f"  eta {(now - first[0]) / (done - first[1]) * (total - done):.0f} s"
            if done == total or now - shown > _SECONDS_BETWEEN_LINES:
                shown = now
                self.say(line)

        return advance

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Print a table of two columns, name and value."""
        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
