"""A request to stop: SIGINT (Ctrl-C), SIGTERM (a pre-empted machine's notice) or SIGHUP (a terminal that closes)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `stop()`: True once one of them came. A second SIGINT interrupts what Python does.

    A second SIGTERM does not: schedulers and launchers may tell a process twice, and kill one that takes too long. A
    SIGHUP that was ignored from the start, as under nohup, stays ignored.
    """
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = True

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    old = {s: signal.signal(s, note) for s in numbers}
    try:
        yield lambda: came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
