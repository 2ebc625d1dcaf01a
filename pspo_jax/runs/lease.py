"""One run at a time in a folder of a bucket: a numbered lease, which its holder renews and a later one follows.

A bucket has no locks, but of several processes one alone can make an object that is not there. Lease n + 1 may be made
when lease n was given back, or was not renewed for `EXPIRY` seconds. A holder that finds a later lease has lost the
run. Clocks of two machines are not compared: who waits, counts the seconds itself.
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
"""Folder of the leases in the run's folder."""
BEAT = 20.0
"""Seconds between two renewals."""
EXPIRY = 120.0
"""Seconds without a renewal after which another process may take the run over."""
_LONG_AGO = 3600.0
"""Seconds of age, by this machine's clock, from which a lease has expired without a wait; no two clocks differ so."""

_Lease = dict[str, Any]
"""The contents of a lease: holder (in words), id, beats, time in seconds since 1970, and whether it was given back."""


@contextmanager
def held(home: epath.Path, owner: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the run in a folder of a bucket, and renew the lease meanwhile.

    Yields a function that raises ConfigError once another process has taken the run over.

    Args:
      owner: id of the working folder, whose lock this process holds; no other process has a lease of this id then.
      say: is told of a wait, and of a lease that could not be given back.
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
                f"run.dir={home}: {found.get('holder')} took this run over, as its lease was not renewed for "
                f"{EXPIRY:.0f} s; stop that process to carry on here"
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
    """The number of a new lease; waits for the end of another one, if need be."""
    while True:
        number, last = _newest(home)
        over = not number or last.get("released") or last.get("id") == mine["id"]
        if not over and abs(time.time() - float(last.get("time", 0))) < _LONG_AGO:
            say(
                f"{home}: {last.get('holder')} has not given this run back; this process waits until it has, or has "
                f"given no sign of life for {EXPIRY:.0f} s"
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
            continue  # The bucket does not answer; copies and checkpoints tell.


def _newest(home: epath.Path) -> tuple[int, _Lease]:
    """The newest lease and its number; 0 if there is none."""
    try:
        names = sorted(path.name for path in children(home / FOLDER))
        if not names:
            return 0, {}
        number = int(names[-1].partition(".")[0])
        return number, json.loads(read_bytes(home / FOLDER / names[-1]))
    except ValueError as error:
        raise ConfigError(f"run.dir={home}: {FOLDER} holds what is no lease ({error}); remove it") from error
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
