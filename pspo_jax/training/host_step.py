"""One step of the loop on the host: select, roll out, verify, update.

Data crosses between host and devices twice: the selected rows, and the rewards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from pspo_jax.arrays.state import EVALUATE, Prompts, Rollouts, TrainState
from pspo_jax.data.image_batches import gather
from pspo_jax.data.task import CompletionBatch, RewardResult
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import batch_sharding, replicated
from pspo_jax.evaluation.heldout import evaluate
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.runs import verdicts
from pspo_jax.runs.accounting import RunAccounting, add_step
from pspo_jax.runs.completions import completion_lines
from pspo_jax.runs.run_folder import RunLog, crc
from pspo_jax.training.compile import Programs, without_buffer
from pspo_jax.training.metrics import Metrics
from pspo_jax.training.setup import Setup

Values = dict[str, float | int]
"""Metrics by name."""


class StepContext(NamedTuple):
    """The parts of a run that every step uses."""

    setup: Setup
    programs: Programs
    totals: RunAccounting
    log: RunLog


class _Rollout(NamedTuple):
    """A batch that was sampled and handed to the verifiers."""

    rollouts: Rollouts
    owned: Int[np.ndarray, "b"]
    """Rows of the batch that this process verifies and logs, ascending."""
    completions: CompletionBatch
    """The completions of those rows, on the host."""
    waits: list[Callable[[], RewardResult]]
    """One function per chunk, which waits for the chunk's rewards."""


class _Round(NamedTuple):
    """A batch that was sampled and verified."""

    rows: Int[np.ndarray, "B"]
    """Row of each prompt in the dataset."""
    weights: Float[np.ndarray, "B"]
    """Loss weight of each prompt."""
    rollout: _Rollout
    lengths: Int[np.ndarray, "B G"]
    """Tokens of each completion."""
    reward: Float[Array, "B G"]
    """Rewards on the devices; NaN = no verdict."""
    verdicts: Float[Array, "B G"]
    """Verdicts on the devices, in [0, 1]; NaN = none."""
    owned_scores: RewardResult
    """Rewards of the rows that this process verified."""
    scores: RewardResult
    """Rewards of the whole batch. Its answers, reasons and errors are those of this process alone."""
    draw_metrics: dict[str, Array]
    """The selector's metrics of this draw."""


class _Trained(NamedTuple):
    """A step whose update has been dispatched."""

    state: TrainState
    rounds: list[_Round]
    round_metrics: list[Metrics]
    update_metrics: Metrics
    advantages: Float[Array, "B G"] | None
    """Advantages of the last round, if its completions are to be logged."""


def one_step(
    context: StepContext, state: TrainState, done: int, dispatched: Callable[[int], None] = lambda _: None
) -> tuple[TrainState, Values]:
    """Run step number `done` (the first is 1).

    Args:
      dispatched: is called with `done` once the update has been dispatched, before its results are waited for.
    Returns:
      The state after the step, and the step's metrics.
    Raises:
      verdicts.NoVerdictError: more completions than verifier.max_no_verdict have no verdict.
      ConfigError: the advantage estimator is not defined for a reward.
    """
    config = context.setup.config
    seconds: dict[str, float] = {}
    run = _one_round if context.programs.collect is None else _several_rounds
    trained = run(context, state, seconds, done)
    dispatched(done)
    with _timed(context.totals, seconds, "update"):
        values: Values = _over_rounds([_as_floats(found) for found in trained.round_metrics])
        values |= _as_floats(trained.update_metrics)
        state = _buffer_to_host(context.setup, trained.state)
    if context.programs.collect is not None:
        values["rollouts/rounds"] = len(trained.rounds)
    values |= _costs(context, values, seconds, trained.rounds)
    if config.run.fingerprint:
        values |= _fingerprints(state, trained.rounds)
    if trained.advantages is not None:
        _log_completions(context, trained.rounds[-1], trained.advantages, done)
    return state, values


def _one_round(context: StepContext, state: TrainState, seconds: dict[str, float], done: int) -> _Trained:
    """Roll out one batch and update on it."""
    programs = context.programs
    state, batch = _round(context, state, seconds, done, 0)
    with _timed(context.totals, seconds, "update"):
        advantages = _advantages(context, state, batch, done)
        state = buffer_to_device(context.setup, state)
        state, metrics = programs.step(state, batch.rollout.rollouts, batch.reward, batch.verdicts)
    return _Trained(state, [batch], [metrics | batch.draw_metrics], {}, advantages)


def _several_rounds(context: StepContext, state: TrainState, seconds: dict[str, float], done: int) -> _Trained:
    """Roll out batches until enough effective groups wait, and update on those (dynamic sampling)."""
    setup, programs, rollout = context.setup, context.programs, context.setup.config.rollout
    assert programs.collect is not None
    rounds: list[_Round] = []
    found: list[Metrics] = []
    advantages = None
    waiting = 0 if state.queue is None else int(state.queue.held)
    while waiting < rollout.prompts and len(rounds) < (rollout.dynamic_sampling_rounds or 1):
        state, batch = _round(context, state, seconds, done, len(rounds))
        rounds.append(batch)
        with _timed(context.totals, seconds, "update"):
            advantages = _advantages(context, state, batch, done)
            bare, metrics = programs.collect(
                without_buffer(state), batch.rollout.rollouts, batch.reward, batch.verdicts
            )
            state = dataclasses.replace(bare, replay=state.replay)
            found.append(metrics | batch.draw_metrics)
            waiting = int(metrics["groups/waiting"])
    with _timed(context.totals, seconds, "update"):
        settings = SamplingParams.of(rollout, setup.task.stop_ids)
        temperature = processes.to_global(settings.temperature, replicated(setup.mesh))
        state, update_metrics = programs.step(buffer_to_device(setup, state), temperature)
    return _Trained(state, rounds, found, update_metrics, advantages)


def _as_floats(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in processes.to_host(metrics).items()}


def _advantages(context: StepContext, state: TrainState, batch: _Round, done: int) -> Float[Array, "B G"] | None:
    """Advantages of a batch, if this step's completions are to be logged."""
    every = context.setup.config.log.completions_every
    if not every or done % every:
        return None
    return context.programs.advantages(without_buffer(state), batch.rollout.rollouts, batch.reward)


def _log_completions(context: StepContext, batch: _Round, advantages: Float[Array, "B G"], done: int) -> None:
    rollout, log = batch.rollout, context.setup.config.log
    found = processes.fetch_rows(advantages, rollout.owned)
    weights = batch.weights[rollout.owned]
    lines = completion_lines(
        context.setup.task, rollout.completions, batch.owned_scores, found, weights, log.completions
    )
    context.log.completions(done, lines, log.completions_format)


def _costs(context: StepContext, values: Values, seconds: dict[str, float], rounds: list[_Round]) -> Values:
    """Rollouts, tokens and seconds of a step, its reward metrics and its learning rate."""
    more = dict(values)
    prompts = context.setup.task.train.lengths
    add_step(context.totals, more, [(prompts[one.rows], one.lengths) for one in rounds])
    if rounds:
        more |= verdicts.metrics(_joined([one.scores for one in rounds]))
        more["tokens_per_second"] = sum(int(one.lengths.sum()) for one in rounds) / seconds["rollout"]
    more |= {f"time/{name}": spent for name, spent in seconds.items()}
    more["step_time"] = sum(seconds.values())
    before = processes.to_global(np.int32(max(values["updates"] - 1, 0)), replicated(context.setup.mesh))
    more["learning_rate"] = float(processes.to_host(context.programs.learning_rate(before)))
    return more


@contextmanager
def _timed(totals: RunAccounting, seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of a block to the run's and to this step's."""
    with totals.phase(phase) as spent:
        yield
    seconds[phase] = seconds.get(phase, 0.0) + spent["seconds"]


def _round(
    context: StepContext, state: TrainState, seconds: dict[str, float], done: int, number: int
) -> tuple[TrainState, _Round]:
    """Select, roll out and verify round `number` of a step."""
    setup, programs, totals, log = context
    with _timed(totals, seconds, "select"):
        place = processes.to_global(np.int32(number), replicated(setup.mesh))
        ids, weight, selector, draw_metrics = programs.select(state.selector, state.key, state.step, place)
        rows, weights = processes.to_host((ids, weight))
        state = dataclasses.replace(state, selector=selector)
    with _timed(totals, seconds, "rollout"):
        rollout = _roll_out(context, state, rows, weights, done, number)
    with _timed(totals, seconds, "verify"):
        owned_scores = _joined([wait() for wait in rollout.waits])
        scores, lengths = _shared(owned_scores, rollout, len(rows))
    log.errors(done, owned_scores.errors)
    log.no_verdicts(done, owned_scores.missing)
    verdicts.check(scores, done, setup.config, totals.counts)
    verdicts.check_sign(scores, done, setup.config)
    reward, correct = (processes.to_global(x, batch_sharding(setup.mesh)) for x in (scores.reward, scores.verdicts))
    return state, _Round(rows, weights, rollout, lengths, reward, correct, owned_scores, scores, draw_metrics)


def _shared(owned: RewardResult, rollout: _Rollout, batch: int) -> tuple[RewardResult, Int[np.ndarray, "B G"]]:
    """Rewards and lengths of the whole batch on every process, from those of the rows that each one verified."""
    values = {"reward": owned.reward, "verdicts": owned.verdicts, "lengths": rollout.completions.lengths}
    values |= {f"terms/{name}": value for name, value in owned.terms.items()}
    values |= {f"failed/{name}": value for name, value in owned.failed.items()}
    every = processes.share_rows(values, rollout.owned, batch)
    terms = {name: every[f"terms/{name}"] for name in owned.terms}
    failed = {name: every[f"failed/{name}"] for name in owned.failed}
    whole = owned._replace(reward=every["reward"], verdicts=every["verdicts"], terms=terms, failed=failed)
    return whole, every["lengths"]


def _over_rounds(found: list[dict[str, float]]) -> dict[str, float]:
    """One step's metrics from those of its rounds: counts are summed, extremes kept, the rest averaged without NaN."""
    if not found:
        return {}

    def one(name: str) -> float:
        values = [metrics[name] for metrics in found if not math.isnan(metrics[name])] or [math.nan]
        if name == "groups/effective":
            return sum(values)
        if name == "groups/waiting":
            return values[-1]
        words = re.split("[/_]", name)
        if "min" in words:
            return min(values)
        return max(values) if "max" in words else sum(values) / len(values)

    return {name: one(name) for name in found[0]}


def _fingerprints(state: TrainState, rounds: list[_Round]) -> Values:
    """CRC-32 of the prompts and tokens that were drawn, and of the state after the step."""
    return {
        "crc/prompt_ids": crc([one.rows for one in rounds]),
        "crc/tokens": crc([one.rollout.rollouts.tokens for one in rounds]),
        "crc/params": crc(state.params),
        "crc/selector": crc(state.selector),
        "crc/advantage": crc(state.advantage),
        "crc/replay": crc((state.replay, state.queue)),
    }


def buffer_to_device(setup: Setup, state: TrainState) -> TrainState:
    """The state with its stored groups on the devices, where an update and a checkpoint read them."""
    if setup.config.replay.memory == "device":
        return state
    return dataclasses.replace(state, replay=jax.device_put(state.replay, setup.shardings.replay))


def _buffer_to_host(setup: Setup, state: TrainState) -> TrainState:
    """The state with its stored groups in the memory that replay.memory names."""
    memory = setup.config.replay.memory
    if memory == "device":
        return state
    shardings = jax.tree.map(lambda s: s.with_memory_kind(memory), setup.shardings.replay)
    return dataclasses.replace(state, replay=jax.device_put(state.replay, shardings))


def _roll_out(
    context: StepContext,
    state: TrainState,
    rows: Int[np.ndarray, "B"],
    weights: Float[np.ndarray, "B"],
    done: int,
    number: int,
) -> _Rollout:
    """Sample the batch in rollout.chunks parts; each is handed to the verifiers while the next is sampled."""
    config, task = context.setup.config, context.setup.task
    size = len(rows) // config.rollout.chunks
    slices = [slice(start, start + size) for start in range(0, len(rows), size)]
    chunks = _sample_chunks(context, state, rows, weights, slices, number)
    waits, batches, owned = [], [], []
    for place, chunk in zip(slices, chunks, strict=True):
        own = processes.owned_rows(chunk.lengths)
        tokens, lengths, ended = (processes.fetch_rows(x, own) for x in (chunk.tokens, chunk.lengths, chunk.ended))
        batches.append(CompletionBatch(task.train, rows[place][own], tokens, lengths, ended, done))
        owned.append(place.start + own)
        waits.append(task.reward_fn(batches[-1]))
    completions = batches[0]._replace(
        rows=np.concatenate([batch.rows for batch in batches]),
        tokens=np.concatenate([batch.tokens for batch in batches]),
        lengths=np.concatenate([batch.lengths for batch in batches]),
        ended=np.concatenate([batch.ended for batch in batches]),
    )
    return _Rollout(context.programs.join(chunks), np.concatenate(owned), completions, waits)


def _sample_chunks(
    context: StepContext,
    state: TrainState,
    rows: Int[np.ndarray, "B"],
    weights: Float[np.ndarray, "B"],
    slices: list[slice],
    number: int,
) -> list[Rollouts]:
    """Dispatch the sampler on each chunk of the batch of round `number`."""
    setup = context.setup
    config, whole = setup.config.rollout, replicated(setup.mesh)
    settings = processes.to_global(SamplingParams.of(config, setup.task.stop_ids), whole)
    chunks = []
    for place in slices:
        chosen = gather(setup.task.train, rows[place], weights[place], setup.room)
        prompts = processes.to_global(chosen, batch_sharding(setup.mesh))
        first_row = np.int32((number * len(rows) + place.start) * config.group_size)
        chunks.append(
            context.programs.sample(
                state.weights, prompts, state.key, state.step, settings, processes.to_global(first_row, whole)
            )
        )
    return chunks


def _joined(parts: list[RewardResult]) -> RewardResult:
    """The chunks' rewards as one batch's."""
    first = parts[0]
    names = dict.fromkeys(name for p in parts for name in p.logged)
    columns = dict.fromkeys(name for p in parts for name in p.columns)
    return RewardResult(
        np.concatenate([p.reward for p in parts]),
        {name: np.concatenate([p.terms[name] for p in parts]) for name in first.terms},
        np.concatenate([p.verdicts for p in parts]),
        [row for p in parts for row in p.answers],
        sum((p.reasons for p in parts), Counter()),
        tuple(dict.fromkeys(error for p in parts for error in p.errors)),
        {name: np.concatenate([p.failed[name] for p in parts]) for name in first.failed},
        {name: sum((p.missing[name] for p in parts), Counter()) for name in first.missing},
        {name: [x for p in parts for x in p.logged.get(name, [])] for name in names},
        {
            name: [row for p in parts for row in p.columns.get(name) or [[None] * p.reward.shape[1]] * len(p.reward)]
            for name in columns
        },
    )


def heldout_scores(context: StepContext, state: TrainState) -> dict[str, float]:
    """Accuracy on the held-out prompts, in [0, 1]; the same random numbers at every step, so that curves compare."""
    setup, programs, totals, log = context
    config, step = setup.config, int(state.step)
    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)
    zero = processes.to_global(np.int32(0), whole)

    def report(scores: RewardResult) -> None:
        log.errors(step, scores.errors)
        log.no_verdicts(step, scores.missing)

    def sample(params: PyTree, prompts: Prompts, key: Key[Array, ""], settings: SamplingParams) -> Rollouts:
        return programs.eval_sample(
            params, prompts, jax.device_put(key, whole), zero, processes.to_global(settings, whole), zero
        )

    with totals.phase("eval"):
        return evaluate(
            sample,
            state.weights,
            setup.task,
            config,
            # The purpose is folded in before a batch's number, which might equal the number of another purpose.
            jax.random.fold_in(state.key, EVALUATE),
            batch=config.rollout.prompts * config.rollout.group_size,
            place=lambda prompts: processes.to_global(prompts, rows),
            report=report,
            room=setup.room,
        )
