"""A command's output: a reader that closes the pipe, characters that the encoding lacks, and Ctrl-C."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the convention of shells."""
UNREAD = 1
"""Exit code if the reader of the output closed the pipe."""


@contextmanager
def terminal(prog: str) -> Iterator[None]:
    """End with one line after Ctrl-C, and silently when the output's reader closes the pipe, instead of a traceback.

    A character that the output's encoding lacks is written as an escape. Everything is flushed in this block, which
    notices a reader that has closed the pipe, such as `head`.
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
        # Python flushes once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)
    except KeyboardInterrupt:
        print(
            f"{prog}: interrupted; all that was saved is complete, and the same command carries on",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
