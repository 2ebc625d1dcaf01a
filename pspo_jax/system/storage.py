"""Files on disks that fill up, and errors of a file system in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that the same command meets again: the folder is the wrong one. The others may pass."""
EXHAUSTED = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room under the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "look after the disk",
    errno.ESTALE: "mount the file system anew",
}
"""What a machine may run out of, and what to do about it."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries to write, at most."""


class StorageError(Exception):
    """A file cannot be read or written now, and nothing is wrong with it: one line; the exit code is 1."""


def exhausted(error: OSError | RuntimeError) -> StorageError | None:
    """The error of a machine that has run out of something, in one line; None for any other error.

    Libraries in C++ raise RuntimeError, whose text alone says what the operating system refused.
    """
    if isinstance(error, RuntimeError):
        text = str(error)
        number = errno.EMFILE if "random_device" in text else None
        number = next((n for n in EXHAUSTED if os.strerror(n) in text), number)
        return (
            None
            if number is None
            else StorageError(f"{' '.join(text.split())[:200]}; {EXHAUSTED[number]}, and the same command carries on")
        )
    number = error.errno
    if number is None or number not in EXHAUSTED:
        return None
    what = f"{error.filename}: {os.strerror(number)}" if error.filename else os.strerror(number)
    return StorageError(f"{what}; {EXHAUSTED[number]}, and the same command carries on")


class LateError(StorageError):
    """A save took too long by the wall clock, which may have jumped, or met one that did; it is tried once more."""


def os_reason(error: BaseException) -> str | None:
    """What the operating system said, if an error comes from it; None if it does not."""
    number = os_number(error)
    return None if number is None else os.strerror(number)


def os_number(error: BaseException) -> int | None:
    """The operating system's errno behind an error; None if there is none.

    TensorStore raises ValueError whose text ends in [os_error_code='28'].
    """
    for one in _chain(error):
        if isinstance(one, FileNotFoundError):
            continue
        if isinstance(one, OSError) and one.errno is not None:
            return one.errno
        if code := re.search(r"os_error_code='(\d+)'", str(one)):
            return int(code[1])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def room(folder: Path) -> str:
    """How much may still be written to a folder, in words."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{size(shutil.disk_usage(folder).free)} are free"
    except OSError as error:
        return f"how much is free cannot be told ({error.strerror})"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


def unwritten(path: Path, error: OSError, needed: int) -> StorageError:
    """The error of a write of `needed` bytes that failed; 0 = nobody knows how many."""
    wanted = f"{size(needed)} are needed and " if needed else ""
    return StorageError(
        f"{path}: cannot be written ({error.strerror or error}); {wanted}{room(path.parent)}; once it can, the same "
        "command carries on"
    )


def unread(path: Path, error: OSError) -> StorageError:
    """The error of a read that failed."""
    return StorageError(
        f"{path}: cannot be read now ({error.strerror or error}); it is left as it is, and once it can be read the "
        "same command carries on"
    )


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """An error of the file system in the block becomes a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error, needed) from error


class Persist(NamedTuple):
    """What is done about a write that fails: the run ends, or the write is tried again for some minutes."""

    on_error: str = "stop"
    minutes: float = 0.0
    say: Callable[[str], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False
    """Whether to give up."""

    def __call__(self, write: Callable[[], object]) -> None:
        """Call `write()`, which raises StorageError, until it succeeds or it is to be given up."""
        began, seconds = time.monotonic(), 1.0
        while True:
            try:
                write()
                return
            except StorageError as error:
                over = time.monotonic() - began > 60 * self.minutes
                if self.on_error == "stop" or over or self.stop():
                    raise
                self.say(f"{error}; it is tried again in {seconds:.0f} s")
            pause(seconds, self.stop)
            seconds = min(2 * seconds, LONGEST_PAUSE)


def pause(seconds: float, stop: Callable[[], bool]) -> None:
    """Sleep, unless a stop is asked for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop():
        time.sleep(0.1)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears when it is whole; what was there stays until then.

    Raises:
      StorageError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        _drop(partial)
        raise unwritten(path, error, len(data)) from error


def append_whole(path: Path, data: bytes) -> None:
    """Add to the end of a file all of `data` or nothing.

    Raises:
      StorageError: it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                _write(file.write, data)
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise unwritten(path, error, len(data)) from error


def _write(write: Callable[[memoryview], int | None], data: bytes) -> None:
    """All of `data`: a disk that is nearly full takes a part of it first."""
    left = memoryview(data)
    while left:
        left = left[write(left) or 0 :]


def _drop(path: Path) -> None:
    """Remove what was half written; on a disk that takes no change it stays, under a name that is never read."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
