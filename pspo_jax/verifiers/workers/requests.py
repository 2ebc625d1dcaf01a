"""What verifiers are asked, and what they answer."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple


class Request(NamedTuple):
    """What a worker is asked."""

    kind: str
    """A key of worker.VERIFIERS."""
    arguments: dict[str, Any]
    key: Hashable | None = None
    """Requests with equal keys have equal verdicts, which are remembered; None = never."""


class Reply(NamedTuple):
    """What a worker answers, or why there is no answer."""

    score: Any
    """A number, a list of them, or None = no verdict."""
    answer: str | None
    reason: str | None
    """Why there is no verdict: "deadline", "died", or an error in a line."""
    error: str | None = None
    """The whole traceback, if there is one."""
    failed: list[str | None] | None = None
    """With a list of scores: why each has none; None = there is one, or the function has no opinion."""
    metrics: dict[str, list[float]] | None = None
    """What the function gave to `log_metric`."""
    columns: dict[str, list[Any]] | None = None
    """What the function gave to `log_extra`."""


class Batch:
    """Replies to come, in the order of the requests."""

    def __init__(self, size: int):
        self._replies: list[Reply | None] = [None] * size
        self._missing = size
        self._done = threading.Event()
        if not size:
            self._done.set()

    def set(self, place: int, reply: Reply) -> None:
        """Called by the pool's thread alone."""
        self._replies[place] = reply
        self._missing -= 1
        if not self._missing:
            self._done.set()

    def result(self) -> list[Reply]:
        """All replies; waits for them, at most about as long as the deadlines allow."""
        self._done.wait()
        return [reply for reply in self._replies if reply is not None]
