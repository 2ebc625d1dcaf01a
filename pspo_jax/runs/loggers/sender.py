"""A thread that hands a run's logs to one logger, and lets nothing that the logger does reach the run."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from pspo_jax.runs.completions import Line
from pspo_jax.runs.loggers.interface import CLOSE_SECONDS, Item, LoggerRun

_BATCH = 10
"""Steps that are sent at a time."""
_TABLES = 16
"""Dumps of completions that wait at most; the oldest is dropped for another."""
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
"""Seconds between two attempts, at first and at most."""
_POLL = 0.2
"""Seconds between two looks at how far a logger is."""


class Sender:
    """Sends the lines of metrics.jsonl to a logger, and the completions that the run hands over.

    The thread reads the file where it stopped, so that the lines which wait for a logger need no memory, and a logger
    that is back has all of them. What the logger's package raises is said once and tried again.

    Args:
      name: name of the logger in log.to.
      open_run: opens the logger's run; it is called in the thread.
      metrics: path of metrics.jsonl, which only grows from `start` on.
      say: prints a line.
    """

    def __init__(self, name: str, open_run: Callable[[], LoggerRun], metrics: Path, say: Callable[[str], None]):
        self._name = name
        self._open = open_run
        self._path = metrics
        self._say = say
        self._run: LoggerRun | None = None
        self._offset = 0
        self._sent = -1
        self._kept: int | None = None
        self._tables: deque[tuple[int, list[Line]]] = deque()
        self._dropped = 0
        self._files: list[Path] = []
        self._files_tried = False
        self._finished = False
        self._said = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)

    def start(self) -> None:
        """Begin with what metrics.jsonl holds and the logger does not have."""
        self._thread.start()
        self._wake.set()

    def wake(self) -> None:
        """Send lines that were added to metrics.jsonl."""
        self._wake.set()

    def completions(self, step: int, lines: list[Line]) -> None:
        """Send a step's completions with its metrics, whose line must not be in metrics.jsonl yet."""
        if len(self._tables) == _TABLES:
            self._tables.popleft()
            self._dropped += 1
        self._tables.append((step, lines))

    def files(self, paths: Sequence[Path]) -> None:
        """Send files at the end."""
        self._files = [*paths]

    def ask_to_end(self, finished: bool) -> None:
        """Send what is left, and end the logger's run; `finished` says whether it is at its end."""
        self._finished = finished
        self._closing.set()
        self._wake.set()

    def join(self, deadline: float) -> None:
        """Wait until then, by the monotonic clock, for all to be sent; say what was not.

        A run that is at its end waits longer for a logger that goes on taking steps.
        """
        sent = self._sent
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(left, _POLL))
            if self._finished and self._sent > sent:
                sent, deadline = self._sent, max(deadline, time.monotonic() + CLOSE_SECONDS)
        kept = self._sent if self._kept is None else min(self._kept, self._sent)
        lines = sum(step > kept for step in self._steps_of_file())
        tables = len(self._tables) + self._dropped
        counts = {"lines of metrics": lines, "tables of completions": tables, "files": len(self._files)}
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        if not self._ended.is_set() and not parts:
            parts = ["the end of the run"]
        if parts:
            self._say(
                f"log.to={self._name}: {', '.join(parts)} could not be sent; the run folder has them, and the same "
                "command sends the metrics again"
            )

    def _work(self) -> None:
        wait = _FIRST_WAIT
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._send()
                wait = _FIRST_WAIT
            except Exception as error:  # noqa: BLE001 - packages raise what they like, and no logger may stop a run
                self._failed(error)
                # While the run goes on, an attempt that failed is repeated ever more seldom; at its end, at once.
                self._closing.wait(wait)
                time.sleep(min(wait, _FIRST_WAIT) if self._closing.is_set() else 0)
                wait = min(2 * wait, _LONGEST_WAIT)
                self._wake.set()

    def _send(self) -> None:
        """Send all there is, and the end if it has been asked for."""
        closing = self._closing.is_set()
        if self._run is None:
            self._run = self._open()
            self._sent = max(self._sent, self._run.reached)
        while True:
            items, offset = self._next()
            new = [item for item in items if item.step > self._sent]
            if new:
                self._run.send(new)
                self._sent = new[-1].step
            self._offset = offset
            self._drop_tables()
            if not items:
                break
        if closing:
            if self._files and not self._files_tried:
                self._files_tried = True  # They are tried once, so that the run has an end without them too.
                self._run.files(self._files)
                self._files = []
            self._kept = self._run.end(self._finished)
            self._ended.set()

    def _next(self) -> tuple[list[Item], int]:
        """The next steps of the file, and where they end in it."""
        items: list[Item] = []
        if not self._path.exists():
            return items, self._offset
        tables = dict(self._tables.copy())
        with self._path.open("rb") as file:
            file.seek(self._offset)
            offset = self._offset
            while len(items) < _BATCH and (line := file.readline()).endswith(b"\n"):
                offset += len(line)
                record = json.loads(line)
                step = record.pop("step")
                numbers = {k: v for k, v in record.items() if v is not None and not k.startswith("crc/")}
                items.append(Item(step, numbers, tables.get(step)))
        return items, offset

    def _drop_tables(self) -> None:
        """Forget the completions of steps that have been sent."""
        while self._tables and self._tables[0][0] <= self._sent:
            self._tables.popleft()

    def _steps_of_file(self) -> list[int]:
        """Steps of the whole lines of metrics.jsonl."""
        if not self._path.exists():
            return []
        return [json.loads(line)["step"] for line in self._path.read_bytes().split(b"\n")[:-1]]

    def _failed(self, error: Exception) -> None:
        if self._said:
            return
        self._said = True
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self._say(f"log.to={self._name}: {reason}; the run goes on, and what is missing there is tried again")


def end_all(senders: Sequence[Sender], finished: bool) -> None:
    """End the runs of all loggers, in about CLOSE_SECONDS together."""
    for sender in senders:
        sender.ask_to_end(finished)
    deadline = time.monotonic() + CLOSE_SECONDS
    for sender in senders:
        sender.join(deadline)
