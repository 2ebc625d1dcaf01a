"""A table on disk of which each of several processes makes a part.

The processes of a run need the same table of tokenised prompts. Each of them makes the rows of its share and writes
them to a file beside the table. If all see the files of all, which they do in a folder on a shared file system, one of
them joins the files, and all read the table. Otherwise each makes the rows that it does not see itself.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pspo_jax.distributed import processes
from pspo_jax.system.storage import writing

if TYPE_CHECKING:
    import pyarrow

SHARED_FROM = 1000
"""Rows from which on processes share the work; fewer are made sooner than the processes have agreed."""
_DAY_SECONDS = 86400.0
"""Seconds that processes wait for each other's rows."""
_PATIENCE = 10.0
"""Seconds for which a process looks for the files of others, since a network file system may show them late."""


class MakeRows(Protocol):
    """Finds the table of some rows in a file, or makes it and writes the file, whole or not at all."""

    def __call__(self, path: Path, rows: range, /) -> object: ...


def share_work(path: Path, count: int, make: MakeRows, say: Callable[[str], None]) -> None:
    """Make the table `path` together with the other processes of the run, if some of them do not have it.

    All processes must call it. Nothing is made here where there is one process, or the rows are few: the caller makes
    the table then. Where a process does not see the files of all others, a line says so, and it makes their rows too.

    Args:
      path: file of the table; its name says which data, settings and tokenizer it belongs to.
      count: number of rows.
      make: makes the rows of a share.
      say: is told if the folder is not shared.
    Raises:
      StorageError: the files cannot be joined.
    """
    if processes.process_count() == 1:
        return
    digest = hashlib.sha256(f"{path.name} {count}".encode()).digest()
    if not processes.equal_everywhere(np.frombuffer(digest, np.uint32)).all():
        say(f"task.cache={path.parent}: processes have other data, settings or caches; each tokenises for itself")
        return
    number, lacks = processes.process_number(), np.zeros(processes.process_count(), np.int32)
    lacks[number] = not path.exists()
    workers = [int(i) for i in np.flatnonzero(processes.sum_over_processes(lacks))]
    if not workers or count < SHARED_FROM:
        return
    n = len(workers)
    shares = {
        path.with_name(f"{path.stem}-{i}-of-{n}.arrow"): range(count * i // n, count * (i + 1) // n) for i in range(n)
    }
    parts = list(shares)
    if number in workers:
        _make_whole(own := parts[workers.index(number)], shares[own], make)
    processes.wait_for_all(f"{path.stem}/made", _DAY_SECONDS)
    unseen = _unseen(parts) if number in workers else []
    alone = processes.any_process(bool(unseen))
    if unseen:
        rows = sum(len(shares[part]) for part in unseen)
        say(
            f"task.cache={path.parent}: this process sees no rows from {len(unseen)} of {n} processes, so it tokenises "
            f"{rows:,} more of {count:,} prompts; a folder that all share spares that"
        )
    for part in unseen:
        _make_whole(part, shares[part], make)
    if number in (workers if alone else workers[:1]):
        _join(parts, path)
    processes.wait_for_all(f"{path.stem}/joined", _DAY_SECONDS)
    _unseen([path])
    for part in parts:
        part.unlink(missing_ok=True)


def _make_whole(path: Path, rows: range, make: MakeRows) -> None:
    """Make the file of a share, unless a whole one of an earlier start is there."""
    if path.exists() and not readable(path):
        path.unlink(missing_ok=True)
    make(path, rows)


def _unseen(parts: Sequence[Path]) -> list[Path]:
    """The files that are still not there, or not whole, after a while."""
    end = time.monotonic() + _PATIENCE
    while unseen := [part for part in parts if not part.exists() or not readable(part)]:
        if time.monotonic() >= end:
            return unseen
        time.sleep(0.2)
        os.scandir(parts[0].parent).close()  # A network file system looks again.
    return []


def _join(parts: Sequence[Path], path: Path) -> None:
    """Write the rows of all files, one file after the other, to the table, which appears whole or not at all."""
    import pyarrow

    partial = path.with_name(f"{path.name}.{processes.process_number()}.partial")
    with writing(path):
        try:
            schema = _rows(parts[0]).schema
            with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
                for batch in itertools.chain.from_iterable(_rows(part) for part in parts):
                    writer.write_batch(batch)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _rows(path: Path) -> pyarrow.ipc.RecordBatchStreamReader:
    """The rows of a file, block by block."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))


def readable(path: Path) -> bool:
    """Whether a file of a table is whole; a full disk or a kill may have cut it off."""
    import datasets
    import pyarrow

    try:
        return len(datasets.Dataset.from_file(str(path))) >= 0
    except (pyarrow.ArrowException, OSError):
        return False
