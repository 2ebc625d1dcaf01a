"""Reads checkpoints without opening them for writing, so that a run that is going on is not disturbed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from pspo_jax.checkpoint.checksums import verify
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.metadata import Metadata, read_metadata, step_folders
from pspo_jax.checkpoint.orbax_errors import classified, raised, silence_orbax
from pspo_jax.config.fields import ConfigError
from pspo_jax.system.buckets import Place, absolute, exists


def saved_steps(folder: Place) -> list[int]:
    """Steps whose checkpoint is complete, ascending."""
    done = [p for p in step_folders(folder) if not isinstance(p, Path) or ocp.is_orbax_checkpoint(p.absolute())]
    return sorted(int(p.name) for p in done)


def read_params(
    folder: Place, step: int, place: Callable[[PyTree], PyTree] | None = None, alone: bool = False
) -> tuple[PyTree, Metadata]:
    """The params of one checkpoint as nested dicts of arrays, verified, and its metadata.

    Args:
      place: gives the shardings of a tree of shapes; None = all on the default device.
      alone: see `read_part`.
    Raises:
      ConfigError: the checkpoint is damaged.
      StorageError: it cannot be read now.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(saved: PyTree) -> PyTree:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        shardings = jax.tree.map(lambda _: device, shapes) if place is None else place(shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    return read_part(folder, step, "params", abstract, alone)


def params_identity(folder: Place, step: int) -> str:
    """Hash of the checksums of a checkpoint's params, and of the base under them.

    Raises:
      ConfigError: the checkpoint's metadata is damaged.
      StorageError: it cannot be read now.
    """
    try:
        found = read_metadata(folder / str(step))
    except DamageError as error:
        raise _unusable(folder / str(step), error) from error
    own = {name: value for name, value in found["checksums"].items() if name.startswith(".params")}
    words = json.dumps([own, found.get("base"), found.get("source")], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _unusable(path: Place, error: ValueError) -> ConfigError:
    """The error of a damaged checkpoint, or of one that a run has removed meanwhile."""
    if not exists(path):
        return ConfigError(f"checkpoint {path}: is gone, as a run that goes on keeps only some; choose another step")
    return ConfigError(f"checkpoint {path}: is damaged ({error}); choose another step")


def read_part(
    folder: Place, step: int, part: str, abstract: Callable[[PyTree], PyTree], alone: bool = False
) -> tuple[PyTree, Metadata]:
    """One field of the state in a checkpoint, verified, and the checkpoint's metadata; nothing else is read.

    Args:
      part: name of the field, such as params or selector.
      abstract: gives a pytree of ShapeDtypeStruct with shardings, from the shapes on disk.
      alone: whether this process reads, and the others of the run do not take part.
    Raises:
      ConfigError: the checkpoint is damaged.
      StorageError: it cannot be read now.
    """
    path = absolute(folder / str(step))
    silence_orbax()
    try:
        metadata = read_metadata(path)
    except DamageError as error:
        raise _unusable(path, error) from error
    try:
        with partial_load(alone):
            wanted = abstract(ocp.checkpointables_metadata(path).metadata["state"][part])
            value = ocp.load_checkpointables(path, {"state": {part: wanted}})["state"][part]
    except raised() as error:
        told = classified(error, path)
        if isinstance(told, DamageError):
            raise _unusable(path, told) from error
        if told is error:
            raise
        raise told from error
    try:
        saved = {k.removeprefix(f".{part}"): v for k, v in metadata["checksums"].items() if k.startswith(f".{part}")}
        verify(value, saved)
    except ValueError as error:
        raise _unusable(path, error) from error
    return value, metadata


def whole_ones(steps: list[int]) -> str:
    """A clause on which checkpoints are there."""
    if not steps:
        return "no whole checkpoint is there"
    return f"checkpoint {steps[0]} is whole" if len(steps) == 1 else f"checkpoints {steps} are whole"


def partial_load(alone: bool = False) -> ocp.Context:
    """A context in which Orbax loads the arrays that are asked for, whatever else is there.

    Args:
      alone: whether Orbax waits for no other process of the run.
    """
    mine = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine}) if alone else None
    context = ocp.Context(multiprocessing_options=options)
    context.pytree.loading.partial_load = True
    return context
