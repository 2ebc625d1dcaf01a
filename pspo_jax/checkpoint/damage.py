"""Finds files of a folder that are no longer what was written, by a record of their sizes and checksums."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from pspo_jax.system.buckets import Place, object_of, objects, read_bytes, write
from pspo_jax.system.storage import unread

RECORD = "files.json"
_LARGEST = 64 * 2**20
"""Size in bytes up to which a file's checksum is recorded. For a larger file the size alone is recorded, as its arrays
have checksums of their own. A bucket computes the checksum of each object itself, whatever its size."""


class DamageError(ValueError):
    """Files of a checkpoint are not what was written; the message says which."""


def checksum(value: object) -> int:
    """CRC-32 of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def record(folder: Place) -> None:
    """Keep size and checksum of every file under `folder`, in `folder`/files.json.

    Raises:
      StorageError: a file cannot be read, or the record not be written.
    """
    files = _measure_all(folder)
    write(folder / RECORD, json.dumps({"files": files, "crc": checksum(files)}).encode())


def complaint(folder: Place) -> tuple[str | None, bool]:
    """The damage of the files under `folder` in words, None = none is found; and whether the finding is certain.

    Every file is read, or the listing of a bucket. Without a record, as after a kill just before it was written, JSON
    files must at least parse.

    Raises:
      StorageError: a file is there and cannot be read, which is no damage.
    """
    found = _measure_all(folder)
    recorded = _recorded(folder)
    if recorded is None:
        broken = next((name for name in found if _is_json(name) and not _parses(folder / name)), None)
        return None if broken is None else f"{broken} is not JSON", False
    for name, (length, crc) in recorded.items():
        if name not in found:
            return f"{name} is gone", True
        if found[name][0] != length:
            return f"{name} has {found[name][0]:,} of {length:,} bytes", True
        if found[name][1] != crc:
            return f"{name} is not what was written: its checksum differs", True
    return None, all(crc is not None for _, crc in recorded.values())


def complaint_of(folder: Place, name: str) -> str | None:
    """The damage of one small file under `folder` in words; None = it is as recorded, or there is no record.

    Raises:
      StorageError: it cannot be read now.
    """
    recorded = (_recorded(folder) or {}).get(name)
    if recorded is None:
        return None
    try:
        found = _measure(folder / name)
    except OSError as error:
        raise unread(folder / name, error) from error
    return None if tuple(found) == recorded else f"{name} is not what was written: its checksum differs"


def read_json(path: Place) -> Any:
    """The value of a JSON file.

    Raises:
      DamageError: it is gone or no JSON.
      StorageError: it cannot be read.
    """
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise DamageError(f"{path.name} is gone") from error
    except OSError as error:
        raise unread(path, error) from error
    except ValueError as error:
        raise DamageError(f"{path.name} is not JSON") from error


def _recorded(folder: Place) -> dict[str, tuple[int, int | None]] | None:
    """The record; None if there is none, or it is damaged itself."""
    try:
        value = read_json(folder / RECORD)
        files = value["files"]
        if checksum(files) != value["crc"]:
            return None
    except (DamageError, KeyError, TypeError):
        return None
    return {name: (length, crc) for name, (length, crc) in files.items()}


def _measure_all(folder: Place) -> dict[str, list[int | None]]:
    """Size and checksum of each file, by its path inside the folder."""
    if not isinstance(folder, Path):
        try:
            listed = objects(folder)
        except OSError as error:
            raise unread(folder, error) from error
        return {name: [thing.size, thing.crc] for name, thing in listed.items() if name != RECORD}
    found: dict[str, list[int | None]] = {}
    for place, _, names in os.walk(folder, onerror=_raise):
        for name in sorted(names):
            path = Path(place) / name
            if path == folder / RECORD:
                continue
            try:
                found[str(path.relative_to(folder))] = _measure(path)
            except OSError as error:
                raise unread(path, error) from error
    return found


def _measure(path: Place) -> list[int | None]:
    """[bytes, CRC-32] of a file. The CRC is None for a large file, which is read too; in a bucket it is CRC-32C."""
    if not isinstance(path, Path):
        return list(object_of(path))
    crc, length = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            length += len(block)
            if length <= _LARGEST:
                crc = zlib.crc32(block, crc)
    return [length, crc if length <= _LARGEST else None]


def _raise(error: OSError) -> None:
    raise unread(Path(error.filename), error) from error


def _is_json(name: str) -> bool:
    """Whether Orbax writes JSON to this file."""
    path = Path(name)
    return path.name in ("_METADATA", "_CHECKPOINT_METADATA") or path.parent.name == "array_metadatas"


def _parses(path: Place) -> bool:
    try:
        read_json(path)
    except DamageError:
        return False
    return True
