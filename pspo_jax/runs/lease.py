"""Leases, which let one process at a time write to a run in a bucket.

A bucket has no locks, but if several processes try to create the same object, exactly one succeeds. Leases are numbered
objects, and the holder of the newest one renews it. Lease n + 1 may be created once lease n was given back or has not
been renewed for `EXPIRY` seconds. A holder that finds a later lease has lost the run. A process that waits counts the
seconds by its own clock; clocks of two machines are compared only for leases older than `_LONG_AGO`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.buckets import children, create, read_bytes, remove, write
from pspo_jax.system.storage import StorageError, unread

FOLDER = "run.lock"
"""Name of the folder of leases in the run's folder."""
BEAT = 20.0
"""Seconds between two renewals."""
EXPIRY = 120.0
"""Seconds without a renewal after which another process may take over the run."""
_LONG_AGO = 3600.0
"""Age in seconds, by this machine's clock, from which a lease counts as expired without a wait. Clocks of two machines
are taken to differ by less."""

_Lease = dict[str, Any]
"""The contents of a lease: holder (in words), id, beats, time in seconds since 1970, and whether it was given back."""


@contextmanager
def held(home: epath.Path, owner: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the run in a folder of a bucket, and renew the lease meanwhile.

    Yields a function that raises ConfigError once another process has taken over the run.

    Args:
      owner: id of the working folder. This process holds its lock, so no other process holds a lease with this id.
      say: function that prints a line: on a wait, and if the lease cannot be given back.
    Raises:
      ConfigError: another process holds the run; the message says which, on which host, and since when.
      StorageError: the bucket does not answer.
    """
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    mine: _Lease = {"holder": f"process {os.getpid()} on {socket.gethostname()} since {since}", "id": owner}
    number = _acquire(home, mine, say)
    done, lost = threading.Event(), threading.Event()
    renewing = threading.Thread(target=_renew, args=(home, number, mine, done, lost), name="lease", daemon=True)
    renewing.start()

    def check() -> None:
        last, found = _newest(home)
        if last > number:
            lost.set()
            raise ConfigError(
                f"run.dir={home}: {found.get('holder')} took this run over, as this process had not renewed its "
                f"lease for {EXPIRY:.0f} s; stop that process to carry on here"
            )

    try:
        yield check
    finally:
        done.set()
        renewing.join()
        if not lost.is_set():
            try:
                write(_path(home, number), _text(mine, 0, released=True))
            except StorageError as error:
                say(f"{error}; the lease of this run ends in {EXPIRY:.0f} s")


def _acquire(home: epath.Path, mine: _Lease, say: Callable[[str], None]) -> int:
    """Create a lease, after the end of the one before it, and return its number."""
    while True:
        number, last = _newest(home)
        over = not number or last.get("released") or last.get("id") == mine["id"]
        if not over and abs(time.time() - float(last.get("time", 0))) < _LONG_AGO:
            say(
                f"{home}: {last.get('holder')} has not given this run back; this process waits until that one "
                f"gives it back, or has not renewed its lease for {EXPIRY:.0f} s"
            )
            if not _silent(home, number, last):
                continue
        if create(_path(home, number + 1), _text(mine, 0)):
            for older in children(home / FOLDER):
                if older.name < _path(home, number + 1).name:
                    _forget(older)
            return number + 1


def _silent(home: epath.Path, number: int, last: _Lease) -> bool:
    """Whether a lease is not renewed for `EXPIRY` seconds; False if it was given back or another one follows it.

    Raises:
      ConfigError: it is still renewed after `EXPIRY` seconds, so its holder is not about to end.
    """
    began = heard = time.monotonic()
    while time.monotonic() - heard < EXPIRY:
        time.sleep(BEAT / 10)
        found, lease = _newest(home)
        if found != number or lease.get("released"):
            return False
        if lease == last:
            continue
        if time.monotonic() - began > EXPIRY:
            raise ConfigError(
                f"run.dir={home}: is held by {lease.get('holder')}; wait for it, stop it, or choose another --run.dir"
            )
        last, heard = lease, time.monotonic()
    return True


def _renew(home: epath.Path, number: int, mine: _Lease, done: threading.Event, lost: threading.Event) -> None:
    """Renew a lease until `done` is set, or until another one follows it, which sets `lost`."""
    beats = 0
    while not done.wait(BEAT):
        beats += 1
        try:
            if _newest(home)[0] > number:
                lost.set()
                return
            write(_path(home, number), _text(mine, beats))
        except (OSError, StorageError, ConfigError):
            continue  # The bucket does not answer. Copies and checkpoints report that.


def _newest(home: epath.Path) -> tuple[int, _Lease]:
    """The newest lease and its number; 0 if there is none."""
    try:
        names = sorted(path.name for path in children(home / FOLDER))
        if not names:
            return 0, {}
        try:
            number = int(names[-1].partition(".")[0])
            return number, json.loads(read_bytes(home / FOLDER / names[-1]))
        except ValueError as error:
            raise ConfigError(
                f"run.dir={home}: {FOLDER}/{names[-1]} is not a lease ({error}); remove that file"
            ) from error
    except OSError as error:
        raise unread(home / FOLDER, error) from error


def _forget(lease: epath.Path) -> None:
    """Remove a lease that another one follows; if the bucket refuses, it stays and is never read."""
    try:
        remove(lease)
    except OSError:
        return


def _path(home: epath.Path, number: int) -> epath.Path:
    return home / FOLDER / f"{number:06d}.json"


def _text(mine: _Lease, beats: int, released: bool = False) -> bytes:
    return json.dumps({**mine, "beats": beats, "time": time.time(), "released": released}).encode()
