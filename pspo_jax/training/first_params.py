"""The weights that a run begins from: drawn, read from a checkpoint, or trained by a cold start that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.params_folder import (
    belongs,
    folder_settings,
    is_there,
    load_folder,
    save_folder,
    set_aside,
)
from pspo_jax.data.image_batches import image_room
from pspo_jax.data.task import Demonstrations
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.distributed import processes
from pspo_jax.distributed.runtime import jit_once
from pspo_jax.runs.home import home_of
from pspo_jax.system.buckets import Place, absolute, children, remove
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist, StorageError
from pspo_jax.training.setup import Setup, load_frozen, load_trained
from pspo_jax.training.supervised import cold_start, file_examples, settings


class FirstParams(NamedTuple):
    """The weights that a run begins from."""

    params: PyTree | None
    """The weights that train; None if a stop was asked for on the way."""
    frozen: PyTree | None
    """The weights that do not train; None = all weights train."""
    origin: str
    """Where the weights come from, in words."""


def first_params(
    setup: Setup,
    folder: Path,
    progress: Progress,
    stop: Callable[[], bool],
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> FirstParams:
    """The weights before step 0, cold-started if the config says so.

    A cold start is kept in `<folder>/cold_start`. With sft.share, a finished one of equal settings in a sibling folder
    is used instead. A cold start that is stopped is kept too, and the next call carries it on.

    Args:
      phase: opens a context that times "load" (weights are read or drawn) or "sft" (the cold start).
    """
    with phase("load"):
        # What is wrong with the examples is found out before the weights are read.
        examples = _file_examples(setup, progress.say)
        params, frozen, origin = _initial(setup, progress)
        if not setup.config.sft.steps:
            return FirstParams(params, frozen, origin)
        source = setup.source.fingerprint() if setup.source else None
        wanted = settings(setup.config, setup.task, source, None if examples is None else examples.images)
        home = home_of(folder)
        found = _finished_start(setup, home, wanted, progress.say)
    if found is not None:
        return FirstParams(found[0], frozen, f"cold start of {found[1]}")
    kept = _StoppedStart(setup, home / "cold_start.progress", wanted, progress.say, stop)
    progress.say(
        f"the cold start takes {setup.config.sft.steps:,} supervised steps on examples before the RL begins; "
        "--sft.steps 0 leaves it out"
    )
    with phase("sft"):
        room = setup.images if examples is None else image_room(setup.architecture.vision, examples)
        parts = setup.config, setup.task, setup.model, params
        params = cold_start(*parts, progress, stop, frozen, kept, room, examples)
        if params is None:
            return FirstParams(None, None, "stopped")
        params = jax.device_put(params, setup.shardings.params)
        _keep(setup, home / "cold_start", params, wanted, progress.say, stop)
        kept.drop()
    return FirstParams(params, frozen, "cold start")


def _file_examples(setup: Setup, say: Callable[[str], None]) -> Demonstrations | None:
    """`file_examples`, equal on all processes; says which bounds on pixels their images have."""
    examples, tokenizer = file_examples(setup.config, setup.task), setup.task.tokenizer
    if examples is None or examples.images is None:
        return examples
    if isinstance(tokenizer, TextTokenizer) and tokenizer.visual is not None:
        say(f"sft.data={setup.config.sft.data}: {tokenizer.visual.line}")
    processes.check_same("sft.data", examples.images.identity())
    return examples


def _initial(setup: Setup, progress: Progress) -> tuple[PyTree, PyTree | None, str]:
    """Weights that train and frozen weights, before any cold start, and where they come from, in words."""
    shardings = setup.shardings.params
    frozen, origin = None, "random weights"
    if setup.source is not None:
        progress.say(f"reading {setup.source.name}")
        frozen, origin = load_frozen(setup), f"from {setup.source.name}"
        if setup.architecture.lora is None:
            return load_trained(setup), frozen, origin
    init = jit_once(setup.model.init, setup.mesh.devices.flat[0].platform, shardings)
    return init(jax.random.key(setup.config.run.seed)), frozen, origin


def _finished_start(
    setup: Setup, home: Place, wanted: Mapping[str, object], say: Callable[[str], None]
) -> tuple[PyTree, Place] | None:
    """Params of a finished cold start of these settings, and its folder; one in a sibling run folder is copied."""
    own, passed = absolute(home / "cold_start"), set[Place]()
    while True:
        # The leading process alone looks, so that all processes find the same, even if a folder appears meanwhile.
        found = _find_start(own, setup.config.sft.share, wanted, passed, say) if processes.is_primary() else ""
        name = processes.text_from_primary(found)
        if not name:
            return None
        place = own.parent.parent / name / "cold_start"
        try:
            params = load_folder(place, setup.abstract.params)
        except DamageError as error:
            _pass_over(place, own, error, passed, say)
            continue
        if place != own:
            say(f"the cold start is that of {place}, whose settings are equal; --sft.share false would train another")
            save_folder(own, params, wanted)
        return params, place


def _find_start(
    own: Place, share: bool, wanted: Mapping[str, object], passed: set[Place], say: Callable[[str], None]
) -> str:
    """Name of the run folder whose cold start has these settings, this one's first; "" if there is none."""
    neighbours = [run / "cold_start" for run in children(own.parent.parent)] if share else []
    for place in [own, *(p for p in neighbours if p != own)]:
        if place in passed or not is_there(place):
            continue
        try:
            if belongs(place, wanted):
                return place.parent.name
        except DamageError as error:
            _pass_over(place, own, error, passed, say)
        except StorageError as error:
            if place == own:
                raise
            passed.add(place)
            say(f"{error}; this run does without it")
    return ""


def _pass_over(place: Place, own: Place, error: DamageError, passed: set[Place], say: Callable[[str], None]) -> None:
    """Say that a cold start is damaged; one of this run's own is set aside."""
    passed.add(place)
    if place != own:
        say(f"{place}: is damaged ({error}); this run does without it")
    elif processes.is_primary():
        say(f"{place}: is damaged ({error}); it is set aside as {set_aside(place)}, and another is trained")


def _keep(
    setup: Setup,
    folder: Place,
    tree: PyTree,
    wanted: Mapping[str, object],
    say: Callable[[str], None],
    stop: Callable[[], bool],
    supersedes: bool = False,
) -> None:
    """`save_folder`, tried again as checkpoint.on_error says; with several processes it is tried once."""
    c = setup.config.checkpoint
    persist = Persist(c.on_error if processes.process_count() == 1 else "stop", c.retry_minutes, say, stop)
    persist(lambda: save_folder(folder, tree, wanted, supersedes))


class _StoppedStart(NamedTuple):
    """A cold start that was stopped, in <folder>/cold_start.progress."""

    setup: Setup
    folder: Place
    wanted: Mapping[str, object]
    say: Callable[[str], None]
    stop: Callable[[], bool]

    def load(self, template: PyTree) -> tuple[PyTree, int]:
        """The state that was reached and the calls that led to it; the template and 0 if there is none."""
        done = int(processes.text_from_primary(str(self._done()) if processes.is_primary() else ""))
        if not done:
            return template, 0
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        try:
            return load_folder(self.folder, abstract), done
        except DamageError as error:
            self.say(f"{self.folder}: is damaged ({error}); the cold start begins again")
            return template, 0

    def _done(self) -> int:
        if not is_there(self.folder):
            return 0
        try:
            found = folder_settings(self.folder)
        except DamageError as error:
            self.say(f"{self.folder}: is damaged ({error}); the cold start begins again")
            return 0
        return int(str(found["calls"])) if found == {**self.wanted, "calls": found.get("calls")} else 0

    def save(self, tree: PyTree, calls: int) -> None:
        """Keep the state that was reached."""
        _keep(self.setup, self.folder, tree, {**self.wanted, "calls": calls}, self.say, lambda: False, True)
        self.say("stopped during the cold start, saved; the same command carries on")

    def drop(self) -> None:
        """Remove the folder, once the finished cold start is kept itself."""
        if processes.is_primary():
            with suppress(OSError):
                remove(self.folder)
