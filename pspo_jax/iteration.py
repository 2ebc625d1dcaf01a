"""One step of the loop on the host: select, roll out, verify, update. Data crosses to the host twice: ids, rewards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspo_jax.accounting import Totals, count
from pspo_jax.evaluation.heldout import evaluate, gather
from pspo_jax.io.completions import completion_lines
from pspo_jax.io.run_folder import RunLog, crc
from pspo_jax.optimizer import schedule, updates_per_step
from pspo_jax.parallel.mesh import batch_sharding, replicated
from pspo_jax.programs import Programs
from pspo_jax.rollout.sampler import SamplingParams
from pspo_jax.setup import Setup
from pspo_jax.state import Prompts, Rollouts, TrainState
from pspo_jax.tasks.base import Completions, Scores

Values = dict[str, float | int]


class NoVerdictError(Exception):
    """Too many completions could not be verified; the message says how many and why."""


class _Rolled(NamedTuple):
    rollouts: Rollouts
    host: Completions
    judged: list[Callable[[], Scores]]
    """One per chunk."""


def one_step(
    setup: Setup, state: TrainState, programs: Programs, totals: Totals, log: RunLog, done: int
) -> tuple[TrainState, Values]:
    """The state after step `done`, and its metrics.

    Raises:
      NoVerdictError: more completions than verifier.max_no_verdict have no verdict.
    """
    c, mesh = setup.config, setup.mesh
    with totals.phase("select") as selecting:
        ids, weight, selector, drawn = programs.select(state.selector, state.key, state.step)
        rows, weights = np.asarray(ids), np.asarray(weight)
        state = dataclasses.replace(state, selector=selector)
    with totals.phase("rollout") as rolling:
        rolled = _roll_out(setup, state, programs, rows, weights, done)
    with totals.phase("verify") as verifying:
        scores = _joined([wait() for wait in rolled.judged])
    log.errors(done, scores.errors)
    _check_verdicts(scores, done, c.verifier.max_no_verdict)
    dumping = bool(c.log.completions_every) and done % c.log.completions_every == 0
    with totals.phase("update") as updating:
        reward = jax.device_put(scores.reward, batch_sharding(mesh))
        lengths = rolled.rollouts.lengths
        advantages = (
            np.asarray(programs.advantages(state.credit, ids, reward, lengths, state.movement)) if dumping else None
        )
        state, metrics = programs.step(state, rolled.rollouts, reward)
        values: Values = {k: float(v) for k, v in jax.device_get(metrics | drawn).items()}

    host = rolled.host
    count(totals, values, host.prompts.lengths[rows], host.lengths)
    values |= _reward_metrics(scores)
    times = {"select": selecting, "rollout": rolling, "verify": verifying, "update": updating}
    values |= {f"time/{name}": t["seconds"] for name, t in times.items()}
    values["step_time"] = sum(t["seconds"] for t in times.values())
    values["tokens_per_second"] = int(host.lengths.sum()) / rolling["seconds"]
    rate = schedule(c.optimizer, c.run.steps * updates_per_step(c))
    values["learning_rate"] = float(rate(max(values["updates"] - 1, 0)))
    if c.run.fingerprint:
        values |= {"crc/prompt_ids": crc(rows), "crc/tokens": crc(host.tokens), "crc/params": crc(state.params)}
        values |= {"crc/selector": crc(state.selector), "crc/credit": crc(state.credit)}
    if advantages is not None:
        lines = completion_lines(setup.task, host, scores, advantages, weights, c.log.completions)
        log.completions(done, lines, c.log.completions_format)
    return state, values


def _roll_out(
    setup: Setup, state: TrainState, programs: Programs, rows: np.ndarray, weights: np.ndarray, done: int
) -> _Rolled:
    """Sample the batch in rollout.chunks parts; each is handed to the verifiers while the next is sampled."""
    c, task, mesh = setup.config, setup.task, setup.mesh
    whole = replicated(mesh)
    settings = jax.device_put(SamplingParams.of(c.rollout, task.stop_ids), whole)
    size = c.rollout.prompts // c.rollout.chunks
    parts, places = [], [slice(k, k + size) for k in range(0, c.rollout.prompts, size)]
    for place in places:
        prompts = jax.device_put(gather(task.train, rows[place], weights[place]), batch_sharding(mesh))
        first_row = jax.device_put(jnp.int32(place.start * c.rollout.group_size), whole)
        parts.append(programs.sample(state.weights, prompts, state.key, state.step, settings, first_row))
    judged, hosts = [], []
    for place, part in zip(places, parts, strict=True):
        tokens, lengths, ended = jax.device_get((part.tokens, part.lengths, part.ended))
        hosts.append(Completions(task.train, rows[place], tokens, lengths, ended, done))
        judged.append(task.judge(hosts[-1]))
    host = hosts[0]._replace(
        rows=rows,
        tokens=np.concatenate([h.tokens for h in hosts]),
        lengths=np.concatenate([h.lengths for h in hosts]),
        ended=np.concatenate([h.ended for h in hosts]),
    )
    return _Rolled(programs.join(parts), host, judged)


def _joined(parts: list[Scores]) -> Scores:
    """The chunks' scores as one batch's."""
    return Scores(
        np.concatenate([p.reward for p in parts]),
        {name: np.concatenate([p.terms[name] for p in parts]) for name in parts[0].terms},
        np.concatenate([p.right for p in parts]),
        [row for p in parts for row in p.answers],
        sum((p.reasons for p in parts), Counter()),
        tuple(dict.fromkeys(error for p in parts for error in p.errors)),
    )


def _check_verdicts(scores: Scores, done: int, limit: float) -> None:
    share = float(np.isnan(scores.right).mean())
    if share > limit:
        why = "; ".join(f"{n} x {reason}" for reason, n in scores.reasons.most_common(3))
        raise NoVerdictError(
            f"stopped in step {done}: {share:.0%} of the completions have no verdict ({why}), more than "
            f"verifier.max_no_verdict={limit:g}"
        )


def _reward_metrics(scores: Scores) -> Values:
    values: Values = {"rewards/no_verdict": float(np.isnan(scores.right).mean())}
    for name, reward in scores.terms.items():
        known = reward[~np.isnan(reward)]
        values[f"rewards/{name}/mean"] = float(known.mean()) if known.size else float("nan")
        values[f"rewards/{name}/std"] = float(known.std()) if known.size else float("nan")
    return values


def heldout_scores(setup: Setup, state: TrainState, programs: Programs, totals: Totals) -> dict[str, float]:
    """Accuracy on the held-out prompts; the same random numbers at every step, so that curves compare."""
    c = setup.config
    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)
    zero = jax.device_put(jnp.int32(0), whole)

    def sample(params: Any, prompts: Prompts, key: Any, settings: SamplingParams) -> Rollouts:
        return programs.eval_sample(
            params, prompts, jax.device_put(key, whole), zero, jax.device_put(settings, whole), zero
        )

    with totals.phase("eval"):
        return evaluate(
            sample,
            state.weights,
            setup.task,
            c,
            state.key,
            batch=c.rollout.prompts * c.rollout.group_size,
            place=lambda prompts: jax.device_put(prompts, rows),
        )
