"""Writes and restores the checkpoints of a run: asynchronous, atomic, kept by policy, verified when restored.

A checkpoint is a train state and its metadata (config, dataset fingerprint, accounting). The metadata also holds a
checksum of every array, and a record of the files lies beside them. Damage is therefore found and not trained on, and
an error that passes, such as too little memory, is not mistaken for damage.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from pspo_jax.checkpoint import damage
from pspo_jax.checkpoint.checksums import layout, named_checksums, verify
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.metadata import Metadata, damaged_metadata, finite, mend_scores, read_metadata
from pspo_jax.checkpoint.orbax_errors import classified, raised, silence_orbax
from pspo_jax.checkpoint.reading import partial_load, saved_steps, whole_ones
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.distributed import processes
from pspo_jax.system.buckets import Place, absolute, exists, move, remove
from pspo_jax.system.storage import (
    LONGEST_PAUSE,
    LateError,
    StorageError,
    os_number,
    os_reason,
    pause,
    room,
    size,
)


class _Save(NamedTuple):
    """A checkpoint to be written."""

    step: int
    state: PyTree
    metadata: Metadata
    scores: dict[str, float] | None
    began: float
    """Time at which the save began, by the monotonic clock."""


class Checkpoints:
    """The checkpoints of one run folder. Use as a context manager: leaving it waits for the last save.

    Args:
      say: is told of files that are mended, and of writes that failed and are tried again.
      stop: says whether to give up trying again.
    """

    def __init__(
        self,
        folder: Place,
        config: CheckpointConfig,
        say: Callable[[str], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.folder = folder
        self._config = config
        self._say = say
        self._stop = stop
        silence_orbax()
        self._saver = ThreadPoolExecutor(1, "save")
        self._writing: tuple[_Save, Future[None]] | None = None
        self._last: _Save | None = None
        self._opened = 0
        self.slowest = 0.0
        """Seconds of the slowest save that has ended."""
        self._orbax = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        """Open the folder with Orbax, after damaged metadata and scores are out of its way."""
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(self._config.keep)]
        if self._config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["greedy"],
                    n=self._config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        try:
            if processes.is_primary():
                # Orbax reads these files of every checkpoint at once, and raises on what it does not know.
                for number, reason in damaged_metadata(self.folder):
                    self._say(self._told(number, reason, self._move(number)))
                for line in mend_scores(self.folder, saved_steps(self.folder)):
                    self._say(line)
            self._opened += 1
            processes.wait_for_all(f"scores {self._opened}")
            return ocp.training.Checkpointer(
                absolute(self.folder),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )
        except raised() as error:
            if why := os_reason(error):
                full = f"; {room(self.folder)}" if isinstance(self.folder, Path) else ""
                raise StorageError(
                    f"{self.folder}: cannot be opened now ({why}{full}); nothing in it was changed, and once it can "
                    "be the same command carries on"
                ) from error
            raise

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._saver.shutdown()
        late = None if self._writing is None else self._writing[1].exception()
        try:
            self._orbax.close()
        except raised() as again:
            late = late or again
        if late is not None and error[0] is None:
            raise self._failure(late) from late

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def whole(self, but: int | None = None) -> str:
        """A clause on which checkpoints are there; of a bucket, which may not answer, those that were there last.

        Args:
          but: step of a checkpoint that does not count.
        """
        steps = saved_steps(self.folder) if isinstance(self.folder, Path) else self.steps()
        return whole_ones([step for step in steps if step != but])

    def failed(self) -> bool:
        """Whether the last save has failed already; the next `save` or `wait` says why."""
        return self._writing is not None and self._writing[1].done() and self._writing[1].exception() is not None

    def save(self, step: int, state: PyTree, metadata: Metadata, scores: dict[str, float] | None = None) -> None:
        """Start saving; the write to disk goes on in the background. A finite `scores["greedy"]` ranks keep_best.

        Raises:
          StorageError: the save before this one could not be written, and checkpoint.on_error is stop, or
            checkpoint.retry_minutes are over.
        """
        before = self._settle()
        if before is not None:
            if self._config.on_error == "stop" and not isinstance(before, LateError):
                raise before
            self._say(f"{before}; step {step} is saved instead")
        elif step in self.steps():
            return
        # A copy: metadata is written in the background, while the caller's counters go on.
        metadata = {
            **copy.deepcopy(metadata),
            "scores": finite(scores),
            "checksums": named_checksums(state),
            "layout": layout(state),
        }
        save = _Save(step, state, {**metadata, "crc": damage.checksum(metadata)}, finite(scores), time.monotonic())
        if before is None:
            self._start(save)
        else:
            self._start_anew(save)
            self.wait()

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
          StorageError: it cannot be written, and checkpoint.on_error is stop, or checkpoint.retry_minutes are over.
        """
        began, seconds = time.monotonic(), 1.0
        while (error := self._settle()) is not None:
            over = time.monotonic() - began > 60 * self._config.retry_minutes or not self._can_repeat()
            final = self._config.on_error == "stop" and not (isinstance(error, LateError) and seconds == 1.0)
            if processes.any_process(final or over or self._stop()):
                raise error
            self._say(f"{error}; it is tried again in {seconds:.0f} s")
            pause(seconds, self._stop)
            seconds = min(2 * seconds, LONGEST_PAUSE)
            assert self._last is not None
            self._start_anew(self._last)

    def _can_repeat(self) -> bool:
        """Whether the arrays of the last save are still there; training that went on takes over their memory."""
        if self._last is None:
            return False
        return not any(x.is_deleted() for x in jax.tree.leaves(self._last.state) if isinstance(x, jax.Array))

    def _start(self, save: _Save) -> None:
        """Hand a save to the background."""
        self._last = save
        try:
            response = self._orbax.save_checkpointables_async(
                save.step, {"state": _present(save.state)}, metrics=save.scores, custom_metadata=save.metadata
            )
        except raised() as error:
            future: Future[None] = Future()
            future.set_exception(error)
            self._writing = save._replace(state=None), future
            return
        self._writing = save._replace(state=None), self._saver.submit(self._finish, save, response)

    def _start_anew(self, save: _Save) -> None:
        """Open the folder again and hand a save to the background; one process alone counts an error as the save's."""
        self._last = save
        try:
            self._reopen()
            if save.step not in self.steps():
                self._start(save)
        except StorageError as error:
            if processes.process_count() > 1:
                raise  # The others wait for this process to open the folder, and end with it.
            future: Future[None] = Future()
            future.set_exception(error)
            self._writing = save._replace(state=None), future

    def _finish(self, save: _Save, response: ocp.async_types.AsyncResponse[None]) -> None:
        """Wait until a checkpoint is there, and record its files."""
        response.result()
        path = self.folder / str(save.step)
        if processes.is_primary() and exists(path):
            try:
                read_metadata(path)
            except DamageError as error:
                # A disk that was full for a moment may take the arrays and not what belongs to them.
                remove(path)
                raise StorageError(f"{path}: was not written whole ({error})") from error
            try:
                damage.record(path)
            except StorageError as error:
                self._say(f"{error}; the checkpoint itself is whole")
        self.slowest = max(self.slowest, time.monotonic() - save.began)
        self._last = None

    def _settle(self) -> StorageError | None:
        """Wait for the last save; returns the disk's error if it could not be written.

        Any other error is raised.
        """
        error = None if self._writing is None else self._writing[1].exception()
        failed = processes.any_process(error is not None)
        if error is not None:
            return self._failure(error)
        self._writing = None
        return StorageError(f"{self.folder}: another process could not write its part") if failed else None

    def _failure(self, error: BaseException) -> StorageError:
        """The error of a save as a StorageError of one line; if the disk was not the reason, the error is raised."""
        reason = str(error) if isinstance(error, StorageError) else os_reason(error)
        if self._writing is None or (reason is None and not isinstance(error, TimeoutError)):
            raise error
        step = self._writing[0].step
        if reason is None or os_number(error) == errno.ENOTEMPTY:  # the latter while an earlier late save still writes
            return LateError(f"{self.folder}: checkpoint {step} was not written in time ({reason or error})")
        told = f"{self.folder}: checkpoint {step} could not be written ({reason})"
        if not isinstance(self.folder, Path):
            return StorageError(f"{told}; {self.whole(step)}; once the bucket answers the same command carries on")
        needed = sum(x.nbytes for x in jax.tree.leaves(self._last.state)) if self._last is not None else 0
        return StorageError(
            f"{told}; it needs up to {size(needed)} and {room(self.folder)}; {self.whole(step)}; once there is room "
            "the same command carries on"
        )

    def _reopen(self) -> None:
        """Open the folder again, which removes half-written files; Orbax would otherwise raise its error again."""
        self._writing = None
        try:
            self._orbax.close()
        except raised() as error:
            if os_reason(error) is None and not isinstance(error, TimeoutError):
                raise
        self._orbax = self._open()

    def metadata(self, step: int) -> Metadata:
        """The metadata that `save` was given for this step.

        Raises:
          DamageError: it is not what was written.
          StorageError: it cannot be read now.
        """
        return read_metadata(self.folder / str(step))

    def restore(
        self,
        abstract: PyTree,
        warn: Callable[[str], None],
        check: Callable[[Metadata], PyTree | None] = lambda _: None,
    ) -> tuple[PyTree, Metadata] | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        A damaged one is reported and moved to `<folder>.damaged`, so that its step can be saved again. Only a checksum
        or the layout of the files decides that a checkpoint is damaged; any other error is raised, and nothing moves.

        Args:
          abstract: pytree of ShapeDtypeStruct with shardings, like the state.
          check: raises ConfigError for metadata of a run that these settings cannot carry on; nothing is moved then.
            May return another abstract, if the checkpoint's shapes follow from its metadata.
        Raises:
          ConfigError: checkpoints exist and all of them are damaged.
          StorageError: a file cannot be read now.
        """
        steps = self.steps()
        for step in reversed(steps):
            found: tuple[PyTree, Metadata] | None = None
            metadata = None
            reason = ""
            try:
                metadata = self.metadata(step)
            except DamageError as error:
                reason = str(error)
            # What is damaged for one process, no process takes.
            if not processes.any_process(metadata is None):
                assert metadata is not None
                wanted = check(metadata) or abstract
                _check_layout(step, wanted, metadata)
                try:
                    found = self._load(step, wanted), metadata
                except DamageError as error:
                    reason = str(error)
            if not processes.any_process(found is None):
                assert found is not None
                try:
                    verify(found[0], found[1]["checksums"])
                    return found
                except ValueError as error:
                    reason = str(error)
            warn(self._told(step, reason or "on another host", self._set_aside(step)))
        if steps:
            raise ConfigError(
                f"run.dir: all checkpoints {steps} in {self.folder} are damaged, and none of them can be read; they "
                f"were moved to {self._damaged}; put back whole ones, choose another --run.dir, or begin anew here "
                "with --run.start_over true"
            )
        return None

    def _load(self, step: int, wanted: PyTree) -> PyTree:
        with partial_load():
            try:
                found = self._orbax.load_checkpointables(step, {"state": _present(wanted)})["state"]
            except raised() as error:
                told = classified(error, self.folder / str(step))
                if told is error:
                    raise
                raise told from error
        return {**wanted, **found} if isinstance(wanted, dict) else dataclasses.replace(wanted, **found)

    @property
    def _damaged(self) -> Place:
        return self.folder.with_name(self.folder.name + ".damaged")

    def _set_aside(self, step: int) -> Place:
        target = self._aside(step)
        processes.wait_for_all(f"damaged {step}")
        if processes.is_primary():
            self._move(step)
        processes.wait_for_all(f"moved {step}")
        self._orbax.reload()
        return target

    def _aside(self, step: int) -> Place:
        """The folder that a damaged checkpoint is moved to."""
        target = self._damaged / str(step)
        while exists(target):
            target = target.with_name(target.name + "_")
        return target

    def _move(self, step: int) -> Place:
        target = self._aside(step)
        move(self.folder / str(step), target)
        return target

    @staticmethod
    def _told(step: int, reason: str, moved: Place) -> str:
        return f"checkpoint {step} is damaged ({reason}); moved to {moved}, trying the one before"


def _present(state: PyTree) -> dict[str, PyTree]:
    """The fields of a state that hold arrays; a checkpoint need not have the empty ones, which may be newer than it."""
    fields = state if isinstance(state, dict) else {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}


def _check_layout(step: int, wanted: PyTree, metadata: Metadata) -> None:
    """Raise ConfigError if a checkpoint's arrays have other shapes: it is whole, and must not pass as damaged."""
    now, before = layout(wanted), metadata["layout"]
    differs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differs:
        name = differs[0]
        raise ConfigError(
            f"run.dir: checkpoint {step} is of another version of this program, or of other settings: state{name} is "
            f"{before.get(name, 'not there')} in it and {now.get(name, 'not there')} now ({len(differs)} differ); "
            "choose another --run.dir, or carry on with the version that wrote it"
        )
