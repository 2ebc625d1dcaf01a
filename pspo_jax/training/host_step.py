"""One step of the loop on the host: select, roll out, verify, update. Data crosses to the host twice: ids, rewards."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from pspo_jax.arrays.state import EVALUATE, Prompts, Rollouts, TrainState
from pspo_jax.config.schema import Config
from pspo_jax.data.task import CompletionBatch, RewardResult
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import batch_sharding, replicated
from pspo_jax.evaluation.heldout import evaluate, gather
from pspo_jax.rollout.sampler import SamplingParams
from pspo_jax.runs import verdicts
from pspo_jax.runs.accounting import RunAccounting, add_step
from pspo_jax.runs.completions import completion_lines
from pspo_jax.runs.run_folder import RunLog, crc
from pspo_jax.training.compile import Programs, without_buffer
from pspo_jax.training.setup import Setup

Values = dict[str, float | int]


class _Rolled(NamedTuple):
    rollouts: Rollouts
    own: np.ndarray
    """Rows of the batch that this process holds."""
    host: CompletionBatch
    """Those rows."""
    judged: list[Callable[[], RewardResult]]
    """One per chunk."""


class _Round(NamedTuple):
    """A batch that was rolled out and verified."""

    rows: np.ndarray
    lengths: np.ndarray
    rollouts: Rollouts
    reward: jax.Array
    verdicts: jax.Array
    own: np.ndarray
    """Rows of the batch that this process holds, judges and logs."""
    own_weights: np.ndarray
    own_host: CompletionBatch
    own_scores: RewardResult
    scores: RewardResult
    """Of the whole batch; answers, reasons and errors are this process's."""
    drawn: dict[str, Any]
    """What the selector says of the draw."""


def one_step(
    setup: Setup, state: TrainState, programs: Programs, totals: RunAccounting, log: RunLog, done: int
) -> tuple[TrainState, Values]:
    """The state after step `done`, and its metrics.

    Raises:
      verdicts.NoVerdictError: more completions than verifier.max_no_verdict have no verdict.
    """
    c = setup.config
    times: dict[str, float] = {}
    rounds: list[_Round] = []
    found: list[dict[str, Any]] = []
    advantages = None
    if programs.collect is None:
        state, one = _round(setup, state, programs, totals, times, log, done, 0)
        rounds.append(one)
        with _timed(totals, times, "update"):
            if _dumps(c, done):
                advantages = programs.advantages(without_buffer(state), one.rollouts, one.reward)
            state = buffer_to_device(setup, state)
            state, metrics = programs.step(state, one.rollouts, one.reward, one.verdicts)
            found.append(metrics | one.drawn)
    else:
        waiting = 0 if state.queue is None else int(state.queue.held)
        while waiting < c.rollout.prompts and len(rounds) < (c.rollout.dynamic_sampling_rounds or 1):
            state, one = _round(setup, state, programs, totals, times, log, done, len(rounds))
            rounds.append(one)
            with _timed(totals, times, "update"):
                if _dumps(c, done):
                    advantages = programs.advantages(without_buffer(state), one.rollouts, one.reward)
                bare, metrics = programs.collect(without_buffer(state), one.rollouts, one.reward, one.verdicts)
                state = dataclasses.replace(bare, replay=state.replay)
                found.append(metrics | one.drawn)
                waiting = int(metrics["groups/waiting"])
        with _timed(totals, times, "update"):
            settings = SamplingParams.of(c.rollout, setup.task.stop_ids)
            temperature = processes.to_global(settings.temperature, replicated(setup.mesh))
            state = buffer_to_device(setup, state)
            state, metrics = programs.step(state, temperature)
    with _timed(totals, times, "update"):
        values: Values = _over_rounds([{k: float(v) for k, v in processes.to_host(m).items()} for m in found])
        values |= {k: float(v) for k, v in processes.to_host(metrics).items()}
        state = _buffer_to_host(setup, state)
    if programs.collect is not None:
        values["rollouts/rounds"] = len(rounds)
    values |= _accounts(setup, programs, totals, values, times, rounds)
    if c.run.fingerprint:
        values |= _fingerprints(state, rounds)
    if advantages is not None:
        last = rounds[-1]
        held = processes.fetch_rows(advantages, last.own)
        lines = completion_lines(setup.task, last.own_host, last.own_scores, held, last.own_weights, c.log.completions)
        log.completions(done, lines, c.log.completions_format)
    return state, values


def _accounts(
    setup: Setup,
    programs: Programs,
    totals: RunAccounting,
    values: Values,
    times: dict[str, float],
    rounds: list[_Round],
) -> dict[str, Any]:
    """What a step cost, its rewards, and the learning rate."""
    more = dict(values)
    prompts = setup.task.train.lengths
    add_step(totals, more, [(prompts[one.rows], one.lengths) for one in rounds])
    if rounds:
        more |= verdicts.metrics(_joined([one.scores for one in rounds]))
        more["tokens_per_second"] = sum(int(one.lengths.sum()) for one in rounds) / times["rollout"]
    more |= {f"time/{name}": seconds for name, seconds in times.items()}
    more["step_time"] = sum(times.values())
    before = processes.to_global(np.int32(max(values["updates"] - 1, 0)), replicated(setup.mesh))
    more["learning_rate"] = float(processes.to_host(programs.learning_rate(before)))
    return more


def _dumps(config: Config, done: int) -> bool:
    return bool(config.log.completions_every) and done % config.log.completions_every == 0


@contextmanager
def _timed(totals: RunAccounting, times: dict[str, float], phase: str) -> Iterator[None]:
    """A phase of the run whose seconds are also added to this step's."""
    with totals.phase(phase) as spent:
        yield
    times[phase] = times.get(phase, 0.0) + spent["seconds"]


def _round(
    setup: Setup,
    state: TrainState,
    programs: Programs,
    totals: RunAccounting,
    times: dict[str, float],
    log: RunLog,
    done: int,
    number: int,
) -> tuple[TrainState, _Round]:
    """Select, roll out, verify."""
    with _timed(totals, times, "select"):
        place = processes.to_global(np.int32(number), replicated(setup.mesh))
        ids, weight, selector, drawn = programs.select(state.selector, state.key, state.step, place)
        rows, weights = processes.to_host((ids, weight))
        state = dataclasses.replace(state, selector=selector)
    with _timed(totals, times, "rollout"):
        rolled = _roll_out(setup, state, programs, rows, weights, done, number)
    with _timed(totals, times, "verify"):
        own_scores = _joined([wait() for wait in rolled.judged])
        scores, lengths = _shared(own_scores, rolled, len(rows))
    log.errors(done, own_scores.errors)
    log.no_verdicts(done, own_scores.missing)
    verdicts.check(scores, done, setup.config, totals.counts)
    reward, judged = (processes.to_global(x, batch_sharding(setup.mesh)) for x in (scores.reward, scores.verdicts))
    own = rolled.own
    return state, _Round(
        rows, lengths, rolled.rollouts, reward, judged, own, weights[own], rolled.host, own_scores, scores, drawn
    )


def _shared(own: RewardResult, rolled: _Rolled, batch: int) -> tuple[RewardResult, np.ndarray]:
    """Scores and lengths of the whole batch on every process, of what each one judged."""
    values = {"reward": own.reward, "verdicts": own.verdicts, "lengths": rolled.host.lengths}
    values |= {f"terms/{name}": value for name, value in own.terms.items()}
    values |= {f"failed/{name}": value for name, value in own.failed.items()}
    every = processes.share_rows(values, rolled.own, batch)
    terms = {name: every[f"terms/{name}"] for name in own.terms}
    failed = {name: every[f"failed/{name}"] for name in own.failed}
    whole = own._replace(reward=every["reward"], verdicts=every["verdicts"], terms=terms, failed=failed)
    return whole, every["lengths"]


def _over_rounds(found: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's rounds as one: counts are summed, extremes kept, the rest averaged, without NaN."""
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
    """CRCs of what was drawn, and of the state after the step."""
    return {
        "crc/prompt_ids": crc([one.rows for one in rounds]),
        "crc/tokens": crc([one.rollouts.tokens for one in rounds]),
        "crc/params": crc(state.params),
        "crc/selector": crc(state.selector),
        "crc/advantage": crc(state.advantage),
        "crc/replay": crc((state.replay, state.queue)),
    }


def buffer_to_device(setup: Setup, state: TrainState) -> TrainState:
    """The state with stored groups where the update, and a checkpoint, reads them."""
    if setup.config.replay.memory == "device":
        return state
    return dataclasses.replace(state, replay=jax.device_put(state.replay, setup.shardings.replay))


def _buffer_to_host(setup: Setup, state: TrainState) -> TrainState:
    """The state with stored groups where replay.memory says."""
    memory = setup.config.replay.memory
    if memory == "device":
        return state
    places = jax.tree.map(lambda s: s.with_memory_kind(memory), setup.shardings.replay)
    return dataclasses.replace(state, replay=jax.device_put(state.replay, places))


def _roll_out(
    setup: Setup,
    state: TrainState,
    programs: Programs,
    rows: np.ndarray,
    weights: np.ndarray,
    done: int,
    number: int,
) -> _Rolled:
    """Sample the batch in rollout.chunks parts; each is handed to the verifiers while the next is sampled."""
    c, task, mesh = setup.config, setup.task, setup.mesh
    whole = replicated(mesh)
    settings = processes.to_global(SamplingParams.of(c.rollout, task.stop_ids), whole)
    size = len(rows) // c.rollout.chunks
    parts, places = [], [slice(k, k + size) for k in range(0, len(rows), size)]
    for place in places:
        prompts = processes.to_global(gather(task.train, rows[place], weights[place]), batch_sharding(mesh))
        first = (number * len(rows) + place.start) * c.rollout.group_size
        first_row = processes.to_global(np.int32(first), whole)
        parts.append(programs.sample(state.weights, prompts, state.key, state.step, settings, first_row))
    judged, held, owned = [], [], []
    for place, part in zip(places, parts, strict=True):
        own = processes.owned_rows(part.lengths)
        tokens, lengths, ended = (processes.fetch_rows(x, own) for x in (part.tokens, part.lengths, part.ended))
        held.append(CompletionBatch(task.train, rows[place][own], tokens, lengths, ended, done))
        owned.append(place.start + own)
        judged.append(task.reward_fn(held[-1]))
    host = held[0]._replace(
        rows=np.concatenate([h.rows for h in held]),
        tokens=np.concatenate([h.tokens for h in held]),
        lengths=np.concatenate([h.lengths for h in held]),
        ended=np.concatenate([h.ended for h in held]),
    )
    return _Rolled(programs.join(parts), np.concatenate(owned), host, judged)


def _joined(parts: list[RewardResult]) -> RewardResult:
    """The chunks' scores as one batch's."""
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


def heldout_scores(
    setup: Setup, state: TrainState, programs: Programs, totals: RunAccounting, log: RunLog
) -> dict[str, float]:
    """Accuracy on the held-out prompts; the same random numbers at every step, so that curves compare."""
    c = setup.config
    step = int(state.step)

    def told(scores: RewardResult) -> None:
        log.errors(step, scores.errors)
        log.no_verdicts(step, scores.missing)

    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)
    zero = processes.to_global(np.int32(0), whole)

    def sample(params: Any, prompts: Prompts, key: Any, settings: SamplingParams) -> Rollouts:
        return programs.eval_sample(
            params, prompts, jax.device_put(key, whole), zero, processes.to_global(settings, whole), zero
        )

    with totals.phase("eval"):
        return evaluate(
            sample,
            state.weights,
            setup.task,
            c,
            # The purpose is folded in before a batch's number, which might equal the number of another purpose.
            jax.random.fold_in(state.key, EVALUATE),
            batch=c.rollout.prompts * c.rollout.group_size,
            place=lambda prompts: processes.to_global(prompts, rows),
            told=told,
        )
