"""From a config to what a run needs: devices, task, policy, strategies, shardings, first weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from pspo_jax import algorithms
from pspo_jax.cold_start import cold_start, settings
from pspo_jax.config import Config, ConfigError
from pspo_jax.io.checkpoint import load_params, save_params
from pspo_jax.io.progress import Progress
from pspo_jax.optimizer import adamw, updates_per_step
from pspo_jax.parallel.mesh import make_mesh, params_shardings, prompts_shardings, replicated
from pspo_jax.parallel.runtime import keep_freed_memory
from pspo_jax.policy import Architecture, Policy, transformer
from pspo_jax.state import TrainState
from pspo_jax.step import init_state
from pspo_jax.tasks import TASKS, Task


class Setup(NamedTuple):
    config: Config
    mesh: Mesh
    task: Task
    policy: Policy
    algorithm: algorithms.Algorithm
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """The train state as ShapeDtypeStructs with shardings."""

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def configure_runtime(config: Config) -> None:
    """Process-wide settings of JAX; call before the first array."""
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


def prepare(config: Config) -> Setup:
    """Everything but arrays; raises ConfigError for what does not fit, before any compilation."""
    mesh = make_mesh(config)
    task = TASKS[config.task.name](config.task, config.rollout.prompt_bucket)
    architecture = Architecture(
        **dataclasses.asdict(config.policy), vocab_size=task.vocab_size, forbidden=task.forbidden
    )
    settings(config, task)  # reads sft.data: a missing file is found out here
    if task.vocab_size % config.mesh.tensor:
        raise ConfigError(f"mesh.tensor={config.mesh.tensor}: does not divide the vocabulary of {task.vocab_size}")
    policy = transformer(architecture)
    algorithm = algorithms.build(config)
    optimizer = adamw(config.optimizer, config.run.steps * updates_per_step(config))
    setup = Setup(config, mesh, task, policy, algorithm, optimizer, abstract=None)  # type: ignore[arg-type]
    shapes = jax.eval_shape(lambda key: new_state(setup, policy.init(key)), jax.random.key(0))
    shardings = _state_shardings(setup, shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return setup._replace(abstract=abstract)


def new_state(setup: Setup, params: Any) -> TrainState:
    """The state before step 0."""
    prompts = setup.task.train.tokens
    return init_state(
        params,
        setup.optimizer,
        setup.algorithm,
        setup.config,
        num_prompts=prompts.shape[0],
        prompt_length=prompts.shape[1],
        key=jax.random.key(setup.config.run.seed),
    )


def place_state(setup: Setup, params: Any) -> TrainState:
    """`new_state` on the mesh; donates `params`."""
    init = jax.jit(lambda p: new_state(setup, p), donate_argnums=0, out_shardings=setup.shardings)
    return init(params)


def first_params(setup: Setup, folder: Path, progress: Progress, stop: Callable[[], bool]) -> tuple[Any | None, str]:
    """Cold-started weights and where they come from; None if `stop()` became true on the way.

    They are kept in `<folder>/cold_start`, and a run of equal settings in a sibling folder is asked first.
    """
    shardings = setup.shardings.params
    key = jax.random.key(setup.config.run.seed)
    params = jax.jit(setup.policy.init, out_shardings=shardings)(key)
    if not setup.config.sft.steps:
        return params, "random weights"
    wanted = settings(setup.config, setup.task)
    own = folder / "cold_start"
    siblings = sorted(folder.absolute().parent.glob("*/cold_start")) if setup.config.sft.share else []
    for place in [own, *siblings]:
        found = load_params(place, setup.abstract.params, wanted) if place.exists() else None
        if found is not None:
            if place.absolute() != own.absolute():
                save_params(own, found, wanted)
            return found, f"cold start of {place}"
    params = cold_start(setup.config, setup.task, setup.policy, params, progress, stop)
    if params is None:
        return None, "stopped"
    params = jax.device_put(params, shardings)
    save_params(own, params, wanted)
    return params, "cold start"


def _state_shardings(setup: Setup, shapes: TrainState) -> TrainState:
    """Where each array lives: optimizer state like its weight, per-prompt state over the batch axes."""
    mesh = setup.mesh
    whole = replicated(mesh)
    params = params_shardings(mesh, shapes.params, setup.policy.axes)
    prompts = setup.task.train.tokens.shape[0]
    build: Any = TrainState
    return build(
        step=whole,
        params=params,
        opt_state=optax.tree_map_params(
            setup.optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: whole
        ),
        selector=prompts_shardings(mesh, shapes.selector, prompts),
        credit=prompts_shardings(mesh, shapes.credit, prompts),
        replay=jax.tree.map(lambda _: whole, shapes.replay),
        key=whole,
        reference=None if shapes.reference is None else params,
        updates=whole,
        skipped=whole,
    )
