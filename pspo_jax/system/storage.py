"""Writing files that appear complete or not at all, and one-line errors for file systems that fail."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import NamedTuple

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that the same command would meet again, since the folder is the wrong one. Other errors may pass."""
EXHAUSTED = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room under the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
}
"""Error of a machine that has run out of something -> what the user can do."""
LONGEST_PAUSE = 30.0
"""Largest number of seconds between two attempts to write."""


class StorageError(Exception):
    """An error of a file that cannot be read or written now, although nothing is wrong with it.

    Its message is one line; the exit code is 1.
    """


class BucketError(OSError):
    """An error of a bucket or of the connection to it; `filename` is the URL, and `strerror` the client's message."""

    refused = False
    """Whether the bucket refused the request, so that the same one would be refused again."""


def exhausted(error: OSError | RuntimeError) -> StorageError | None:
    """The one-line error of a machine that has run out of something; None for any other error.

    Libraries in C++ raise a RuntimeError, of which only the text says what the operating system refused.
    """
    if isinstance(error, BucketError):
        return unanswered(error)
    if isinstance(error, RuntimeError):
        text = str(error)
        number = errno.EMFILE if "random_device" in text else None
        number = next((n for n in EXHAUSTED if os.strerror(n) in text), number)
        if number is None:
            return None
        return StorageError(f"{' '.join(text.split())[:200]}; {EXHAUSTED[number]}, and the same command carries on")
    number = error.errno
    if number is None or number not in EXHAUSTED:
        return None
    reason = f"{error.filename}: {os.strerror(number)}" if error.filename else os.strerror(number)
    return StorageError(f"{reason}; {EXHAUSTED[number]}, and the same command carries on")


def unanswered(error: BucketError) -> StorageError:
    """The one-line error of a request that a bucket did not answer."""
    return StorageError(f"{error.filename}: {error.strerror}; once the bucket answers, the same command carries on")


class LateError(StorageError):
    """An error of a save that took too long by the wall clock, which may have jumped. The save is tried once more."""


_CLIENTS = ("aiohttp", "fsspec", "gcsfs", "google", "requests")
"""Names of packages whose exceptions come from a bucket or from the connection to it."""
FORBIDDEN = "Forbidden: "
"""Start of the message of gcsfs's OSError if the bucket refuses a request."""
_UNREACHED = re.compile(
    "^(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED).*gs://", re.DOTALL
)
"""Pattern of TensorStore's messages if a bucket does not answer, or refuses."""


def bucket_reason(error: BaseException) -> str | None:
    """The report of a bucket's client, in one line; None if the error does not come from a bucket."""
    for cause in _chain(error):
        if isinstance(cause, FileNotFoundError):
            continue
        if isinstance(cause, BucketError):
            return str(cause.strerror)
        client = type(cause).__module__.partition(".")[0] in _CLIENTS
        if client or _UNREACHED.search(str(cause)) or (type(cause) is OSError and str(cause).startswith(FORBIDDEN)):
            return " ".join(str(cause).split())[:200] or type(cause).__name__
    return None


def os_reason(error: BaseException) -> str | None:
    """The message of the operating system, or of a bucket, behind an error; None if the error comes from neither."""
    if (reason := bucket_reason(error)) is not None:
        return reason
    number = os_number(error)
    return None if number is None else os.strerror(number)


def os_number(error: BaseException) -> int | None:
    """The operating system's errno behind an error; None if the error does not come from it.

    TensorStore raises a ValueError whose text ends in [os_error_code='28'].
    """
    for cause in _chain(error):
        if isinstance(cause, FileNotFoundError):
            continue
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if code := re.search(r"os_error_code='(\d+)'", str(cause)):
            return int(code[1])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that caused it, the last one first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def room(folder: Path) -> str:
    """A clause that says how many bytes can still be written to a folder."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{size(shutil.disk_usage(folder).free)} are free"
    except OSError as error:
        return f"the free space is unknown ({error.strerror})"


def size(count: float) -> str:
    """A number of bytes with its unit, such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.3g} TB"


def unwritten(path: PurePath, error: OSError, needed: int) -> StorageError:
    """The error of a failed write of `needed` bytes; 0 = the number is unknown."""
    told = f"{path}: cannot be written ({error.strerror or error})"
    if isinstance(path, Path):
        told += f"; {f'{size(needed)} are needed and ' if needed else ''}{room(path.parent)}"
    return StorageError(f"{told}; once it can, the same command carries on")


def unread(path: PurePath, error: OSError) -> StorageError:
    """The error of a failed read."""
    return StorageError(
        f"{path}: cannot be read now ({error.strerror or error}); nothing was changed, and once it can be read the "
        "same command carries on"
    )


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an error of the file system in the block into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error, needed) from error


class Persist(NamedTuple):
    """Reaction to a write that fails: the error is raised, or the write is tried again for some minutes."""

    on_error: str = "stop"
    """stop = raise the error; retry = try again."""
    minutes: float = 0.0
    """Minutes of trying again after which the error is raised."""
    say: Callable[[str], None] = lambda _: None
    """Prints one line before each pause."""
    stop: Callable[[], bool] = lambda: False
    """Returns True once the run has been asked to stop; the error is then raised."""

    def __call__(self, write: Callable[[], object]) -> None:
        """Call `write()` until it succeeds.

        Raises:
          StorageError: `write` failed and is not to be tried again.
        """
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
    """Sleep for some seconds, or until `stop()` returns True."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop():
        time.sleep(0.1)


def write_whole(path: Path, data: bytes, shared: bool = False) -> None:
    """Write a file that replaces the old one only when it is complete.

    Args:
      shared: whether another process, on this or another machine, may write the same file at the same time.
    Raises:
      StorageError: the file cannot be written.
    """
    partial = own_partial(path) if shared else path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        _drop(partial)
        raise unwritten(path, error, len(data)) from error


def own_partial(path: Path) -> Path:
    """The path at which this process alone writes a file that is then renamed to `path`."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data` to a file, or nothing.

    Raises:
      StorageError: the file cannot be written.
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
    """Write all of `data`; a disk that is nearly full accepts a part of it first."""
    left = memoryview(data)
    while left:
        left = left[write(left) or 0 :]


def _drop(path: Path) -> None:
    """Remove a partial file. If the disk refuses, the file stays, under a name that is never read."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
