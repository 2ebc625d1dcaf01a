"""The messages between the pool and its workers: limits, requests and replies."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol


class WorkerLimits(NamedTuple):
    """Limits of every worker, and what it loads before its first request. It travels as JSON."""

    deadline: float
    """Seconds of processor time for one request."""
    memory_mib: int
    """Address space in MiB."""
    network: bool
    """Whether Python's own network connections are allowed."""
    functions: Sequence[str]
    """Users' functions that are imported, as `module:function`."""
    imports: Sequence[str]
    """Slow modules of verifiers that are imported once, before any fork."""
    log: str | None
    """File for what verifiers print; None = nowhere."""


class Request(NamedTuple):
    """A question to a worker."""

    kind: str
    """A key of process.VERIFIERS."""
    arguments: Mapping[str, object]
    """Keyword arguments of that verifier."""
    key: Hashable | None = None
    """Requests with equal keys have equal verdicts, which are remembered; None = the verdict is never remembered."""


class Reply(NamedTuple):
    """A worker's answer, or why there is none. It travels as JSON."""

    score: float | list[float | None] | None
    """One number, or a number or None for each of a prompt's completions; None = no verdict."""
    answer: str | None
    """The answer that was found, in a canonical form."""
    reason: str | None
    """Why there is no verdict: "deadline ...", "died ...", or an error in one line; None = there is one."""
    error: str | None = None
    """The whole traceback, if there is one."""
    failed: list[str | None] | None = None
    """Beside a list of scores: why each is missing; None = it is there, or the function has no opinion."""
    metrics: dict[str, list[float]] | None = None
    """Values that a user's function gave to `log_metric`."""
    columns: dict[str, list[object]] | None = None
    """Values that a user's function gave to `log_extra`: one per completion."""


class Batch:
    """The replies to several requests, in the order of these, which arrive one by one."""

    def __init__(self, size: int):
        self._replies: list[Reply | None] = [None] * size
        self._missing = size
        self._done = threading.Event()
        if not size:
            self._done.set()

    def set(self, place: int, reply: Reply) -> None:
        """Enters the reply to request number `place`; called by the pool alone."""
        self._replies[place] = reply
        self._missing -= 1
        if not self._missing:
            self._done.set()

    def result(self) -> list[Reply]:
        """All replies. It waits for them, at most about as long as the deadlines allow."""
        self._done.wait()
        return [reply for reply in self._replies if reply is not None]


class JudgeService(Protocol):
    """A judge outside the worker processes, such as `verifiers.judge.Judge`."""

    def __enter__(self) -> JudgeService: ...

    def close(self) -> None:
        """Ends all requests; completions that still wait get no verdict."""
        ...

    def submit(self, questions: Sequence[str], /) -> Batch:
        """Has the questions answered. It returns at once, with the batch of replies to come."""
        ...
