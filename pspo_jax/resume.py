"""Carrying a run on: the checkpoint, and what must not have changed since it was saved."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pspo_jax.accounting import Totals
from pspo_jax.config import ConfigError
from pspo_jax.io.checkpoint import Checkpoints, verify
from pspo_jax.io.progress import Progress
from pspo_jax.parallel.mesh import prompts_shardings
from pspo_jax.setup import Setup, load_base
from pspo_jax.state import SavedState, TrainState


def restore(
    setup: Setup, folder: Path, checkpoints: Checkpoints, progress: Progress
) -> tuple[TrainState, Totals] | None:
    """The newest checkpoint's state and accounting, or None if there is none.

    Raises:
      ConfigError: data or weights are not those of the checkpoint.
    """
    places: list[Int[np.ndarray, "N"]] = []

    def check(metadata: dict[str, Any]) -> SavedState | None:
        if metadata.get("source") != source_fingerprint(setup):
            raise ConfigError(
                f"policy.source={setup.config.policy.source}: is not the checkpoint that this run began from "
                "(another config, or other tensors); restore it or choose another --run.dir"
            )
        if metadata["dataset"] == setup.task.train.fingerprint():
            return None
        before = saved_content(folder, metadata["dataset"])
        now = setup.task.train.content()
        if before is None:
            raise ConfigError(
                f"task.name={setup.task.name}: the prompts differ from those of the checkpoint, and what these were is "
                f"not on record ({folder / 'prompts'} lacks them); restore the data or choose another --run.dir"
            )
        if not setup.config.task.allow_change:
            raise ConfigError(
                f"task.name={setup.task.name}: the prompts differ from those of the checkpoint "
                f"({difference(before, now)}); restore the data, choose another --run.dir, or add --allow-data-change, "
                "with which each prompt keeps its own statistics"
            )
        progress.say(f"the data has changed: {difference(before, now)}; each prompt keeps its own statistics")
        places.append(old_rows(before, now))
        return _abstract_of(setup, len(before))

    found = checkpoints.restore(setup.abstract.to_save(), progress.say, check)
    if found is None:
        return None
    saved, metadata = found
    if places:
        saved = _follow(setup, saved, places[-1])
    frozen = None
    if setup.architecture.lora is not None:
        frozen = load_base(setup)
        try:
            verify(frozen, metadata["base"])
        except ValueError as error:
            raise ConfigError(
                f"policy.source={setup.config.policy.source}: its weights differ from those this run's adapters were "
                f"trained on ({error}); restore them or choose another --run.dir"
            ) from error
    state = saved.joined(frozen)
    progress.say(f"resuming at step {int(state.step)} of {setup.config.run.steps}")
    return state, Totals(metadata["totals"])


def source_fingerprint(setup: Setup) -> str | None:
    """Which checkpoint the run began from."""
    return None if setup.source is None else setup.source.fingerprint()


def save_content(setup: Setup, folder: Path) -> None:
    """Keep a hash of every prompt beside the checkpoints, 8 bytes each, to tell later what has changed."""
    path = _content_path(folder, setup.task.train.fingerprint())
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, setup.task.train.content())
    partial.rename(path)


def saved_content(folder: Path, fingerprint: str) -> np.ndarray | None:
    """What `save_content` kept; None if it is gone."""
    path = _content_path(folder, fingerprint)
    return np.load(path) if path.exists() else None


def _content_path(folder: Path, fingerprint: str) -> Path:
    return folder / "prompts" / f"{fingerprint}.npy"


def difference(before: np.ndarray, now: np.ndarray) -> str:
    """How two sets of prompts differ, in words."""
    added, removed = np.setdiff1d(now, before), np.setdiff1d(before, now)
    parts = [f"{len(before):,} then, {len(now):,} now", f"{len(added):,} new", f"{len(removed):,} gone"]
    if len(added):
        parts.append(f"the first new one is row {int(np.flatnonzero(np.isin(now, added))[0])}")
    elif not len(removed):
        parts.append("the same in another order or template")
    return ", ".join(parts)


def old_rows(before: np.ndarray, now: np.ndarray) -> Int[np.ndarray, "N"]:
    """For each prompt, its row in the old data; -1 = it was not there."""
    order = np.argsort(before, kind="stable")
    place = np.minimum(np.searchsorted(before[order], now), len(before) - 1)
    found = order[place]
    return np.where(before[found] == now, found, -1).astype(np.int32)


def _abstract_of(setup: Setup, prompts: int) -> SavedState:
    """The saved state's shapes for another number of prompts."""

    columns = None if setup.columns is None else jax.tree.map(lambda x: np.zeros(prompts, x.dtype), setup.columns)

    def sized(init: Any, *known: Any) -> Any:
        shapes = jax.eval_shape(lambda *args: init(prompts, *args), *known)
        shardings = prompts_shardings(setup.mesh, shapes, prompts)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    saved = setup.abstract.to_save()
    algorithm = setup.algorithm
    return dataclasses.replace(
        saved, selector=sized(algorithm.selector.init, columns), credit=sized(algorithm.credit.init)
    )


def _follow(setup: Setup, saved: SavedState, places: Int[np.ndarray, "N"]) -> SavedState:
    """The saved state with per-prompt state moved to the prompts' new rows; new prompts start as in a new run."""
    n = len(places)
    algorithm, shardings = setup.algorithm, setup.shardings

    def moved(strategy: Any, old: Any, where: Any, *known: Any) -> Any:
        def move(state: Any, *args: Any) -> Any:
            return strategy.follow(state, strategy.init(n, *args), jnp.asarray(places))

        return jax.jit(move, out_shardings=where)(old, *known)

    return dataclasses.replace(
        saved,
        selector=moved(algorithm.selector, saved.selector, shardings.selector, setup.columns),
        credit=moved(algorithm.credit, saved.credit, shardings.credit),
    )
