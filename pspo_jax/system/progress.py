"""Progress of a run on the screen: rich bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
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


class Progress:
    """Phases of a run, each with a count and a line of numbers.

    Args:
      enabled: whether phases are shown.
      quiet: whether nothing is printed; lines go to the logger "pspo_jax" then.
    """

    def __init__(self, enabled: bool, quiet: bool = False):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._enabled = enabled
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Print one line, whether or not phases are shown."""
        if self._quiet:
            logging.getLogger("pspo_jax").info(text)
        else:
            self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `advance(count, numbers)`.

        The time that is left is estimated from the second call on: the first one's time holds compilation.
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
        """Time and count at the first call."""

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
        """Two columns: what, value."""
        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
