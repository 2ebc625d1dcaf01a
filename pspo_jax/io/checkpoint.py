"""Checkpoints: asynchronous, atomic, kept by policy, verified when read.

Everything Orbax is in this file. A checkpoint is a TrainState and metadata (config, dataset fingerprint, accounting).
Its metadata also holds a checksum of every array, so that a damaged file is found out instead of trained on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from pspo_jax.config import CheckpointConfig, ConfigError
from pspo_jax.parallel import hosts

_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RuntimeError, AttributeError)
"""What Orbax and TensorStore raise on files that are missing, cut off or altered."""


class Checkpoints:
    """The checkpoints of one run folder. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder = folder
        logging.getLogger("absl").setLevel(logging.ERROR)
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["greedy"],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        self._orbax.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def save(self, step: int, state: Any, metadata: dict[str, Any], scores: dict[str, float] | None = None) -> None:
        """Start saving; the write to disk goes on in the background. `scores["greedy"]` ranks keep_best."""
        self._orbax.wait()
        if step in self.steps():
            return
        # A copy: Orbax writes metadata in the background, while the caller's counters go on.
        metadata = {**copy.deepcopy(metadata), "checksums": named_checksums(state), "layout": layout(state)}
        self._orbax.save_checkpointables_async(
            step, {"state": _present(state)}, metrics=scores, custom_metadata=metadata
        )

    def wait(self) -> None:
        """Return when the last save is on disk."""
        self._orbax.wait()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given for this step."""
        return dict(self._orbax.checkpointables_metadata(step).custom_metadata)

    def restore(
        self, abstract: Any, warn: Callable[[str], None], check: Callable[[dict[str, Any]], Any | None] = lambda _: None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that reads back whole, or None if there is none at all.

        A damaged one is reported and moved to `<folder>.damaged`, so that its step can be saved again.

        Args:
          abstract: pytree of ShapeDtypeStruct with shardings, like the state.
          check: raises ConfigError for metadata of a run that these settings cannot carry on; nothing is moved then.
            May return another abstract, if the checkpoint's shapes follow from its metadata.
        Raises:
          ConfigError: checkpoints exist but none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            found, reason = None, ""
            try:
                found = self._load(step, abstract, check)
            except ConfigError:
                raise
            except _UNREADABLE as error:
                reason = " ".join(str(error).split())[:200]
            # What one process cannot read, no process takes.
            if not hosts.any_says(found is None):
                assert found is not None
                state, metadata = found
                try:
                    verify(state, metadata["checksums"])
                    return found
                except ValueError as error:
                    reason = str(error)
            moved = self._set_aside(step)
            warn(
                f"checkpoint {step} is damaged ({reason or 'on another host'}); moved to {moved}, trying the one before"
            )
        if steps:
            raise ConfigError(
                f"run.dir: none of the checkpoints {steps} in {self.folder} can be read; they were moved to "
                f"{self._damaged}; choose another --run.dir to start anew"
            )
        return None

    def _load(
        self, step: int, abstract: Any, check: Callable[[dict[str, Any]], Any | None]
    ) -> tuple[Any, dict[str, Any]]:
        metadata = self.metadata(step)
        wanted = check(metadata) or abstract
        _check_layout(step, wanted, metadata)
        with _partial_load():
            found = self._orbax.load_checkpointables(step, {"state": _present(wanted)})["state"]
        return {**wanted, **found} if isinstance(wanted, dict) else dataclasses.replace(wanted, **found), metadata

    @property
    def _damaged(self) -> Path:
        return self.folder.with_name(self.folder.name + ".damaged")

    def _set_aside(self, step: int) -> Path:
        target = self._damaged / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        hosts.wait_for_all(f"damaged {step}")
        if hosts.leads():
            self._damaged.mkdir(exist_ok=True)
            shutil.move(self.folder / str(step), target)
        hosts.wait_for_all(f"moved {step}")
        self._orbax.reload()
        return target


def saved_steps(folder: Path) -> list[int]:
    """Steps whose checkpoint is complete, ascending; only looks, so a run that is going on is not disturbed."""
    done = [p for p in folder.glob("*") if p.name.isdigit() and ocp.is_orbax_checkpoint(p.absolute())]
    return sorted(int(p.name) for p in done)


def read_params(folder: Path, step: int, place: Callable[[Any], Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """The params of one checkpoint as nested dicts of arrays, verified, and its metadata.

    Args:
      place: a tree of shapes -> shardings; None = the default device.
    Raises:
      ConfigError: the checkpoint cannot be read whole.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(saved: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        shardings = jax.tree.map(lambda _: device, shapes) if place is None else place(shapes)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    return read_part(folder, step, "params", abstract)


def read_part(folder: Path, step: int, part: str, abstract: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
    """One field of the state in a checkpoint, verified, and the checkpoint's metadata; nothing else is read.

    Args:
      part: name of the field, such as params or selector.
      abstract: the shapes on disk -> pytree of ShapeDtypeStruct with shardings.
    Raises:
      ConfigError: the checkpoint cannot be read whole.
    """
    path = (folder / str(step)).absolute()
    try:
        found = ocp.checkpointables_metadata(path)
        wanted = abstract(found.metadata["state"][part])
        with _partial_load():
            value = ocp.load_checkpointables(path, {"state": {part: wanted}})["state"][part]
        metadata = dict(found.custom_metadata)
        saved = {k.removeprefix(f".{part}"): v for k, v in metadata["checksums"].items() if k.startswith(f".{part}")}
        verify(value, saved)
    except _UNREADABLE as error:
        raise ConfigError(f"checkpoint {path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return value, metadata


def save_folder(folder: Path, params: Any, metadata: dict[str, Any]) -> None:
    """Write params and `settings.json` to a folder, atomically: it appears when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    if hosts.leads():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    hosts.wait_for_all(f"partial {folder}")
    ocp.save_checkpointables(partial.absolute() / "params", {"params": params})
    metadata = {**metadata, "checksums": named_checksums(params)}
    if hosts.leads():
        (partial / "settings.json").write_text(json.dumps(metadata, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    hosts.wait_for_all(f"whole {folder}")


def load_folder(folder: Path, abstract: Any, settings: dict[str, Any]) -> Any | None:
    """Params of a folder that `save_folder` wrote with equal settings; None if it is another's or damaged."""
    try:
        found = json.loads((folder / "settings.json").read_text())
        checksums = found.pop("checksums")
        if found != settings:
            return None
        params = ocp.load_checkpointables(folder.absolute() / "params", {"params": abstract})["params"]
    except _UNREADABLE:
        params = None
    if hosts.any_says(params is None):
        return None
    try:
        verify(params, checksums)
    except ValueError:
        return None
    return params


def _present(state: Any) -> dict[str, Any]:
    """The fields that hold something: one that is younger than a checkpoint and empty need not be in it."""
    fields = state if isinstance(state, dict) else {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _partial_load() -> ocp.Context:
    """Load what is asked for, whatever else is there."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def layout(tree: Any) -> dict[str, str]:
    """Path of each array -> its type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _check_layout(step: int, wanted: Any, metadata: dict[str, Any]) -> None:
    """Raise ConfigError if a checkpoint is of a state of another make: it is whole, and must not pass as damaged."""
    now = layout(wanted)
    # Older checkpoints say only which arrays they hold.
    before = metadata.get("layout") or {name: now.get(name, "an array") for name in metadata["checksums"]}
    differs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differs:
        name = differs[0]
        raise ConfigError(
            f"run.dir: checkpoint {step} is of another version of this program, or of other settings: state{name} is "
            f"{before.get(name, 'not there')} in it and {now.get(name, 'not there')} now ({len(differs)} differ); "
            "choose another --run.dir, or carry on with the version that wrote it"
        )


@jax.jit
def checksums(tree: Any) -> list[UInt32[Array, ""]]:
    """One 32-bit checksum a leaf, over bits and positions; sums of integers, so the same on any topology."""

    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, bits)
        words = x.astype(jnp.uint32).ravel()
        weight = jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        return (words * weight).sum(dtype=jnp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def named_checksums(tree: Any) -> dict[str, int]:
    """Path of each array -> its checksum."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(names, (int(x) for x in hosts.whole(checksums(tree))), strict=True))


def verify(tree: Any, expected: dict[str, int]) -> None:
    """Raise ValueError unless the arrays have these checksums."""
    found = named_checksums(tree)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong or len(found) != len(expected):
        raise ValueError(f"checksum of {', '.join(wrong[:3]) or 'the tree'} differs")
