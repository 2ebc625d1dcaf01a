"""The compiled parts of a training step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pspo_jax.arrays.state import EVALUATE, ROLLOUT, SELECT, Prompts, Rollouts, TrainState, purpose_key
from pspo_jax.config.schema import round_prompts
from pspo_jax.distributed.mesh import batch_sharding, replicated
from pspo_jax.rollout.sampler import SamplingParams, make_sampler, tokens_per_test
from pspo_jax.system.progress import Progress
from pspo_jax.training.optimizer import schedule, updates_per_step
from pspo_jax.training.setup import Setup
from pspo_jax.training.step import (
    compute_advantages,
    make_collect,
    make_train_step,
    make_update,
    samples_dynamically,
    scaled_over_round,
)


class Programs(NamedTuple):
    """The compiled parts of a step."""

    select: Callable[..., Any]
    sample: Callable[..., Any]
    step: Callable[..., Any]
    """(state, rollouts, rewards, verdicts) -> (state, metrics); with dynamic sampling (state, temperature)."""
    eval_sample: Callable[..., Any]
    join: Callable[..., Any]
    """Rollouts of the chunks of a batch -> the batch."""
    advantages: Callable[..., Any]
    """(state without its ring, rollouts, rewards) -> advantages, for the dumps of completions."""
    summary: Callable[..., Any]
    """(selector state, step) -> scalars and histograms of all prompts."""
    learning_rate: Callable[..., Any]
    """Updates before one -> its learning rate."""
    collect: Callable[..., Any] | None = None
    """(state without its ring, rollouts, rewards, verdicts) -> (such a state, metrics): a round of dynamic sampling, or
    None."""


def lower_programs(setup: Setup) -> dict[str, Any]:
    """The parts of a step, traced from shapes alone: no array exists yet."""
    c, task, mesh = setup.config, setup.task, setup.mesh
    rows, whole = batch_sharding(mesh), replicated(mesh)
    b, p = round_prompts(c), task.train.tokens.shape[1]

    def prompts_spec(n: int) -> Prompts:
        def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        build: Any = Prompts
        return build(spec((n,), jnp.int32), spec((n, p), jnp.int32), spec((n,), jnp.int32), spec((n,), jnp.float32))

    strategy = setup.algorithm.selector

    rounds = samples_dynamically(c)

    def select(selector: Any, key: Any, step: Any, number: Any) -> Any:
        """Prompts of a step, or of one of its rounds."""
        key = purpose_key(key, step, SELECT)
        ids, weight, after = strategy.select(selector, jax.random.fold_in(key, number) if rounds else key, step, b)
        return ids, weight, after, strategy.batch_metrics(selector, ids, step)

    def sampler(group_size: int, purpose: int) -> Any:
        pad = task.tokenizer.pad_token_id
        longest = c.rollout.max_new_tokens
        chunk = tokens_per_test(mesh.devices.flat[0].platform, longest)
        inner = make_sampler(setup.model, group_size, longest, pad, c.rollout.slots, chunk)

        def sample(
            params: Any, prompts: Prompts, key: Any, step: Any, settings: SamplingParams, first_row: Any
        ) -> Rollouts:
            return inner(params, prompts, purpose_key(key, step, purpose), settings, first_row)

        return sample

    settings = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(lambda: SamplingParams.of(c.rollout, task.stop_ids)),
    )
    step_spec = setup.abstract.step
    lowered = {}
    # Donated: a choice leaves the state as it is, and must not copy it.
    select_jit = jax.jit(select, donate_argnums=0, out_shardings=(whole, rows, setup.shardings.selector, whole))
    lowered["select"] = select_jit.lower(setup.abstract.selector, setup.abstract.key, step_spec, step_spec)
    summary_jit = jax.jit(strategy.summary, out_shardings=whole)
    lowered["summary"] = summary_jit.lower(setup.abstract.selector, step_spec)
    rate = schedule(c.optimizer, c.run.steps * updates_per_step(c))
    lowered["learning_rate"] = jax.jit(rate, out_shardings=whole).lower(step_spec)

    def lower(fn: Any, *args: Any) -> tuple[Any, Any]:
        """A program whose results are sharded by rows, and their specs."""
        out = jax.eval_shape(fn, *args)
        shardings = jax.tree.map(lambda x: rows if x.ndim else whole, out)
        specs = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), out, shardings)
        return jax.jit(fn, out_shardings=shardings).lower(*args), specs

    def lower_sampler(group_size: int, purpose: int, n: int) -> tuple[Any, Any]:
        args = (setup.abstract.weights, prompts_spec(n), setup.abstract.key, step_spec, settings, step_spec)
        return lower(sampler(group_size, purpose), *args)

    chunks = c.rollout.chunks
    lowered["sample"], chunk = lower_sampler(c.rollout.group_size, ROLLOUT, b // chunks)
    lowered["join"], rollouts = lower(join_chunks, [chunk] * chunks)
    lowered["eval_sample"], _ = lower_sampler(1, EVALUATE, c.rollout.prompts * c.rollout.group_size)
    rewards = jax.ShapeDtypeStruct((b, c.rollout.group_size), jnp.float32, sharding=rows)
    state = setup.abstract
    if rounds:
        collect = make_collect(setup.model, setup.algorithm, c, without_buffer(setup.shardings))
        lowered["collect"] = collect.lower(without_buffer(state), rollouts, rewards, rewards)
        step: Any = make_update(setup.model, setup.optimizer, setup.algorithm, c, setup.shardings)
        lowered["step"] = step.lower(state, rollouts.temperature)
    else:
        step = make_train_step(setup.model, setup.optimizer, setup.algorithm, c, setup.shardings)
        lowered["step"] = step.lower(state, rollouts, rewards, rewards)

    def advantages(state: Any, rollouts: Rollouts, rewards: Any) -> Any:
        found = compute_advantages(setup.model, setup.algorithm, c, state, rollouts, rewards)[0]
        return scaled_over_round(setup.algorithm, found, rewards)

    lowered["advantages"], _ = lower(advantages, without_buffer(state), rollouts, rewards)
    return lowered


def without_buffer(state: TrainState) -> TrainState:
    """The state without stored groups, which may be in the host's memory."""
    return dataclasses.replace(state, replay=())


def join_chunks(chunks: list[Rollouts]) -> Rollouts:
    """One batch of rollouts from its parts."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts) if parts[0].ndim else parts[0], *chunks)


def _compile(setup: Setup, pool: ThreadPoolExecutor) -> tuple[dict[str, tuple[float, float]], dict[str, Future[Any]]]:
    """The programs to come, and from which second to which each is compiled."""
    began = time.monotonic()
    lowered = lower_programs(setup)
    spans = {"tracing": (0.0, time.monotonic() - began)}

    def one(name: str) -> Any:
        start = time.monotonic() - began
        program = lowered[name].compile()
        spans[name] = start, time.monotonic() - began
        return program

    # The longest first: the other thread takes the rest meanwhile.
    longest = ("step", "sample", "eval_sample", "collect")
    order = sorted(lowered, key=lambda name: longest.index(name) if name in longest else len(longest))
    return spans, {name: pool.submit(one, name) for name in order}


@contextmanager
def compiling(setup: Setup, at_once: bool = True) -> Iterator[Callable[[Progress], Programs]]:
    """Compile the parts of a step, two at a time, beside what the caller does; what it yields waits for them.

    Who leaves without them does not wait, though a program that is being compiled ends before the process does.

    Args:
      at_once: False = when they are asked for.
    """
    pool = ThreadPoolExecutor(2)
    begun = _compile(setup, pool) if at_once else None

    def wait(progress: Progress) -> Programs:
        asked = time.monotonic()
        spans, programs = begun or _compile(setup, pool)
        compiled = {}
        with progress.phase("compile", len(programs)) as bar:
            for name, future in programs.items():
                compiled[name] = future.result()
                bar(1, name)
        waited, total = time.monotonic() - asked, max(end for _, end in spans.values())
        seconds = sorted(((end - start, name) for name, (start, end) in spans.items()), reverse=True)
        slow = ", ".join(f"{name} {taken:.1f}" for taken, name in seconds if taken >= 0.1)
        progress.say(f"compiled in {total:.1f} s, {waited:.1f} of them waited for: {slow}")
        return Programs(**compiled)

    try:
        yield wait
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
