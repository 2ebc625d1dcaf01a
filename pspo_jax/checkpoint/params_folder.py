"""A folder of params alone, such as a cold start's, with a record of the settings that they came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from pspo_jax.checkpoint import damage
from pspo_jax.checkpoint.checksums import named_checksums, verify
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.orbax_errors import classified, raised, silence_orbax
from pspo_jax.distributed import processes
from pspo_jax.system.buckets import Place, absolute, exists, move, remove, write
from pspo_jax.system.storage import StorageError, os_reason, room

_SETTINGS = "settings.json"


class _Record(NamedTuple):
    """The contents of settings.json."""

    settings: Mapping[str, object]
    checksums: dict[str, int]


def save_folder(folder: Place, params: PyTree, settings: Mapping[str, object], supersedes: bool = False) -> None:
    """Write params and their settings to a folder, which appears when it is whole.

    A folder that was there is set aside. In a bucket, where no folder can be renamed at once, settings.json is written
    last, and a folder without it is none.

    Args:
      supersedes: whether the folder that was there is an earlier state of the same, which is removed afterwards.
    Raises:
      StorageError: it cannot be written.
    """
    silence_orbax()
    partial = folder.with_name(folder.name + ".partial") if isinstance(folder, Path) else folder
    checksums = named_checksums(params)
    words = {"settings": settings, "checksums": checksums}
    record = json.dumps({**words, "crc": damage.checksum(words)}, indent=1).encode()
    try:
        if processes.is_primary():
            _clear(partial, supersedes)
        processes.wait_for_all(f"partial {folder}")
        ocp.save_checkpointables(absolute(partial) / "params", {"params": params})
        if processes.is_primary() and isinstance(partial, Path):
            write(partial / _SETTINGS, record)
            damage.record(partial)
            before = set_aside(folder)
            move(partial, folder)
            if supersedes and before is not None:
                remove(before)
        elif processes.is_primary():
            damage.record(partial)
            write(partial / _SETTINGS, record)
    except raised() as error:
        if reason := os_reason(error):
            full = f"; {room(folder.parent)}" if isinstance(folder, Path) else ""
            told = f"{folder}: cannot be written ({reason}{full})"
            raise StorageError(f"{told}; once it can, the same command carries on") from error
        raise
    processes.wait_for_all(f"whole {folder}")


def _clear(partial: Place, supersedes: bool) -> None:
    """Make place for a folder that is to be written; in a bucket, what is there may be whole and is then set aside."""
    if isinstance(partial, Path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return
    if is_there(partial) and not supersedes:
        set_aside(partial)
    remove(partial)


def is_there(folder: Place) -> bool:
    """Whether a folder of params has been written whole, as far as its names tell."""
    return exists(folder if isinstance(folder, Path) else folder / _SETTINGS)


def set_aside(folder: Place) -> Place | None:
    """Rename a folder or file to <name>.before, <name>.before2, ...; None if it is not there."""
    if not exists(folder):
        return None
    target, number = folder.with_name(f"{folder.name}.before"), 1
    while exists(target):
        number += 1
        target = folder.with_name(f"{folder.name}.before{number}")
    move(folder, target)
    return target


def belongs(folder: Place, settings: Mapping[str, object]) -> bool:
    """Whether a folder's params came from these settings.

    Raises:
      DamageError: its settings.json is not what was written.
      StorageError: it cannot be read now.
    """
    return folder_settings(folder) == settings


def folder_settings(folder: Place) -> Mapping[str, object]:
    """The settings that a folder's params came from; raises as `belongs`."""
    return dict(_read(folder).settings)


def load_folder(folder: Place, abstract: PyTree) -> PyTree:
    """Params of a folder that `save_folder` wrote.

    Raises:
      DamageError: its files are not what was written, on this or another process.
      StorageError: they cannot be read now.
    """
    silence_orbax()
    params, reason, checksums = None, "", {}
    try:
        checksums = _read(folder).checksums
        params = ocp.load_checkpointables(absolute(folder) / "params", {"params": abstract})["params"]
    except DamageError as error:
        reason = str(error)
    except raised() as error:
        found = classified(error, folder)
        if found is error:
            raise
        if not isinstance(found, DamageError):
            raise found from error
        reason = str(found)
    if processes.any_process(params is None):
        raise DamageError(reason or "on another host")
    try:
        verify(params, checksums)
    except ValueError as error:
        raise DamageError(str(error)) from error
    return params


def _read(folder: Place) -> _Record:
    """The contents of settings.json; DamageError unless it has the checksum that was written."""
    found = damage.read_json(folder / _SETTINGS)
    try:
        if damage.checksum({name: found[name] for name in ("settings", "checksums")}) == found["crc"]:
            return _Record(found["settings"], found["checksums"])
    except (KeyError, TypeError):
        pass
    raise DamageError(f"{_SETTINGS} is not what was written")
