"""Copies a run's small files between its working folder and its bucket."""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from etils import epath

from pspo_jax.runs.home import HOME, bucket_of, checked_url, named, stand_for
from pspo_jax.runs.lease import held
from pspo_jax.system.buckets import get_files, is_url, objects, put_files, remove
from pspo_jax.system.storage import StorageError, unread, unwritten, writing

_OWN = (HOME, "*.lock", "*.partial", ".write-test*", "wandb")
"""Names of files and folders that belong to the working folder and are never copied."""
_MODEL = "model"
"""Name of the folder of the finished model of a run of supervised fine-tuning."""
_IN_BUCKET = ("checkpoints", "checkpoints.damaged", "cold_start*", "set_aside", "profile", "events.out.*", *_OWN)
"""Names of files and folders of the bucket that are never copied to the working folder, since they are large or not
read there."""
_LOGS = ("workers.log",)
"""Names of files that a process of this machine may have open already when the others are copied here."""
_TOGETHER = 64
"""Number of files that are copied at once."""

_Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change in nanoseconds, and inode of a file."""


class Mirror(NamedTuple):
    """A working folder and the folder of a bucket that it stands for."""

    local: Path
    home: epath.Path
    known: dict[str, _Stamp]
    """The stamp of each file of the working folder that the bucket has."""
    check: Callable[[], None] = lambda: None
    """Function that raises ConfigError once another process has taken over the run in the bucket."""

    def pull(self, model: bool = False) -> None:
        """Replace the files of the working folder by the small files of the bucket; those that only it has are removed.

        Args:
          model: whether the finished model of a run of supervised fine-tuning is copied too.
        Raises:
          StorageError: the bucket does not give a file, or it cannot be written here.
        """
        try:
            left = (*_IN_BUCKET, *_LOGS, *(() if model else (_MODEL,)))
            found = [name for name in objects(self.home) if not _is(name, left)]
        except OSError as error:
            raise unread(self.home, error) from error
        # Only now: a bucket that does not answer leaves the folder as it is.
        for name in _files(self.local):
            if _is(name, _LOGS):
                continue
            with writing(self.local / name):
                (self.local / name).unlink()
        self.known.clear()
        for start in range(0, len(found), _TOGETHER):
            names = found[start : start + _TOGETHER]
            get_files(self.home, self.local, names)
            self.known.update((name, _stamp(self.local / name)) for name in names)

    def push(self) -> None:
        """Copy the files that have changed since the last copy to the bucket, and remove there what was removed here.

        Raises:
          StorageError: a file cannot be read here or written there.
          ConfigError: another process has taken over the run.
        """
        self.check()
        found = {name: _stamp(self.local / name) for name in _files(self.local)}
        changed = [name for name, stamp in found.items() if self.known.get(name) != stamp]
        for start in range(0, len(changed), _TOGETHER):
            names = changed[start : start + _TOGETHER]
            put_files(self.local, self.home, names)
            self.known.update((name, found[name]) for name in names)
        for name in [name for name in self.known if name not in found]:
            try:
                remove(self.home / name)
            except OSError as error:
                raise unwritten(self.home / name, error, 0) from error
            del self.known[name]


@contextmanager
def mirrored(folder: Path, say: Callable[[str], None], writes: bool) -> Iterator[Mirror | None]:
    """Hold the lease of a run in a bucket; copy its small files to the working folder, and back at the end.

    Yields None for a run that is in no bucket, and for a process that does not write.

    Args:
      say: function that prints a line: on a wait for another process, and if files cannot be copied after an error.
      writes: whether this process is the one of the run that writes.
    Raises:
      ConfigError: another process holds the run.
      StorageError: the bucket does not answer.
    """
    found = bucket_of(folder)
    if found is None or not writes:
        with named(folder):
            yield None
        return
    home = epath.Path(found.url)
    with named(folder), held(home, found.id, say) as check:
        mirror = Mirror(folder, home, {}, check)
        mirror.pull()
        try:
            yield mirror
        except BaseException:
            try:
                mirror.push()
            except (StorageError, ValueError) as late:
                say(
                    f"{late}; lines logged since the last checkpoint are only in {folder}, and the next start replaces "
                    "them: the resumed run logs these steps again"
                )
            raise
        mirror.push()


@contextmanager
def reading(run: str, flag: str = "--run", model: bool = False) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A run's folder, or a temporary copy of the small files of one in a bucket.

    Yields its path, and a function that copies what is written there to the bucket.

    Args:
      flag: flag or field that named the run.
      model: whether the finished model of a run of supervised fine-tuning is copied too.
    Raises:
      ConfigError: the URL names no folder of a bucket, or the bucket refuses.
      StorageError: the bucket does not answer.
    """
    if not is_url(run):
        yield Path(run), lambda: None
        return
    url = checked_url(run, flag)
    with tempfile.TemporaryDirectory(prefix="pspo_jax-") as place:
        folder = Path(place) / url.removeprefix("gs://")
        folder.mkdir(parents=True)
        stand_for(folder, url)
        mirror = Mirror(folder, epath.Path(url), {})
        with named(folder):
            mirror.pull(model)
            yield folder, mirror.push


def _files(folder: Path) -> list[str]:
    """The files of a working folder that are copied, by their names inside it."""
    found = []
    for place, _, names in os.walk(folder):
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in sorted(names)]
    return [name for name in found if not _is(name, _OWN)]


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file, or the topmost folder that it is in, has a name like one of the patterns."""
    first, last = name.partition("/")[0], name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(first, p) or fnmatch.fnmatchcase(last, p) for p in patterns)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise unread(path, error) from error
    return found.st_size, found.st_mtime_ns, found.st_ino
