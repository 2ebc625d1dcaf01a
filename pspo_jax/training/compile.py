"""The compiled parts of a training step: traced from shapes alone, and compiled beside other work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered, Wrapped
from jaxtyping import Array, Float, Int, Key, PyTree

from pspo_jax.arrays.state import EVALUATE, ROLLOUT, SELECT, Prompts, Rollouts, TrainState, purpose_key
from pspo_jax.config.schema import round_prompts
from pspo_jax.distributed.mesh import batch_sharding, replicated
from pspo_jax.rollout.sampler import make_sampler, tokens_per_test
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.system.progress import Progress
from pspo_jax.training.metrics import Metrics
from pspo_jax.training.optimizer import schedule, updates_per_step
from pspo_jax.training.setup import Setup
from pspo_jax.training.step import (
    Collect,
    compute_advantages,
    make_collect,
    make_train_step,
    make_update,
    samples_dynamically,
    scaled_over_round,
)

_Tree = TypeVar("_Tree")


class Select(Protocol):
    """Draws the prompts of a step, or of one of its rounds."""

    def __call__(
        self, selector: PyTree, key: Key[Array, ""], step: Int[Array, ""], number: Int[Array, ""], /
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], PyTree, Metrics]:
        """(selector's state (donated), run's key, step, number of the round) -> (rows, loss weights, state, metrics)"""


class Sample(Protocol):
    """Samples completions of a batch of prompts."""

    def __call__(
        self,
        params: PyTree,
        prompts: Prompts,
        key: Key[Array, ""],
        step: Int[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""],
        /,
    ) -> Rollouts:
        """`first_row` is the number of the batch's first completion, which its random numbers follow."""


class Step(Protocol):
    """One training step on the devices; the state is donated."""

    def __call__(self, state: TrainState, *batch: PyTree) -> tuple[TrainState, Metrics]:
        """`batch` is (rollouts, rewards [B, G], verdicts [B, G]); with dynamic sampling, (temperature,)."""


class Join(Protocol):
    """Joins the chunks of a batch."""

    def __call__(self, chunks: list[Rollouts], /) -> Rollouts: ...


class Advantages(Protocol):
    """Computes the advantages that logs of completions show."""

    def __call__(self, state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"], /) -> Float[Array, "B G"]:
        """`state` is without stored groups."""


class Summary(Protocol):
    """Summarises the selector's state over all prompts."""

    def __call__(self, selector: PyTree, step: Int[Array, ""], /) -> dict[str, Array | dict[str, Array]]:
        """Returns scalars, and histograms as counts and edges."""


class LearningRate(Protocol):
    """Gives the learning rate of an update."""

    def __call__(self, updates_before: Int[Array, ""], /) -> Float[Array, ""]: ...


class Programs(NamedTuple):
    """The compiled parts of a step."""

    select: Select
    sample: Sample
    step: Step
    eval_sample: Sample
    join: Join
    advantages: Advantages
    summary: Summary
    learning_rate: LearningRate
    collect: Collect | None = None
    """None = no dynamic sampling."""


def lower_programs(setup: Setup) -> dict[str, Lowered]:
    """Trace the parts of a step from shapes alone, by their names in `Programs`; no array exists yet."""
    config = setup.config
    rollout = config.rollout
    lowered_chunk, chunk = _lower_sampler(setup, rollout.group_size, ROLLOUT, round_prompts(config) // rollout.chunks)
    lowered_eval, _ = _lower_sampler(setup, 1, EVALUATE, rollout.prompts * rollout.group_size)
    lowered_join, rollouts = _lower_by_rows(setup, join_chunks, [chunk] * rollout.chunks)
    rewards = _rewards_shape(setup)
    lowered = {
        "select": lower_select(setup),
        "summary": lower_summary(setup),
        "learning_rate": lower_learning_rate(setup),
        "sample": lowered_chunk,
        "join": lowered_join,
        "eval_sample": lowered_eval,
    }
    if samples_dynamically(config):
        lowered["collect"] = lower_collect(setup, rollouts, rewards)
        lowered["step"] = lower_update(setup, rollouts.temperature)
    else:
        lowered["step"] = lower_train_step(setup, rollouts, rewards)
    lowered["advantages"] = lower_advantages(setup, rollouts, rewards)
    return lowered


def lower_select(setup: Setup) -> Lowered:
    """Trace the selector's draw."""
    selector, prompts = setup.algorithm.selector, round_prompts(setup.config)
    by_round = samples_dynamically(setup.config)

    def select(
        state: PyTree, key: Key[Array, ""], step: Int[Array, ""], number: Int[Array, ""]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], PyTree, Metrics]:
        key = purpose_key(key, step, SELECT)
        ids, weight, after = selector.select(state, jax.random.fold_in(key, number) if by_round else key, step, prompts)
        return ids, weight, after, selector.batch_metrics(state, ids, step)

    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)
    # The state is donated: a draw changes little of it, and must not copy the rest.
    jitted = jax.jit(select, donate_argnums=0, out_shardings=(whole, rows, setup.shardings.selector, whole))
    abstract = setup.abstract
    return jitted.lower(abstract.selector, abstract.key, abstract.step, abstract.step)


def lower_summary(setup: Setup) -> Lowered:
    """Trace the selector's summary of all prompts."""
    jitted = jax.jit(setup.algorithm.selector.summary, out_shardings=replicated(setup.mesh))
    return jitted.lower(setup.abstract.selector, setup.abstract.step)


def lower_learning_rate(setup: Setup) -> Lowered:
    """Trace the schedule of the learning rate."""
    config = setup.config
    rate = schedule(config.optimizer, config.run.steps * updates_per_step(config))
    return jax.jit(rate, out_shardings=replicated(setup.mesh)).lower(setup.abstract.step)


def lower_collect(setup: Setup, rollouts: Rollouts, rewards: jax.ShapeDtypeStruct) -> Lowered:
    """Trace a round of dynamic sampling."""
    collect = make_collect(setup.model, setup.algorithm, setup.config, without_buffer(setup.shardings))
    return _lower_jitted(collect, without_buffer(setup.abstract), rollouts, rewards, rewards)


def lower_update(setup: Setup, temperature: PyTree) -> Lowered:
    """Trace the update on groups that dynamic sampling has collected."""
    update = make_update(
        setup.model, setup.optimizer, setup.algorithm, setup.config, setup.shardings, setup.teacher_model
    )
    return _lower_jitted(update, setup.abstract, temperature)


def lower_train_step(setup: Setup, rollouts: Rollouts, rewards: jax.ShapeDtypeStruct) -> Lowered:
    """Trace the step without dynamic sampling: advantages, replay and updates."""
    step = make_train_step(
        setup.model, setup.optimizer, setup.algorithm, setup.config, setup.shardings, setup.teacher_model
    )
    return _lower_jitted(step, setup.abstract, rollouts, rewards, rewards)


def lower_advantages(setup: Setup, rollouts: Rollouts, rewards: jax.ShapeDtypeStruct) -> Lowered:
    """Trace the advantages that logs of completions show."""

    def advantages(state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
        found = compute_advantages(setup.model, setup.algorithm, setup.config, state, rollouts, rewards)[0]
        return scaled_over_round(setup.algorithm, found, rewards)

    return _lower_by_rows(setup, advantages, without_buffer(setup.abstract), rollouts, rewards)[0]


def _lower_jitted(function: object, *args: PyTree) -> Lowered:
    """Trace a function that `jax.jit` has wrapped already, with what it donates."""
    return cast(Wrapped, function).lower(*args)


def _lower_sampler(setup: Setup, group_size: int, purpose: int, prompts: int) -> tuple[Lowered, Rollouts]:
    """Trace the sampler of `group_size` completions a prompt, and give the shapes of its rollouts."""
    rollout, task = setup.config.rollout, setup.task
    tokens = tokens_per_test(setup.mesh.devices.flat[0].platform, rollout.max_new_tokens)
    pad, stages = task.tokenizer.pad_token_id, rollout.stages or 1
    draw = make_sampler(setup.model, group_size, rollout.max_new_tokens, pad, rollout.slots, tokens, stages)

    def sample(
        params: PyTree,
        prompts: Prompts,
        key: Key[Array, ""],
        step: Int[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""],
    ) -> Rollouts:
        return draw(params, prompts, purpose_key(key, step, purpose), settings, first_row)

    settings = jax.eval_shape(lambda: SamplingParams.of(rollout, task.stop_ids))
    settings = _with_sharding(settings, replicated(setup.mesh))
    abstract = setup.abstract
    args = (abstract.weights, _prompts_shape(setup, prompts), abstract.key, abstract.step, settings, abstract.step)
    return _lower_by_rows(setup, sample, *args)


def _lower_by_rows(setup: Setup, function: Callable[..., _Tree], *args: PyTree) -> tuple[Lowered, _Tree]:
    """Trace a function whose results are split by rows; the second result is their shapes, with shardings."""
    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)
    shapes = jax.eval_shape(function, *args)
    shardings = jax.tree.map(lambda x: rows if x.ndim else whole, shapes)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(function, out_shardings=shardings).lower(*args), shapes


def _prompts_shape(setup: Setup, prompts: int) -> Prompts:
    """Shapes of a batch of so many prompts, split by rows."""
    length = setup.task.train.tokens.shape[1]
    shapes = jax.eval_shape(
        lambda: Prompts(
            ids=jnp.zeros(prompts, jnp.int32),
            tokens=jnp.zeros((prompts, length), jnp.int32),
            lengths=jnp.zeros(prompts, jnp.int32),
            loss_weight=jnp.zeros(prompts, jnp.float32),
            images=None if setup.room is None else setup.room.empty(prompts, length),
        )
    )
    return _with_sharding(shapes, batch_sharding(setup.mesh))


def _rewards_shape(setup: Setup) -> jax.ShapeDtypeStruct:
    shape = (round_prompts(setup.config), setup.config.rollout.group_size)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(setup.mesh))


def _with_sharding(shapes: _Tree, sharding: jax.sharding.NamedSharding) -> _Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def without_buffer(state: TrainState) -> TrainState:
    """The state without its stored groups, which may be in the host's memory."""
    return dataclasses.replace(state, replay=())


def join_chunks(chunks: list[Rollouts]) -> Rollouts:
    """One batch of rollouts from its chunks."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts) if parts[0].ndim else parts[0], *chunks)


_LONGEST = ("step", "sample", "eval_sample", "collect")
"""Programs that take longest to compile, the longest first."""


class _Compilation(NamedTuple):
    """Programs that are being compiled."""

    spans: dict[str, tuple[float, float]]
    """Seconds after the beginning at which each part began and ended; filled in as the parts end."""
    programs: dict[str, Future[Compiled]]


def _compile(setup: Setup, pool: ThreadPoolExecutor) -> _Compilation:
    """Trace all programs now, and compile them in the pool's threads."""
    began = time.monotonic()
    lowered = lower_programs(setup)
    spans = {"tracing": (0.0, time.monotonic() - began)}

    def compile_one(name: str) -> Compiled:
        start = time.monotonic() - began
        program = lowered[name].compile()
        spans[name] = start, time.monotonic() - began
        return program

    # The longest first: the other thread takes the rest meanwhile.
    order = sorted(lowered, key=lambda name: _LONGEST.index(name) if name in _LONGEST else len(_LONGEST))
    return _Compilation(spans, {name: pool.submit(compile_one, name) for name in order})


def _finish(compilation: _Compilation, progress: Progress, asked: float) -> Programs:
    """Wait for all programs, and say what took how long."""
    compiled: dict[str, Any] = {}
    with progress.phase("compile", len(compilation.programs)) as bar:
        for name, future in compilation.programs.items():
            compiled[name] = future.result()
            bar(1, name)
    waited, total = time.monotonic() - asked, max(end for _, end in compilation.spans.values())
    seconds = sorted(((end - start, name) for name, (start, end) in compilation.spans.items()), reverse=True)
    slow = ", ".join(f"{name} {taken:.1f}" for taken, name in seconds if taken >= 0.1)
    progress.say(f"compiled in {total:.1f} s, {waited:.1f} of them waited for: {slow}")
    return Programs(**compiled)


@contextmanager
def compiling(setup: Setup, at_once: bool = True) -> Iterator[Callable[[Progress], Programs]]:
    """Compile the parts of a step, two at a time, beside the caller's own work.

    The context yields a function that waits for the programs. A caller that leaves the context without them does not
    wait for those that have not begun; a program that is being compiled still ends before the process does.

    Args:
      at_once: whether compilation begins now; False = when the programs are asked for.
    """
    pool = ThreadPoolExecutor(2)
    begun = _compile(setup, pool) if at_once else None

    def wait(progress: Progress) -> Programs:
        asked = time.monotonic()
        return _finish(begun or _compile(setup, pool), progress, asked)

    try:
        yield wait
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
