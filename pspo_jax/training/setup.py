"""From a config to what a run needs: devices, task, policy, strategies, shardings, first weights."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pspo_jax.arrays.state import TrainState, run_key
from pspo_jax.checkpoint.damage import DamageError
from pspo_jax.checkpoint.params_folder import belongs, folder_settings, load_folder, save_folder, set_aside
from pspo_jax.config.defaults import flatten, replace, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.task import Task
from pspo_jax.data.tokenizer import TextTokenizer, load_tokenizer
from pspo_jax.distributed import processes, xla_flags
from pspo_jax.distributed.mesh import (
    check_vocabulary,
    groups_shardings,
    make_mesh,
    params_shardings,
    prompts_shardings,
    replicated,
    smallest_fsdp,
)
from pspo_jax.distributed.runtime import jit_once, keep_freed_memory
from pspo_jax.model import Architecture, Model, built_in, transformer
from pspo_jax.model.architecture import beyond_context, lora_of
from pspo_jax.model.attention.probe import with_kernels
from pspo_jax.model.huggingface.load import Source, load_params, read_source
from pspo_jax.model.weights import init_weights, table
from pspo_jax.rewards.task import make_char_tokenizer, make_task
from pspo_jax.rewards.text_reward import make_pool
from pspo_jax.runs.lock import locked
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.metadata import load_metadata
from pspo_jax.system.interrupts import stop_requests
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist, StorageError
from pspo_jax.training.algorithm import Algorithm, build
from pspo_jax.training.machine import with_memory, with_type
from pspo_jax.training.optimizer import adamw, updates_per_step
from pspo_jax.training.step import init_state
from pspo_jax.training.supervised import cold_start, settings
from pspo_jax.verifiers.workers.pool import Pool


class Setup(NamedTuple):
    config: Config
    mesh: Mesh
    task: Task
    source: Source | None
    """The checkpoint that the weights come from; None = they are drawn."""
    architecture: Architecture
    model: Model
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    columns: PromptMetadata | None
    """What the selector may know of the training prompts beforehand, on the host."""
    abstract: TrainState
    """The train state as ShapeDtypeStructs with shardings."""

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


class FirstParams(NamedTuple):
    """What a run starts from."""

    params: Any | None
    """What trains; None if a stop was asked for on the way."""
    frozen: Any | None
    """The base under adapters."""
    origin: str


_OWN_TO_A_PROCESS = (
    "distributed.process",
    "run.compilation_cache",
    "log.progress",
    "verifier.workers",
    "task.cache",
    "task.train_data",
    "task.heldout_data",
    "model.source",
    "model.tokenizer",
    "sft.data",
)
"""Fields that may differ between the processes of a run. Files are compared by what they hold, once they are read."""


def configure_runtime(config: Config) -> None:
    """Process-wide settings of JAX; call before the first array.

    Raises:
      ConfigError: the processes of the run were started with different settings, or the cache cannot be written.
    """
    xla_flags.apply(config)
    cache = config.run.compilation_cache
    if cache != "off":
        path = Path(cache) if cache else Path.home() / ".cache" / "pspo_jax" / "xla"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f'run.compilation_cache={path}: {error.strerror}; name a folder that can be written, or "off"'
            ) from error
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    processes.check_settings({name: value for name, value in flatten(config).items() if name not in _OWN_TO_A_PROCESS})


def verifiers(config: Config, log: Path | None = None) -> AbstractContextManager[Pool | None]:
    """The processes that judge completions, if the task needs any; enter before JAX touches a device."""
    return nullcontext() if uses_char_tokenizer(config) else make_pool(config, log)


@contextmanager
def started(config: Config, folder: Path) -> Iterator[tuple[Pool | None, Callable[[], bool]]]:
    """Hold the run folder, with the verifiers started, all processes of the run joined and JAX configured.

    Yields the verifiers, and whether this process was asked to stop.

    Raises:
      ConfigError: another process holds the folder, or the verifiers cannot be started.
    """
    with ExitStack() as held, stop_requests() as asked:
        say = Progress(config.log.progress).say
        # Verifiers write to the folder too. Where only a cluster knows who leads, the lock waits until all have joined.
        number = processes.number_before_joining(config)
        if number is not None:
            held.enter_context(locked(folder, say, number))
        pool = held.enter_context(verifiers(config, folder / "workers.log"))
        processes.initialize(config)
        with processes.fail_together():
            if number is None and processes.is_primary():
                held.enter_context(locked(folder, say))
            configure_runtime(config)
            yield pool, asked


def prepare(
    config: Config,
    weights: bool = True,
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda _: None,
    capacity: float | None = None,
    devices: Sequence[Any] | None = None,
    task: Task | None = None,
) -> Setup:
    """Everything but arrays; raises ConfigError for what does not fit, before any weight is read.

    Args:
      weights: False = the checkpoint's tensors need not be there; for a plan.
      pool: the entered `verifiers`; without one text is neither judged nor are gold answers checked.
      say: told of what takes long.
      capacity: bytes of a device, for mesh.fsdp=None; None = as the devices say.
      devices: to compile for, such as those of a TPU that is not there; None = this machine's.
      task: None = the config's.
    """
    devices = jax.devices() if devices is None else devices
    # A plan for an accelerator, whose capacity it gives, may compile for CPU devices in its place.
    on_cpu = capacity is None and devices[0].platform == "cpu"
    config, chosen = with_type(config, on_cpu)
    source, tokenizer, architecture = architecture_for(config, weights)
    architecture = dataclasses.replace(architecture, split_decode=config.rollout.weights == "split")
    config = _with_fsdp(config, architecture, device_bytes() if capacity is None else capacity, len(devices))
    mesh = make_mesh(config, architecture, devices)
    task = make_task(config, tokenizer, pool, say) if task is None else task
    if source is not None:
        processes.check_same("model.source", source.fingerprint())
    processes.check_same("task.train_data, task.heldout_data", task.train.fingerprint() + task.heldout.fingerprint())
    for line in _remarks(config, source, architecture, task):
        say(line)
    learnt = settings(config, task)  # reads sft.data: a missing file is found out here
    if config.sft.steps and config.sft.data is not None:
        processes.check_same("sft.data", str(learnt["sft.data"]))
    check_vocabulary(config, task.vocab_size)
    architecture = with_kernels(
        architecture,
        config.model.attention,
        devices[0].platform,
        task.train.tokens.shape[1] + config.rollout.max_new_tokens,
        mesh.shape,
        probe=weights and set(devices) <= set(jax.devices()),
        say=say,
        share_prompts=config.loss.share_prompts,
    )
    config, more = with_memory(config, architecture, mesh, task.train.tokens.shape[1], on_cpu)
    if chosen + more:
        say(f"defaults of this machine: {', '.join(chosen + more)}")
    architecture = dataclasses.replace(architecture, remat=config.model.remat or "none")
    model = transformer(architecture)
    kinds, columns = load_metadata(config, task.train)
    algorithm = build(config, kinds)
    optimizer = adamw(config.optimizer, config.run.steps * updates_per_step(config))
    nothing: Any = None
    setup = Setup(config, mesh, task, source, architecture, model, algorithm, optimizer, columns, abstract=nothing)
    shapes = jax.eval_shape(
        lambda known: new_state(setup, model.init(jax.random.key(0)), _frozen_init(architecture), known), columns
    )
    shardings = _state_shardings(setup, shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return setup._replace(abstract=abstract)


def _remarks(config: Config, source: Source | None, architecture: Architecture, task: Task) -> list[str]:
    """Lines on what is unusual about a checkpoint, or about what is asked of it."""
    lines = []
    if source is not None and source.untied:
        lines.append(
            f"model.source={source.name}: config.json has tie_word_embeddings=true, but lm_head.weight is stored and "
            "differs from the embedding: it is used, and trained, as a head of its own"
        )
    longest = max(int(part.lengths.max()) for part in (task.train, task.heldout))
    if line := beyond_context(architecture, longest, config.rollout.max_new_tokens):
        lines.append(line)
    return lines


def architecture_for(
    config: Config, weights: bool = True
) -> tuple[Source | None, TextTokenizer | CharTokenizer, Architecture]:
    """The checkpoint if there is one, the tokenizer, and the policy's architecture with its adapters."""
    if uses_char_tokenizer(config):
        own = make_char_tokenizer(config)
        return None, own, built_in(config.model, own.vocab_size, own.forbidden)
    source = read_source(config.model, weights) if config.model.source is not None else None
    rows = source.architecture.vocab_size if source else None
    tokenizer = load_tokenizer(config, source.folder if source else None, rows)
    if source is None:
        return None, tokenizer, built_in(config.model, tokenizer.vocab_size, tokenizer.forbidden)
    lora = lora_of(config.lora)
    return source, tokenizer, dataclasses.replace(source.architecture, forbidden=tokenizer.forbidden, lora=lora)


def device_bytes() -> float:
    """Memory of a device as its driver tells; infinity where it does not."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else math.inf


def _with_fsdp(config: Config, a: Architecture, capacity: float, devices: int) -> Config:
    """mesh.fsdp, if it is left open: by what stays on a device from step to step, and a gradient."""
    if config.mesh.fsdp is not None:
        return config
    base = jax.eval_shape(lambda: init_weights(table(a), jax.random.key(0), jnp.dtype(a.param_dtype)))
    frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
    count = sum(x.size for x in jax.tree.leaves(base))
    # AdamW keeps two numbers a weight, and a gradient is a third, all float32. Adapters and their state are small.
    held = frozen if a.lora is not None else frozen + 12 * count
    held += frozen if config.loss.kl_coef > 0 and a.lora is None else 0
    fsdp = smallest_fsdp(held, capacity, devices // (config.mesh.tensor * config.mesh.context) or 1, a.width)
    return replace(config, {"mesh.fsdp": fsdp})


def _frozen_init(a: Architecture) -> Any:
    """Shapes of the frozen weights; traced, never run."""
    return None if a.lora is None else init_weights(table(a), jax.random.key(0), jnp.dtype(a.param_dtype))


def new_state(setup: Setup, params: Any, frozen: Any = None, columns: PromptMetadata | None = None) -> TrainState:
    """The state before step 0."""
    prompts = setup.task.train.tokens
    return init_state(
        params,
        setup.optimizer,
        setup.algorithm,
        setup.config,
        num_prompts=prompts.shape[0],
        prompt_length=prompts.shape[1],
        key=run_key(setup.config.run.seed),
        frozen=frozen,
        columns=columns,
    )


def place_state(setup: Setup, params: Any, frozen: Any = None) -> TrainState:
    """`new_state` on the mesh; donates `params`. Frozen weights stay the buffers that they are."""
    shardings = setup.shardings.to_save()
    init = jax.jit(
        lambda p, known: new_state(setup, p, frozen, known).to_save(), donate_argnums=0, out_shardings=shardings
    )
    return init(params, setup.columns).joined(frozen)


def load_base(setup: Setup) -> Any:
    """The source's weights on the mesh: the frozen base under adapters, or the first params."""
    assert setup.source is not None
    a = setup.architecture
    shardings = setup.shardings.params if a.lora is None else setup.shardings.frozen
    return load_params(setup.source, table(a), shardings, a.param_dtype)


def first_params(
    setup: Setup,
    folder: Path,
    progress: Progress,
    stop: Callable[[], bool],
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> FirstParams:
    """The weights before step 0, cold-started if the config says so.

    A cold start is kept in `<folder>/cold_start`; with sft.share a finished one of equal settings in a sibling folder
    is taken instead, with a line. One that is stopped is kept too, and carried on.

    Args:
      phase: told what the time goes to: "load" for weights that are read or drawn, "sft" for the cold start.
    """
    with phase("load"):
        params, frozen, origin = _initial(setup, progress)
        if not setup.config.sft.steps:
            return FirstParams(params, frozen, origin)
        wanted = settings(setup.config, setup.task, setup.source.fingerprint() if setup.source else None)
        found = _finished_start(setup, folder, wanted, progress.say)
    if found is not None:
        return FirstParams(found[0], frozen, f"cold start of {found[1]}")
    kept = _Progress(setup, folder / "cold_start.progress", wanted, progress.say, stop)
    progress.say(
        f"the cold start takes {setup.config.sft.steps:,} supervised steps on examples before the RL begins; "
        "--sft.steps 0 leaves it out"
    )
    with phase("sft"):
        params = cold_start(setup.config, setup.task, setup.model, params, progress, stop, frozen, kept)
        if params is None:
            return FirstParams(None, None, "stopped")
        params = jax.device_put(params, setup.shardings.params)
        _keep(setup, folder / "cold_start", params, wanted, progress.say, stop)
        kept.drop()
    return FirstParams(params, frozen, "cold start")


def _initial(setup: Setup, progress: Progress) -> tuple[Any, Any | None, str]:
    """Weights that train and weights that are frozen, before any cold start, and where they are from."""
    shardings = setup.shardings.params
    frozen, origin = None, "random weights"
    if setup.source is not None:
        progress.say(f"reading {setup.source.name}")
        loaded, origin = load_base(setup), f"from {setup.source.name}"
        if setup.architecture.lora is None:
            return loaded, None, origin
        frozen = loaded
    init = jit_once(setup.model.init, setup.mesh.devices.flat[0].platform, shardings)
    return init(jax.random.key(setup.config.run.seed)), frozen, origin


def _finished_start(
    setup: Setup, folder: Path, wanted: dict[str, Any], say: Callable[[str], None]
) -> tuple[Any, Path] | None:
    """Params of a finished cold start of these settings, and whose it is; a neighbour's is copied."""
    own, passed = folder / "cold_start", set[Path]()
    while True:
        # The leading process looks: a folder that appears meanwhile must not lead processes apart.
        found = _find_start(own, setup.config.sft.share, wanted, passed, say) if processes.is_primary() else ""
        name = processes.text_from_primary(found)
        if not name:
            return None
        place = folder.absolute().parent / name / "cold_start"
        try:
            params = load_folder(place, setup.abstract.params)
        except DamageError as error:
            _pass_over(place, own, error, passed, say)
            continue
        if place != own.absolute():
            say(f"the cold start is that of {place}, whose settings are equal; --sft.share false would train another")
            save_folder(own, params, wanted)
        return params, place


def _find_start(own: Path, share: bool, wanted: dict[str, Any], passed: set[Path], say: Callable[[str], None]) -> str:
    """Name of the run folder whose cold start has these settings, this one's first; "" if there is none."""
    mine = own.absolute()
    neighbours = sorted(mine.parent.parent.glob("*/cold_start")) if share else []
    for place in [mine, *(p for p in neighbours if p != mine)]:
        if place in passed or not place.exists():
            continue
        try:
            if belongs(place, wanted):
                return place.parent.name
        except DamageError as error:
            _pass_over(place, own, error, passed, say)
        except StorageError as error:
            if place == mine:
                raise
            passed.add(place)
            say(f"{error}; this run does without it")
    return ""


def _pass_over(place: Path, own: Path, error: DamageError, passed: set[Path], say: Callable[[str], None]) -> None:
    """Say that a cold start is damaged; one of this run's own is set aside."""
    passed.add(place)
    if place != own.absolute():
        say(f"{place}: is damaged ({error}); this run does without it")
    elif processes.is_primary():
        say(f"{place}: is damaged ({error}); it is set aside as {set_aside(place)}, and another is trained")


def _keep(
    setup: Setup,
    folder: Path,
    tree: Any,
    wanted: dict[str, Any],
    say: Callable[[str], None],
    stop: Callable[[], bool],
    supersedes: bool = False,
) -> None:
    """`save_folder`, tried again as checkpoint.on_error says; several processes do not wait for each other's disks."""
    c = setup.config.checkpoint
    persist = Persist(c.on_error if processes.process_count() == 1 else "stop", c.retry_minutes, say, stop)
    persist(lambda: save_folder(folder, tree, wanted, supersedes))


class _Progress(NamedTuple):
    """A cold start that was stopped, in <folder>/cold_start.progress."""

    setup: Setup
    folder: Path
    wanted: dict[str, Any]
    say: Callable[[str], None]
    stop: Callable[[], bool]

    def load(self, template: Any) -> tuple[Any, int]:
        """What it had reached and after how many calls; the template and 0 if there is none of these settings."""
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
        if not self.folder.exists():
            return 0
        try:
            found = folder_settings(self.folder)
        except DamageError as error:
            self.say(f"{self.folder}: is damaged ({error}); the cold start begins again")
            return 0
        return int(found["calls"]) if found == {**self.wanted, "calls": found.get("calls")} else 0

    def save(self, tree: Any, calls: int) -> None:
        """Keep what was reached."""
        _keep(self.setup, self.folder, tree, {**self.wanted, "calls": calls}, self.say, lambda: False, True)
        self.say("stopped during the cold start, saved; the same command carries on")

    def drop(self) -> None:
        """The cold start has ended, and is kept itself."""
        if processes.is_primary():
            shutil.rmtree(self.folder, ignore_errors=True)


def _state_shardings(setup: Setup, shapes: TrainState) -> TrainState:
    """Where each array lives: optimizer state like its weight, per-prompt state over the batch axes."""
    mesh = setup.mesh
    whole = replicated(mesh)
    params = params_shardings(mesh, shapes.params, setup.model.axes)
    prompts = setup.task.train.tokens.shape[0]
    build: Any = TrainState
    return build(
        step=whole,
        params=params,
        opt_state=optax.tree_map_params(
            setup.optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: whole
        ),
        selector=prompts_shardings(mesh, shapes.selector, prompts),
        advantage=prompts_shardings(mesh, shapes.advantage, prompts),
        replay=groups_shardings(mesh, shapes.replay),
        key=whole,
        reference=None if shapes.reference is None else params,
        frozen=None if shapes.frozen is None else params_shardings(mesh, shapes.frozen, setup.model.frozen_axes),
        updates=whole,
        skipped=whole,
        policy_drift=whole,
        queue=groups_shardings(mesh, shapes.queue),
    )
