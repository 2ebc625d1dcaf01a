"""One run at a time in a run folder: an flock on its run.lock, which ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.storage import REFUSED, unwritten

NAME = "run.lock"
"""Lock file of the leading process; another process that knows its number before it joins has run.<number>.lock."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems that have no flock."""


@contextmanager
def locked(folder: Path, say: Callable[[str], None], process: int = 0) -> Iterator[None]:
    """Hold the folder as this process of a run; each number has a lock of its own.

    Process 1 of a second run would otherwise join the processes of the first one.

    Args:
      say: is told if the file system has no locks.
      process: number of this process, 0 = it leads.
    Raises:
      ConfigError: another process holds it; the message says which, on which host, and since when.
      StorageError: run.lock cannot be written.
    """
    path = folder / (NAME if process == 0 else f"run.{process}.lock")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in REFUSED:
            raise ConfigError(
                f"run.dir={folder}: {path.name}: {error.strerror}; choose a folder that can be written"
            ) from error
        raise unwritten(path, error, 100) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run.dir={folder}: is held by {_holder(file)}; wait for it, stop it, or choose another --run.dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise unwritten(path, error, 100) from error
            say(f"{path}: its file system has no locks ({error.strerror}), so a second run here is not refused")
        _sign(file, path)
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def _sign(file: int, path: Path) -> None:
    """Write this process into the lock file."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    words = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, words, 0)
    except OSError as error:
        raise unwritten(path, error, len(words)) from error


def _holder(file: int) -> str:
    """The process that signed the lock, in words."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process, which has not signed it yet"
