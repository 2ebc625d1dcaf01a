"""TensorBoard's event files, written a record at a time, so that a full disk is an error of the write that met it."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pspo_jax.system.storage import append_whole


@contextmanager
def _without_torch() -> Iterator[None]:
    """Let an import find no torch, unless this process has it already.

    tensorboardX imports torch where it is installed, for 2 s and 200 MiB, and nothing that is used here needs it.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c


class Events:
    """One event file of a run folder."""

    def __init__(self, folder: Path, first_step: int):
        """Begin a file; what older ones hold from `first_step` on is hidden."""
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        start = (
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )
        append_whole(self._path, b"".join(map(_record, start)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append the numbers of a step.

        Raises:
          StorageError: they cannot be written; nothing of them is.
        """
        found = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        append_whole(self._path, _record(Event(wall_time=time.time(), step=step, summary=found)))


def _record(event: Event) -> bytes:
    """An event in the TFRecord format: length, its checksum, data, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
