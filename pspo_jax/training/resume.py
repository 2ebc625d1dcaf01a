"""Carries a run on: restores its checkpoint, and checks that settings, data and weights still fit it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from pspo_jax.arrays.groups import Groups, keep, take
from pspo_jax.arrays.state import Prompts, SavedState, TrainState
from pspo_jax.checkpoint.checksums import named_checksums, verify
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.metadata import Metadata
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import prompts_shardings
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.history import Change, changes
from pspo_jax.runs.home import home_of
from pspo_jax.selection import PromptMetadata
from pspo_jax.system.buckets import Place, read_bytes
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import unread, write_whole
from pspo_jax.training.setup import Setup, known_prompts, load_frozen, load_teacher


class _Holder(Protocol):
    """A replay buffer, or the queue of dynamic sampling: a dataclass that stores groups."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[PyTree]]]
    groups: Groups
    held: Int[Array, ""]
    """Groups in the queue."""


class Restored(NamedTuple):
    """A run as its newest checkpoint has it."""

    state: TrainState
    totals: RunAccounting
    changes: list[Change]
    """Settings that differ from those it was saved under."""


def early_check(setup: Setup, folder: Path, checkpoints: Checkpoints) -> None:
    """Raise ConfigError for settings that the newest checkpoint cannot carry on, before anything is compiled."""
    for step in reversed(checkpoints.steps()):
        try:
            metadata = checkpoints.metadata(step)
        except DamageError:
            continue  # `restore` moves it
        _check_settings(setup, folder, metadata)
        return


def _check_settings(setup: Setup, folder: Path, metadata: Metadata) -> list[Change]:
    """The settings that have changed and may; ConfigError if another one has."""
    if "config" not in metadata or "step" not in metadata:
        raise ConfigError(
            f"run.dir={folder}: its checkpoints are of another version of this program, which did not keep their "
            "settings; choose another --run.dir, or carry on with the version that wrote them"
        )
    found = changes(folder, metadata["config"], setup.config)
    if metadata["step"] > setup.config.run.steps:
        raise ConfigError(
            f"run.steps={setup.config.run.steps}: {folder} has done {metadata['step']} steps already; set at least "
            "that many, or choose another --run.dir"
        )
    return found


def restore(setup: Setup, folder: Path, checkpoints: Checkpoints, progress: Progress) -> Restored | None:
    """The newest checkpoint's state and accounting, or None if there is none.

    Raises:
      ConfigError: settings, data or weights are not those of the checkpoint.
      StorageError: it cannot be read now.
    """
    places: list[tuple[Int[np.ndarray, "N"], Int[np.ndarray, "M"]]] = []
    changed: list[Change] = []

    def check(metadata: Metadata) -> SavedState | None:
        places.clear()
        changed[:] = _check_settings(setup, folder, metadata)
        if metadata.get("source") != source_fingerprint(setup):
            raise ConfigError(
                f"model.source={setup.config.model.source}: is not the checkpoint that this run began from "
                "(another config, or other tensors); restore it or choose another --run.dir"
            )
        changed.extend(_check_heldout(setup, metadata))
        if metadata["dataset"] == setup.task.train.fingerprint():
            return None
        before = _before(setup, folder, metadata["dataset"])
        now = setup.task.train.content()
        progress.say(f"the data has changed: {difference(before, now)}; each prompt keeps its own statistics")
        changed.append(Change("training prompts", metadata["dataset"], setup.task.train.fingerprint()))
        places.append((old_rows(before, now), old_rows(now, before)))
        return _abstract_of(setup, len(before), metadata["layout"])

    found = checkpoints.restore(setup.abstract.to_save(), progress.say, check)
    if found is None:
        return None
    saved, metadata = found
    frozen = None
    if setup.abstract.frozen is not None:
        frozen = load_frozen(setup)
        try:
            verify(frozen, metadata["base"])
        except ValueError as error:
            raise ConfigError(
                f"model.source={setup.config.model.source}: its frozen weights differ from those this run was "
                f"trained with ({error}); restore them or choose another --run.dir"
            ) from error
    if places:
        known = known_prompts(setup, saved.joined(frozen).weights, progress)
        saved = _follow(setup, saved, known, *places[-1], progress.say)
    state = saved.joined(frozen, _verified_teacher(setup, metadata, progress))
    progress.say(f"resuming at step {int(state.step)} of {setup.config.run.steps}")
    return Restored(state, RunAccounting(metadata["totals"]), changed)


def _verified_teacher(setup: Setup, metadata: Metadata, progress: Progress) -> PyTree | None:
    """The teacher's weights; None = there is no teacher.

    Raises:
      ConfigError: they are not those that have taught the run.
    """
    weights = load_teacher(setup, progress)
    if weights is None:
        return None
    try:
        verify(weights, metadata.get("teacher", {}))
    except ValueError as error:
        raise ConfigError(
            f"teacher.source={setup.config.teacher.source}: its weights differ from those that have taught this run "
            f"({error}); restore them (teacher.step={setup.config.teacher.step}) or choose another --run.dir"
        ) from error
    return weights


def held_checksums(state: TrainState) -> Metadata:
    """Checksums of the weights that checkpoints leave out, as the entries of their metadata."""
    return {"base": named_checksums(state.frozen), "teacher": named_checksums(state.teacher)}


def _check_heldout(setup: Setup, metadata: Metadata) -> list[Change]:
    """The change of the held-out prompts, by which runs are compared; ConfigError if it is not allowed."""
    before, now = metadata["heldout"], setup.task.heldout.fingerprint()
    if before == now:
        return []
    if not setup.config.task.allow_change:
        raise ConfigError(
            f"task.heldout_data={setup.config.task.heldout_data}: the held-out prompts differ from those of the "
            "checkpoint, so evaluations would not compare; restore them, choose another --run.dir, or add "
            "--allow-data-change"
        )
    _refuse_stored_images(setup)
    return [Change("held-out prompts", before, now)]


def _before(setup: Setup, folder: Path, fingerprint: str) -> np.ndarray:
    """Hashes of the checkpoint's prompts; ConfigError if a change of data cannot be followed or is not allowed."""
    before = saved_content(home_of(folder), fingerprint)
    if before is None:
        raise ConfigError(
            f"task.name={setup.task.name}: the prompts differ from those of the checkpoint, and what these were is "
            f"not on record ({_content_path(folder, fingerprint)} is not there or is damaged); restore the data or "
            "choose another --run.dir"
        )
    if not setup.config.task.allow_change:
        raise ConfigError(
            f"task.name={setup.task.name}: the prompts differ from those of the checkpoint "
            f"({difference(before, setup.task.train.content())}); restore the data, choose another --run.dir, or add "
            "--allow-data-change, with which each prompt keeps its own statistics"
        )
    _refuse_stored_images(setup)
    return before


def _refuse_stored_images(setup: Setup) -> None:
    """Raise ConfigError if changed data meet stored groups with images, whose room follows from all of the data."""
    stored = setup.abstract.replay, setup.abstract.queue
    if setup.images is not None and any(hasattr(holder, "groups") for holder in stored):
        raise ConfigError(
            "task.allow_change=true: the data have changed, and the checkpoint's stored groups hold images of the "
            "prompts before; restore the data, or choose another --run.dir"
        )


def source_fingerprint(setup: Setup) -> str | None:
    """Fingerprint of the checkpoint that the run began from; None = it began from random weights."""
    return None if setup.source is None else setup.source.fingerprint()


def save_content(setup: Setup, folder: Path) -> None:
    """Keep a hash of every prompt beside the checkpoints, 8 bytes each, by which a later change of data is found."""
    fingerprint = setup.task.train.fingerprint()
    content = setup.task.train.content()
    path, before = _content_path(folder, fingerprint), saved_content(home_of(folder), fingerprint)
    if before is not None and np.array_equal(before, content):
        return
    path.parent.mkdir(exist_ok=True)
    data = io.BytesIO()
    np.save(data, content)
    write_whole(path, data.getvalue())


def saved_content(home: Place, fingerprint: str) -> np.ndarray | None:
    """The hashes that `save_content` kept, in a run's folder or bucket; None if they are gone or damaged.

    Raises:
      StorageError: it cannot be read now.
    """
    path = home / "prompts" / f"{fingerprint}.npy"
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unread(path, error) from error
    try:
        found = np.load(io.BytesIO(data))
    except (ValueError, EOFError, KeyError, SyntaxError):
        return None
    return found if isinstance(found, np.ndarray) and found.dtype == np.uint64 and found.ndim == 1 else None


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


def _abstract_of(setup: Setup, prompts: int, saved_layout: dict[str, str]) -> SavedState:
    """The saved state's shapes for another number of prompts, and for stored prompts of another padded length."""

    def init_selector() -> PyTree:
        metadata = jax.tree.map(lambda x: jnp.zeros((prompts, *x.shape[1:]), x.dtype), setup.prompt_metadata)
        return algorithm.selector.init(prompts, metadata)

    def sized(init: Callable[[], PyTree]) -> PyTree:
        shapes = jax.eval_shape(init)
        shardings = prompts_shardings(setup.mesh, shapes, prompts)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    saved = setup.abstract.to_save()
    algorithm = setup.algorithm
    stored: dict[str, PyTree] = {}
    for name in ("replay", "queue"):
        old = saved_layout.get(f".{name}.groups.prompts.tokens")
        if old is not None and hasattr(getattr(saved, name), "groups"):
            shape = tuple(json.loads(old.removeprefix("int32")))
            tokens = getattr(saved, name).groups.prompts.tokens
            wide = jax.ShapeDtypeStruct((tokens.shape[0], shape[-1]), tokens.dtype, sharding=tokens.sharding)
            stored[name] = _with_tokens(getattr(saved, name), wide)
    return dataclasses.replace(
        saved,
        selector=sized(init_selector),
        advantage=sized(lambda: algorithm.estimator.init(prompts)),
        **stored,
    )


def _with_tokens(holder: _Holder, tokens: PyTree) -> _Holder:
    """A buffer or queue whose groups have these prompt tokens."""
    prompts = dataclasses.replace(holder.groups.prompts, tokens=tokens)
    return dataclasses.replace(holder, groups=dataclasses.replace(holder.groups, prompts=prompts))


def _follow(
    setup: Setup,
    saved: SavedState,
    known: PromptMetadata | None,
    places: Int[np.ndarray, "N"],
    new_rows: Int[np.ndarray, "M"],
    say: Callable[[str], None],
) -> SavedState:
    """The saved state with per-prompt state and stored groups moved to the prompts' new rows.

    New prompts start as in a new run.

    Args:
      known: what selectors may read of the new prompts.
      places: each new prompt's old row; -1 = it was not there.
      new_rows: each old prompt's new row; -1 = it is gone.
    """
    n = len(places)
    algorithm, shardings = setup.algorithm, setup.shardings

    def move_selector(old: PyTree, metadata: PromptMetadata | None) -> PyTree:
        return algorithm.selector.follow(old, algorithm.selector.init(n, metadata), jnp.asarray(places))

    def move_advantage(old: PyTree) -> PyTree:
        return algorithm.estimator.follow(old, algorithm.estimator.init(n), jnp.asarray(places))

    stored: dict[str, PyTree] = {}
    for name in ("replay", "queue"):
        holder = getattr(saved, name)
        if hasattr(holder, "groups"):
            stored[name] = _stored(setup, name, holder, new_rows, say)
    return dataclasses.replace(
        saved,
        selector=jax.jit(move_selector, out_shardings=shardings.selector)(saved.selector, known),
        advantage=jax.jit(move_advantage, out_shardings=shardings.advantage)(saved.advantage),
        **stored,
    )


def _stored(
    setup: Setup, name: str, holder: _Holder, new_rows: Int[np.ndarray, "M"], say: Callable[[str], None]
) -> _Holder:
    """A buffer or queue whose groups have their prompts' new rows and padded length.

    Groups whose prompt is gone, or no longer consists of the same tokens, are dropped.
    """
    in_queue = name == "queue"
    there = processes.to_host(holder.groups.step) >= 0
    if in_queue:
        there &= np.arange(len(there)) < int(processes.to_host(holder.held))
    rows, tokens = _rows_that_follow(setup, processes.to_host(holder.groups.prompts), there, new_rows, in_queue)
    kept = rows >= 0
    order = np.argsort(~kept, kind="stable") if in_queue else np.arange(len(rows))
    what = "completions" if setup.config.replay.name == "aper" and not in_queue else "groups"
    say(
        f"{'waiting' if in_queue else 'stored'} {what}: {kept.sum()} follow their prompts, "
        f"{there.sum() - kept.sum()} are dropped, as their prompts are gone"
    )

    def move(
        old: _Holder, ids: Int[Array, "C"], tokens: Int[Array, "C P"], kept: Bool[Array, "C"], order: Int[Array, "C"]
    ) -> _Holder:
        groups = _with_tokens(old, tokens).groups
        groups = keep(dataclasses.replace(groups, prompts=dataclasses.replace(groups.prompts, ids=ids)), kept)
        groups = take(dataclasses.replace(groups, step=jnp.where(kept, groups.step, -1)), order)
        new = dataclasses.replace(old, groups=groups)
        return dataclasses.replace(new, held=kept.sum(dtype=jnp.int32)) if in_queue else new

    program = jax.jit(move, out_shardings=getattr(setup.shardings, name))
    return program(holder, np.maximum(rows, 0).astype(np.int32), tokens, kept, order)


def _rows_that_follow(
    setup: Setup, prompts: Prompts, there: Bool[np.ndarray, "C"], new_rows: Int[np.ndarray, "M"], once: bool
) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C P"]]:
    """The new row of each stored group's prompt, -1 = the group is dropped, and the prompts' tokens.

    Args:
      prompts: the groups' prompts, on the host.
      there: which groups are stored.
      once: whether a prompt may have one group at most.
    """
    rows = np.where(there, new_rows[np.clip(prompts.ids, 0, len(new_rows) - 1)], -1)
    train = setup.task.train
    tokens = np.full((len(rows), train.tokens.shape[1]), setup.task.tokenizer.pad_token_id, np.int32)
    for i, row in enumerate(rows):
        if row < 0:
            continue
        length = int(train.lengths[row])
        tokens[i] = train.tokens[row]
        seen = once and row in rows[:i]
        if seen or length != prompts.lengths[i] or (tokens[i, :length] != prompts.tokens[i, :length]).any():
            rows[i] = -1
    return rows, tokens
