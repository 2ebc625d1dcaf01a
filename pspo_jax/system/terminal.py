"""How a command meets what it writes to: a reader that leaves, an alphabet that lacks a letter, a Ctrl-C."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell counts it."""
UNREAD = 1
"""Exit code if the reader of the output left before its end."""


@contextmanager
def terminal(prog: str) -> Iterator[None]:
    """Turn what happens to the output, and Ctrl-C, into a line or a quiet end instead of a traceback.

    A letter that the output's encoding lacks is written as an escape. Everything is flushed inside, where a reader that
    has left, such as `head`, is noticed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was saved before is whole, and the same command carries on", file=sys.stderr)
        sys.exit(INTERRUPTED)
