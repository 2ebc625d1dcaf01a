"""Requests to stop: SIGINT (Ctrl-C), SIGTERM (the notice of a pre-empted machine) or SIGHUP (a closed terminal)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `stop()`, which returns True once a signal has arrived. A second SIGINT raises KeyboardInterrupt.

    A second SIGTERM raises nothing: schedulers and launchers may send it twice, and kill a process that takes too long.
    If the process ignored SIGHUP before, as under nohup, it still does.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    old = {s: signal.signal(s, request) for s in numbers}
    try:
        yield lambda: requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
