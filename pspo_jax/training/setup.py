"""From a config to what a run needs: devices, task, model, strategies, and the shapes and shardings of its state."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import SavedState, TrainState, run_key
from pspo_jax.config.defaults import flatten, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.image_batches import BatchRoom, EmbeddingRoom, ImageRoom, embedding_room, image_room, laid_out_images
from pspo_jax.data.task import Task
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.distributed import processes, xla_flags
from pspo_jax.distributed.mesh import (
    check_model,
    check_tower,
    check_vocabulary,
    groups_shardings,
    make_mesh,
    params_shardings,
    prompts_shardings,
    replicated,
)
from pspo_jax.distributed.runtime import keep_freed_memory
from pspo_jax.model import Architecture, Model, built_in, transformer
from pspo_jax.model.architecture import beyond_context
from pspo_jax.model.attention.probe import kernels_of_run, with_decode_kernel
from pspo_jax.model.huggingface.load import Source, load_params, read_source
from pspo_jax.model.weights import init_weights, trained_and_frozen
from pspo_jax.rewards.own_task import RewardFunction, function_reward
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import make_pool
from pspo_jax.runs.lock import locked
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.metadata import kind_of_bins, load_metadata
from pspo_jax.system.interrupts import stop_requests
from pspo_jax.system.progress import Progress
from pspo_jax.training.algorithm import Algorithm, build
from pspo_jax.training.architectures import architecture_for, as_trained
from pspo_jax.training.machine_defaults import with_fsdp, with_logits, with_memory, with_stages, with_type
from pspo_jax.training.optimizer import adamw, updates_per_step
from pspo_jax.training.prompt_features import ReadImages, feature_width, prompt_features
from pspo_jax.training.step import init_state
from pspo_jax.training.supervised import settings
from pspo_jax.training.teachers import Teacher, check_images, find_teacher, vocabulary_of
from pspo_jax.verifiers.workers.pool import Pool


class Setup(NamedTuple):
    """A run before its arrays."""

    config: Config
    """The config with what follows from the machine."""
    mesh: Mesh
    task: Task
    source: Source | None
    """The checkpoint that the weights come from; None = they are drawn at random."""
    architecture: Architecture
    model: Model
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    prompt_metadata: PromptMetadata | None
    """Tasks and difficulties of the training prompts, which selectors may read, on the host. Of features, which follow
    from weights, there is the shape; see `known_prompts`."""
    abstract: TrainState
    """The train state as ShapeDtypeStructs with shardings."""
    images: ImageRoom | None = None
    """Room for the images of a batch; None = neither training nor held-out prompts have any."""
    embeddings: EmbeddingRoom | None = None
    """Room for embeddings, which batches hold in place of patches; None = no images, a trained tower, or a teacher."""
    teacher: Teacher | None = None
    """The teacher, whose weights `place_state` and `restore` read; None = there is none."""

    @property
    def room(self) -> BatchRoom | None:
        """Room for the images of a batch in the form that rollouts, updates and evaluations take."""
        return self.embeddings or self.images

    @property
    def teacher_model(self) -> Model | None:
        """The functions of the teacher; None = there is none."""
        return None if self.teacher is None else self.teacher.model

    @property
    def shardings(self) -> TrainState:
        """The train state as NamedShardings."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


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
    "teacher.source",
)
"""Fields that may differ between the processes of a run. Files are compared by their contents, once they are read."""


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
        if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    processes.check_settings({name: value for name, value in flatten(config).items() if name not in _OWN_TO_A_PROCESS})


def verifiers(config: Config, log: Path | None = None) -> AbstractContextManager[Pool | None]:
    """The processes that verify completions, if the task needs any; enter before JAX touches a device."""
    return nullcontext() if uses_char_tokenizer(config) else make_pool(config, log)


@contextmanager
def started(
    config: Config,
    folder: Path,
    say: Callable[[str], None] | None = None,
    signals: bool = True,
    verify: bool = True,
) -> Iterator[tuple[Pool | None, Callable[[], bool]]]:
    """Hold the run folder, with the verifiers started, all processes of the run joined and JAX configured.

    The context yields the verifiers, and a function that says whether this process was asked to stop.

    Args:
      say: is told where the folder's file system has no locks; None = it is printed.
      signals: whether SIGINT, SIGTERM and SIGHUP ask to stop; False leaves their handlers alone.
      verify: whether the verifiers are started, if the task needs any.
    Raises:
      ConfigError: another process holds the folder, or the verifiers cannot be started.
    """
    with ExitStack() as held:
        asked = held.enter_context(stop_requests()) if signals else _never
        say = say or Progress(config.log.progress).say
        # Verifiers write to the folder too. Where only a cluster knows which process leads, the lock waits until all
        # have joined.
        number = processes.number_before_joining(config)
        if number is not None:
            held.enter_context(locked(folder, say, number))
        pool = held.enter_context(verifiers(config, folder / "workers.log")) if verify else None
        processes.initialize(config)
        with processes.fail_together():
            if number is None and processes.is_primary():
                held.enter_context(locked(folder, say))
            configure_runtime(config)
            yield pool, asked


def _never() -> bool:
    return False


def prepare(
    config: Config,
    weights: bool = True,
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda _: None,
    capacity: float | None = None,
    devices: Sequence[jax.Device] | None = None,
    task: Task | None = None,
    reward: RewardFunction | None = None,
) -> Setup:
    """Everything that a run needs but its arrays; what does not fit is refused before any weight is read.

    Args:
      weights: whether the checkpoint's tensors must be there; a plan needs their shapes alone.
      pool: the entered `verifiers`; without one, text is not verified and gold answers are not checked.
      say: is told of what takes long, of defaults that follow the machine, and of what is unusual.
      capacity: bytes of a device, for mesh.fsdp=None; None = as the devices say.
      devices: devices to compile for, such as those of a TPU that is not there; None = this machine's.
      task: takes the place of the config's task; None = the config's.
      reward: takes the place of the task's reward; None = the task's.
    Raises:
      ConfigError: the settings do not fit the devices, the checkpoint, the data or each other.
    """
    devices = jax.devices() if devices is None else devices
    # A plan for an accelerator, whose capacity it gives, may compile for CPU devices in its place.
    on_cpu = capacity is None and devices[0].platform == "cpu"
    config, chosen = with_type(config, on_cpu)
    source, tokenizer, architecture = _language_model(config, weights, task)
    architecture = dataclasses.replace(architecture, split_decode=config.rollout.weights == "split")
    teacher = _teacher(config, tokenizer if task is None else task.tokenizer, architecture, weights)
    of_teacher = None if teacher is None else teacher.architecture
    capacity = device_bytes() if capacity is None else capacity
    config = with_fsdp(config, architecture, capacity, devices, of_teacher)
    mesh = make_mesh(config, architecture, devices)
    check_tower(config, architecture.vision)
    task = _task(config, tokenizer, pool, say, task, reward)
    for line in _remarks(config, source, architecture, task):
        say(line)
    _check_processes(config, source, task)
    check_vocabulary(config, task.vocab_size)
    if of_teacher is not None:
        check_model(config, of_teacher, of_teacher.vocab_size, f"teacher.source={config.teacher.source}")
    prompt_length = task.train.tokens.shape[1]
    probe = weights and set(devices) <= set(jax.devices())
    architecture = kernels_of_run(architecture, config, mesh, prompt_length, probe, say)
    architecture = with_decode_kernel(architecture, config, mesh, prompt_length, probe, say)
    if teacher is not None:
        fast = kernels_of_run(teacher.architecture, config, mesh, prompt_length, probe, lambda x: say(f"teacher: {x}"))
        teacher = teacher._replace(architecture=fast)
    config, more = with_memory(config, architecture, mesh, prompt_length, on_cpu)
    config, logits = with_logits(config, capacity, on_cpu)
    config, stages = with_stages(config, architecture, mesh)
    if chosen + more + logits + stages:
        say(f"defaults of this machine: {', '.join(chosen + more + logits + stages)}")
    architecture = dataclasses.replace(architecture, remat=config.model.remat or "none")
    return _with_strategies(config, mesh, task, source, architecture, teacher)


def _teacher(config: Config, tokenizer: object, architecture: Architecture, weights: bool) -> Teacher | None:
    """`find_teacher`, the same on all processes of the run.

    Args:
      tokenizer: the policy's, of any class.
    """
    teacher = find_teacher(config, vocabulary_of(tokenizer), architecture, weights)
    if teacher is not None:
        processes.check_same("teacher.source", teacher.fingerprint)
    return teacher


def _with_strategies(
    config: Config,
    mesh: Mesh,
    task: Task,
    source: Source | None,
    architecture: Architecture,
    teacher: Teacher | None = None,
) -> Setup:
    """The setup with the strategies and the optimizer that the config names, and the shapes of its state."""
    model = transformer(architecture)
    room = image_room(architecture.vision, task.train, task.heldout)
    if teacher is not None and room is not None:
        check_images(teacher, architecture)
    names, metadata = load_metadata(config, task.train)
    if metadata is not None and resolve(config).selection.predictor not in (None, "none"):
        weights = jax.eval_shape(lambda: merge_params(model.init(jax.random.key(0)), _frozen_init(architecture)))
        width = feature_width(model, weights)
        metadata = metadata._replace(features=jax.ShapeDtypeStruct((len(task.train.lengths), width), jnp.float32))
    parts = task.train, task.heldout
    frozen = None if model.trains_encoder or teacher is not None else room
    embeddings = embedding_room(frozen, architecture.width, architecture.compute_dtype, *parts)
    algorithm = build(config, names)
    optimizer = adamw(config.optimizer, config.run.steps * updates_per_step(config))
    made = config, task, algorithm, optimizer
    shapes = jax.eval_shape(
        lambda known: new_state(
            *made, model.init(jax.random.key(0)), _frozen_init(architecture), known, embeddings or room
        ),
        metadata,
    )
    shardings = _state_shardings(mesh, model, optimizer, len(task.train.lengths), shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    if teacher is not None:
        abstract = abstract.replace(teacher=teacher.abstract(mesh))
    shaped = algorithm, optimizer, metadata, abstract
    return Setup(config, mesh, task, source, architecture, model, *shaped, room, embeddings, teacher)


def _language_model(
    config: Config, weights: bool, task: Task | None
) -> tuple[Source | None, TextTokenizer | CharTokenizer | None, Architecture]:
    """`architecture_for`; a task of the caller's own brings its tokenizer itself, and None stands in its place."""
    if config.task.name != "own":
        return architecture_for(config, weights)
    if task is None:
        raise ConfigError(
            "task.name=own: is the task that a program gives to pspo_jax.train(config, task=...); name another one"
        )
    if config.model.source is None:
        return None, None, built_in(config.model, task.vocab_size, task.forbidden)
    source = read_source(config.model, weights)
    rows = source.architecture.vocab_size
    if rows < task.vocab_size:
        raise ConfigError(
            f"model.source={source.name}: its embedding has {rows} rows, and the task's tokenizer "
            f"{task.vocab_size} entries; use the checkpoint's own tokenizer"
        )
    forbidden = (*task.forbidden, *range(task.vocab_size, rows))
    return source, None, as_trained(source.architecture, config, forbidden)


def _task(
    config: Config,
    tokenizer: TextTokenizer | CharTokenizer | None,
    pool: Pool | None,
    say: Callable[[str], None],
    task: Task | None,
    reward: RewardFunction | None,
) -> Task:
    """The config's task, or the caller's; with a reward function, that is its reward."""
    if task is None:
        assert tokenizer is not None
        task = make_task(config, tokenizer, pool, say)
    if reward is None:
        return task
    prefix = tokenizer.answer_beginning(config.prompt) if isinstance(tokenizer, TextTokenizer) else ""
    return task._replace(reward_fn=function_reward(reward, task.tokenizer, config.reward.require_end, prefix))


def _check_processes(config: Config, source: Source | None, task: Task) -> None:
    """Raise ConfigError unless all processes of the run read the same checkpoint and data."""
    if source is not None:
        processes.check_same("model.source", source.fingerprint())
    processes.check_same("task.train_data, task.heldout_data", task.train.fingerprint() + task.heldout.fingerprint())
    start = settings(config, task)  # It reads sft.data, so that a missing file is found out here.
    if config.sft.steps and config.sft.data is not None:
        processes.check_same("sft.data", str(start["sft.data"]))


def _remarks(config: Config, source: Source | None, architecture: Architecture, task: Task) -> list[str]:
    """Lines on what is unusual about a checkpoint or what is asked of it, and on what follows from the data."""
    lines = []
    if source is not None and source.untied:
        lines.append(
            f"model.source={source.name}: config.json has tie_word_embeddings=true, but lm_head.weight is stored and "
            "differs from the embedding: it is used, and trained, as a head of its own"
        )
    longest = max(int(part.lengths.max()) for part in (task.train, task.heldout))
    if resolve(config).selection.bins == "auto":
        kind = kind_of_bins(resolve(config), task.train)
        reason = "of one difficulty" if kind == "difficulty" else "of one task, as the data has no difficulties,"
        lines.append(f"selection.bins=auto: prompts {reason} share what is believed of their success")
    if line := beyond_context(architecture, longest, config.rollout.max_new_tokens):
        lines.append(line)
    return lines


def device_bytes() -> float:
    """Bytes of memory of a device as its driver reports them; infinity where it does not."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else math.inf


def _frozen_init(a: Architecture) -> PyTree | None:
    """The weights that do not train; only ever traced, for their shapes. None = all weights train."""
    frozen = trained_and_frozen(a)[1]
    return None if frozen is None else init_weights(frozen, jax.random.key(0), jnp.dtype(a.param_dtype))


def new_state(
    config: Config,
    task: Task,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    frozen: PyTree | None = None,
    metadata: PromptMetadata | None = None,
    room: BatchRoom | None = None,
) -> TrainState:
    """The state before step 0; `room` is that for the images of a batch."""
    prompts = task.train.tokens
    return init_state(
        params,
        optimizer,
        algorithm,
        config,
        num_prompts=prompts.shape[0],
        prompt_length=prompts.shape[1],
        key=run_key(config.run.seed),
        frozen=frozen,
        metadata=metadata,
        images=None if room is None else room.empty(1, prompts.shape[1]),
    )


def known_prompts(setup: Setup, weights: PyTree, progress: Progress | None = None) -> PromptMetadata | None:
    """What selectors may read of the training prompts, with their features by these weights if a selector reads them.

    Args:
      weights: the weights that the model's functions take.
      progress: shows how many features are computed; None = nothing is shown.
    """
    known, config = setup.prompt_metadata, setup.config
    if known is None or known.features is None:
        return known
    progress = progress or Progress(enabled=False, quiet=True)
    with progress.phase("prompt features", len(setup.task.train.lengths)) as bar:
        # As many prompts as a rollout reads at a time; the mesh divides them, and they fit where a rollout does.
        batch = round_prompts(config) // config.rollout.chunks
        train, seed = setup.task.train, config.run.seed
        room = setup.images
        images: ReadImages | None = None if room is None else lambda rows: laid_out_images(train, rows, room)
        features = prompt_features(
            setup.model, weights, train.tokens, train.lengths, batch, seed, setup.mesh, bar, images
        )
    return known._replace(features=features)


def place_state(
    setup: Setup, params: PyTree, frozen: PyTree | None = None, progress: Progress | None = None
) -> TrainState:
    """`new_state` on the mesh; donates `params`. Frozen weights stay the buffers that they are.

    Args:
      progress: see `known_prompts`.
    """

    def init(params: PyTree, known: PromptMetadata | None) -> SavedState:
        parts = setup.config, setup.task, setup.algorithm, setup.optimizer
        return new_state(*parts, params, frozen, known, setup.room).to_save()

    known = known_prompts(setup, merge_params(params, frozen), progress)
    jitted = jax.jit(init, donate_argnums=0, out_shardings=setup.shardings.to_save())
    return jitted(params, known).joined(frozen, load_teacher(setup, progress))


def load_teacher(setup: Setup, progress: Progress | None = None) -> PyTree | None:
    """The teacher's weights on the mesh; None = there is no teacher. `progress` is told of it."""
    say = (lambda _: None) if progress is None else progress.say
    return None if setup.teacher is None else setup.teacher.load(setup.mesh, say)


def load_frozen(setup: Setup) -> PyTree | None:
    """The source's weights that do not train, on the mesh; None = all weights train."""
    assert setup.source is not None
    frozen, dtype = trained_and_frozen(setup.architecture)[1], setup.architecture.param_dtype
    return None if frozen is None else load_params(setup.source, frozen, setup.shardings.frozen, dtype)


def load_trained(setup: Setup) -> PyTree:
    """The source's weights that train, on the mesh; adapters are not among them, since no source has any."""
    assert setup.source is not None and setup.architecture.lora is None
    trained, dtype = trained_and_frozen(setup.architecture)[0], setup.architecture.param_dtype
    return load_params(setup.source, trained, setup.shardings.params, dtype)


def _state_shardings(
    mesh: Mesh, model: Model, optimizer: optax.GradientTransformation, prompts: int, shapes: TrainState
) -> TrainState:
    """The sharding of each array of the state.

    Optimizer state lies like its weight, and arrays with a row per prompt are split over the batch axes.
    """
    whole = replicated(mesh)
    params = params_shardings(mesh, shapes.params, model.axes)
    return dataclasses.replace(
        jax.tree.map(lambda _: whole, shapes),
        params=params,
        opt_state=optax.tree_map_params(
            optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: whole
        ),
        selector=prompts_shardings(mesh, shapes.selector, prompts),
        advantage=prompts_shardings(mesh, shapes.advantage, prompts),
        replay=groups_shardings(mesh, shapes.replay),
        reference=None if shapes.reference is None else params,
        frozen=None if shapes.frozen is None else params_shardings(mesh, shapes.frozen, model.frozen_axes),
        **{name: groups_shardings(mesh, getattr(shapes, name)) for name in ("queue", "pending")},
    )
