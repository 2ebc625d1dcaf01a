"""A checkpoint's metadata and scores, which lie beside its arrays: read without Orbax, and mended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypedDict, cast

from pspo_jax.checkpoint import damage
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.config.fields import ConfigError
from pspo_jax.system.buckets import Place, children, exists, remove, write

_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"
"""The object that Orbax writes last to a checkpoint in a bucket."""


class AccountingRecord(TypedDict, total=False):
    """A run's accounting as a checkpoint holds it."""

    counts: dict[str, int]
    seconds: dict[str, float]
    """Seconds by phase."""
    total: float
    """Seconds since the run began, without pauses between its parts."""


class Metadata(TypedDict, total=False):
    """A checkpoint's metadata: JSON beside its arrays."""

    step: int
    config: dict[str, object]
    """Dotted field -> value."""
    dataset: str
    """Fingerprint of the training prompts."""
    heldout: str
    """Fingerprint of the held-out prompts."""
    source: str | None
    """Fingerprint of the checkpoint that the run began from."""
    base: dict[str, int]
    """Checksums of the frozen weights, which the checkpoint leaves out."""
    teacher: dict[str, int]
    """Checksums of the teacher's weights, which the checkpoint leaves out too; empty = there is no teacher."""
    totals: AccountingRecord
    scores: dict[str, float] | None
    """Held-out scores, if the step was evaluated and they are finite."""
    checksums: dict[str, int]
    """Checksum of each array, by its path."""
    layout: dict[str, str]
    """Type and shape of each array, by its path."""
    crc: int
    """Checksum of all of the above."""


def read_metadata(path: Place) -> Metadata:
    """The metadata of one checkpoint, read without Orbax, which takes a file that it cannot read for an empty one.

    Raises:
      DamageError: it is not what was written.
      ConfigError: another version of the program wrote it.
      StorageError: it cannot be read now.
    """
    found = damage.read_json(path / _METADATA)
    if (reason := damage.complaint_of(path, _METADATA)) is not None:
        raise DamageError(reason)
    custom = found.get("custom_metadata") if isinstance(found, dict) else None
    if not isinstance(custom, dict) or not custom:
        raise DamageError(f"{_METADATA} lacks what was written")
    if "crc" not in custom:
        raise ConfigError(
            f"{path}: is of another version of this program; choose another --run.dir, or carry on with the version "
            "that wrote it"
        )
    crc = custom.pop("crc")
    if damage.checksum(custom) != crc:
        raise DamageError(f"{_METADATA} is not what was written: its checksum differs")
    return cast(Metadata, custom)


def finite(scores: dict[str, float] | None) -> dict[str, float] | None:
    """Scores that can rank a checkpoint; None if the greedy one has no value, as when nothing was verified."""
    if scores is None or not math.isfinite(scores.get("greedy", math.nan)):
        return None
    return {name: float(value) for name, value in scores.items() if math.isfinite(value)}


def step_folders(folder: Place) -> list[Place]:
    """The folders of a run's checkpoints; in a bucket those alone whose checkpoint is complete.

    A folder of this machine gets its name when the checkpoint in it is complete.
    """
    found = [path for path in children(folder) if path.name.isdigit()]
    return [path for path in found if (path.is_dir() if isinstance(path, Path) else exists(path / _COMMITTED))]


def damaged_metadata(folder: Place) -> list[tuple[int, str]]:
    """(step, why) of each checkpoint whose metadata is not what was written."""
    found = []
    for path in step_folders(folder):
        try:
            read_metadata(path)
        except DamageError as error:
            found.append((int(path.name), str(error)))
    return found


def mend_scores(folder: Place, steps: list[int]) -> list[str]:
    """Rewrite damaged files of scores from the checkpoints' metadata, which holds them too; returns a line on each."""
    said = []
    for step in steps:
        path = folder / str(step) / "metrics" / "metrics"
        try:
            found = damage.read_json(path) if exists(path) else None
            if found is None or math.isfinite(found["greedy"]):
                continue
        except (DamageError, KeyError, TypeError):
            said.append(f"{path}: is damaged; it is written anew")
        try:
            scores = read_metadata(folder / str(step))["scores"]
        except DamageError:
            scores = None  # `restore` will tell
        if scores is None:
            remove(path)
        else:
            write(path, json.dumps(scores).encode())
    return said
