"""The outer loop: select, roll out, verify, update, log, save. Data crosses the host boundary twice a step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pspo_jax import cli
from pspo_jax.config import Config, ConfigError
from pspo_jax.evaluate import evaluate, gather
from pspo_jax.io.checkpoint import Checkpoints, named_checksums, verify
from pspo_jax.io.progress import Progress
from pspo_jax.io.run_folder import RunLog, check_config, crc, open_folder, write_json
from pspo_jax.io.stop import stop_requests
from pspo_jax.optimizer import schedule, updates_per_step
from pspo_jax.parallel.mesh import batch_sharding, replicated
from pspo_jax.programs import Programs, compile_programs
from pspo_jax.report import write_report
from pspo_jax.rollout.sampler import SamplingParams
from pspo_jax.setup import Setup, configure_runtime, first_params, load_base, place_state, prepare
from pspo_jax.state import Prompts, Rollouts, TrainState

PHASES = ("setup", "compile", "sft", "select", "rollout", "verify", "update", "eval")


class Totals:
    """Accounting since the run began, across resumes; it is saved with each checkpoint and affects nothing."""

    def __init__(self, saved: dict[str, Any] | None = None):
        saved = saved or {}
        self.counts: dict[str, int] = {
            "rollouts": 0,
            "effective": 0,
            "generated": 0,
            "tokens": 0,
            **saved.get("counts", {}),
        }
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0) | saved.get("seconds", {})
        self._before = saved.get("total", 0.0)
        self._began = time.monotonic()

    def total(self) -> float:
        return self._before + time.monotonic() - self._began

    def save(self) -> dict[str, Any]:
        return {"counts": self.counts, "seconds": self.seconds, "total": self.total()}

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, float]]:
        """Time a block; the yielded dict holds its seconds afterwards."""
        out: dict[str, float] = {}
        began = time.monotonic()
        try:
            yield out
        finally:
            out["seconds"] = time.monotonic() - began
            self.seconds[name] += out["seconds"]


def train(config: Config) -> int:
    """Train as the config says, or carry on where its run folder stopped. Returns the exit code."""
    progress = Progress(config.log.progress)
    folder = open_folder(config.run.dir)
    configure_runtime(config)
    setup = prepare(config)
    with (
        stop_requests() as stop,
        jax.set_mesh(setup.mesh),
        Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints,
    ):
        if checkpoints.steps():
            check_config(folder, config)
        (folder / "config.yaml").write_text(cli.to_yaml(config))
        restored = _restore(setup, checkpoints, progress)
        state, totals = restored or (None, Totals())
        if state is None:
            with totals.phase("sft"):
                first = first_params(setup, folder, progress, stop)
            if first.params is None:
                progress.say("stopped during the cold start; the same command begins it again")
                return 0
            progress.say(_describe(setup, first.origin))
            state = place_state(setup, first.params, first.frozen)
            del first  # the state owns the buffers, and donates them
        if int(state.step) == config.run.steps and (folder / "summary.json").exists():
            progress.say(f"{folder} is finished; choose another --run.dir to train again")
            show_summary(config, folder, progress)
            return 0
        with totals.phase("compile"):
            programs = compile_programs(setup, progress)
        return _loop(setup, state, programs, totals, folder, checkpoints, progress, stop)


def _restore(setup: Setup, checkpoints: Checkpoints, progress: Progress) -> tuple[TrainState, Totals] | None:
    def check(metadata: dict[str, Any]) -> None:
        now = setup.task.train.fingerprint()
        if metadata["dataset"] != now:
            raise ConfigError(
                f"task.name={setup.task.name}: the prompts differ from those of the checkpoint (fingerprint "
                f"{metadata['dataset']} there, {now} now); restore the data or choose another --run.dir"
            )
        if metadata.get("source") != _source_fingerprint(setup):
            raise ConfigError(
                f"policy.source={setup.config.policy.source}: is not the checkpoint that this run began from "
                "(another config, or other tensors); restore it or choose another --run.dir"
            )

    found = checkpoints.restore(setup.abstract.to_save(), progress.say, check)
    if found is None:
        return None
    saved, metadata = found
    frozen = None
    if setup.architecture.lora is not None:
        frozen = load_base(setup)
        try:
            verify(frozen, metadata["base"])
        except ValueError as error:
            raise ConfigError(
                f"policy.source={setup.config.policy.source}: its weights differ from those this run's adapters were "
                f"trained on ({error}); restore them or choose another --run.dir"
            ) from error
    state = saved.joined(frozen)
    progress.say(f"resuming at step {int(state.step)} of {setup.config.run.steps}")
    return state, Totals(metadata["totals"])


def _source_fingerprint(setup: Setup) -> str | None:
    return None if setup.source is None else setup.source.fingerprint()


def _describe(setup: Setup, origin: str) -> str:
    """A line on the policy's size, and on prompts that were left out."""
    trained = sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    frozen = sum(x.size for x in jax.tree.leaves(setup.abstract.frozen))
    line = f"policy: {trained + frozen:,} parameters, {origin}"
    if frozen:
        line += f"; {trained:,} of adapters train"
    elif setup.config.policy.param_dtype == "bfloat16":
        line += "; trained in bfloat16, where small updates are lost: policy.param_dtype float32 keeps them"
    if left_out := setup.task.train.left_out:
        line += f"; {left_out:,} prompts longer than prompt.max_tokens={setup.config.prompt.max_tokens} are left out"
    return line


def _loop(
    setup: Setup,
    state: TrainState,
    programs: Programs,
    totals: Totals,
    folder: Path,
    checkpoints: Checkpoints,
    progress: Progress,
    stop: Callable[[], bool],
) -> int:
    c = setup.config
    first = int(state.step)
    log = RunLog(folder, first, c.log.tensorboard)
    scores: dict[str, float] = {}
    base = named_checksums(state.frozen)

    def save(state: TrainState, done: int, scores: dict[str, float] | None = None) -> None:
        metadata = {
            "dataset": setup.task.train.fingerprint(),
            "source": _source_fingerprint(setup),
            "base": base,
            "totals": totals.save(),
        }
        checkpoints.save(done, state.to_save(), metadata, scores)

    if first == 0 and not (folder / "metrics.jsonl").read_text():
        scores = _evaluate(setup, state, programs, totals)
        log.metrics(0, {"rollouts/total": 0, "num_tokens": 0, **_eval_names(scores)})
        progress.say(f"before training: greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}")
    with progress.phase("step", c.run.steps, first) as bar:
        for done in range(first + 1, c.run.steps + 1):
            state, values = _one_step(setup, state, programs, totals, log, done)
            last = done == c.run.steps
            evaluated = last or (c.eval.every and done % c.eval.every == 0)
            if evaluated:
                scores = _evaluate(setup, state, programs, totals)
                values |= _eval_names(scores)
            log.metrics(done, values)
            if last or (c.log.completions_every and done % c.log.completions_every == 0):
                log.strategy(done, state.selector)
            if values["skipped_updates"] >= c.optimizer.max_skipped:
                log.close()
                checkpoints.wait()
                progress.say(
                    f"stopped: {int(values['skipped_updates'])} updates in a row up to step {done} were not finite; "
                    f"checkpoints {checkpoints.steps()} are from before them; lower optimizer.learning_rate"
                )
                return 1
            stopping = stop() and not last
            if evaluated or stopping or done % c.checkpoint.every == 0:
                save(state, done, scores if evaluated else None)
            bar(1, _numbers(values))
            if stopping:
                checkpoints.wait()
                log.close()
                progress.say(f"stopped after step {done}, saved; the same command carries on")
                return 0
    checkpoints.wait()
    log.close()
    scores = scores or _evaluate(setup, state, programs, totals)
    return _finish(setup, totals, folder, scores, progress)


def _one_step(
    setup: Setup, state: TrainState, programs: Programs, totals: Totals, log: RunLog, done: int
) -> tuple[TrainState, dict[str, float | int]]:
    c, task, mesh = setup.config, setup.task, setup.mesh
    settings = jax.device_put(SamplingParams.of(c.rollout, task.stop_ids), replicated(mesh))
    with totals.phase("select") as selecting:
        ids, weight, selector = programs.select(state.selector, state.key, state.step)
        rows = np.asarray(ids)
        state = dataclasses.replace(state, selector=selector)
        prompts = jax.device_put(gather(task.train, rows, weight), batch_sharding(mesh))
    with totals.phase("rollout") as rolling:
        rollouts = programs.sample(state.weights, prompts, state.key, state.step, settings)
        tokens, lengths, ended = jax.device_get((rollouts.tokens, rollouts.lengths, rollouts.ended))
    with totals.phase("verify") as verifying:
        rewards = task.verify(task.train, rows, tokens, lengths)
        reward = np.sum(list(rewards.values()), axis=0, dtype=np.float32)
    with totals.phase("update") as updating:
        state, metrics = programs.step(state, rollouts, jax.device_put(reward, batch_sharding(mesh)))
        values: dict[str, float | int] = {k: float(v) for k, v in jax.device_get(metrics).items()}

    _count(totals, values, task.train.lengths[rows], lengths)
    for name, reward_of in rewards.items():
        values |= {
            f"rewards/{name}/mean": float(np.nanmean(reward_of)),
            f"rewards/{name}/std": float(np.nanstd(reward_of)),
        }
    times = {"select": selecting, "rollout": rolling, "verify": verifying, "update": updating}
    values |= {f"time/{name}": t["seconds"] for name, t in times.items()}
    values["step_time"] = sum(t["seconds"] for t in times.values())
    values["tokens_per_second"] = int(lengths.sum()) / rolling["seconds"]
    rate = schedule(c.optimizer, c.run.steps * updates_per_step(c))
    values["learning_rate"] = float(rate(max(values["updates"] - 1, 0)))
    if c.run.fingerprint:
        values |= {"crc/prompt_ids": crc(rows), "crc/tokens": crc(tokens), "crc/params": crc(state.params)}
        values |= {"crc/selector": crc(state.selector), "crc/credit": crc(state.credit)}
    if c.log.completions_every and done % c.log.completions_every == 0:
        log.completions(done, _completions(setup, done, rows, tokens, lengths, ended, reward))
    return state, values


def _count(totals: Totals, values: dict[str, Any], prompt_lengths: np.ndarray, lengths: np.ndarray) -> None:
    """Cumulative rollouts and tokens, as every curve may be drawn against them."""
    group = lengths.shape[1]
    effective = int(values["groups/effective"]) * group
    for name, more in (
        ("rollouts", lengths.size),
        ("effective", effective),
        ("generated", int(lengths.sum())),
        ("tokens", int(lengths.sum()) + int(prompt_lengths.sum()) * group),
    ):
        totals.counts[name] += more
    values |= {
        "rollouts/total": totals.counts["rollouts"],
        "rollouts/effective": totals.counts["effective"],
        "tokens/generated": totals.counts["generated"],
        "num_tokens": totals.counts["tokens"],
    }


def _completions(
    setup: Setup, done: int, rows: Any, tokens: Any, lengths: Any, ended: Any, reward: Any
) -> list[dict[str, Any]]:
    task = setup.task
    lines = []
    for i in range(min(setup.config.log.completions, len(rows))):
        row = int(rows[i])
        prompt = task.tokenizer.decode(task.train.tokens[row, : task.train.lengths[row]].tolist())
        for j in range(lengths.shape[1]):
            lines.append(
                {
                    "step": done,
                    "prompt_id": row,
                    "prompt": prompt,
                    "answer": task.train.answers[row],
                    "completion": task.tokenizer.decode(tokens[i, j, : lengths[i, j]].tolist()),
                    "reward": None if np.isnan(reward[i, j]) else float(reward[i, j]),
                    "advantage": None if np.isnan(reward[i, j]) else float(reward[i, j] - np.nanmean(reward[i])),
                    "length": int(lengths[i, j]),
                    "ended": bool(ended[i, j]),
                }
            )
    return lines


def _evaluate(setup: Setup, state: TrainState, programs: Programs, totals: Totals) -> dict[str, float]:
    c = setup.config
    rows, whole = batch_sharding(setup.mesh), replicated(setup.mesh)

    def sample(params: Any, prompts: Prompts, key: Any, settings: SamplingParams) -> Rollouts:
        return programs.eval_sample(
            params, prompts, jax.device_put(key, whole), state.step, jax.device_put(settings, whole)
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


def _eval_names(scores: dict[str, float]) -> dict[str, float | int]:
    return {f"eval/{name}": value for name, value in scores.items()}


def _numbers(values: dict[str, Any]) -> str:
    """The line beside the progress bar."""
    return (
        f"reward {values['reward']:.3f}  effective {values['groups/effective']:.0f}  "
        f"{values['tokens_per_second']:,.0f} tok/s  {1 / values['step_time']:.1f} steps/s"
    )


def _finish(setup: Setup, totals: Totals, folder: Path, scores: dict[str, float], progress: Progress) -> int:
    """summary.json and report.html, then the table."""
    seconds = {**totals.seconds, "total": totals.total()}
    seconds["setup"] = max(seconds["total"] - sum(totals.seconds.values()), 0.0)
    summary = {
        "eval": scores,
        "steps": setup.config.run.steps,
        "rollouts": totals.counts["rollouts"],
        "tokens": totals.counts["generated"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    write_json(folder / "summary.json", summary)
    if setup.config.log.report:
        progress.say(f"report: {write_report([folder], folder / 'report.html')}")
    show_summary(setup.config, folder, progress)
    return 0


def show_summary(config: Config, folder: Path, progress: Progress) -> None:
    """The table at the end of a run, from its summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())
    progress.table(
        f"{config.algorithm.name} on {config.task.name}, {summary['steps']} steps",
        [
            ("held-out greedy", f"{summary['eval']['greedy']:.3f}"),
            ("held-out sampled", f"{summary['eval']['sampled']:.3f}"),
            ("rollouts", f"{summary['rollouts']:,}"),
            ("tokens generated", f"{summary['tokens']:,}"),
            ("seconds", seconds),
        ],
    )
