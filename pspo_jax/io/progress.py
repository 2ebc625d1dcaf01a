"""What a person sees while a run goes: rich bars on a terminal, a plain line now and then elsewhere."""

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


class Progress:
    """Phases of a run, each with a count and a line of numbers."""

    def __init__(self, enabled: bool, quiet: bool = False):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._enabled = enabled

    def say(self, text: str) -> None:
        """One line, whatever is shown."""
        self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `advance(count, numbers)`."""
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
                task = bars.add_task(name, total=total, completed=done, numbers="")

                def advance(count: int, numbers: str) -> None:
                    bars.update(task, advance=count, numbers=numbers)

                yield advance
        elif self._enabled:
            yield self._plain(name, total, done)
        else:
            yield lambda count, numbers: None

    def _plain(self, name: str, total: int, done: int) -> Callable[[int, str], None]:
        began = shown = time.monotonic()
        first = done

        def advance(count: int, numbers: str) -> None:
            nonlocal done, shown
            done += count
            now = time.monotonic()
            if done == total or now - shown > _SECONDS_BETWEEN_LINES:
                shown = now
                eta = (now - began) / max(done - first, 1) * (total - done)
                self.say(f"{name} {done}/{total}  {numbers}  eta {eta:.0f} s")

        return advance

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns: what, value."""
        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
