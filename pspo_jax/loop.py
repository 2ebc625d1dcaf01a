"""The outer loop: steps, evaluations, checkpoints, logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pspo_jax import cli
from pspo_jax.accounting import Totals
from pspo_jax.config import Config
from pspo_jax.io.checkpoint import Checkpoints, named_checksums
from pspo_jax.io.progress import Progress
from pspo_jax.io.run_folder import RunLog, check_config, open_folder, write_json
from pspo_jax.io.stop import stop_requests
from pspo_jax.iteration import heldout_scores, one_step, ring_to_device
from pspo_jax.parallel import hosts
from pspo_jax.programs import Programs, compiling
from pspo_jax.report import write_report
from pspo_jax.resume import restore, save_content, source_fingerprint
from pspo_jax.run_date import with_date
from pspo_jax.setup import Setup, configure_runtime, first_params, place_state, prepare, verifiers
from pspo_jax.state import TrainState
from pspo_jax.tasks.text import write_left_out
from pspo_jax.verdicts import NoVerdictError


def train(config: Config) -> int:
    """Train as the config says, or carry on where its run folder stopped. Returns the exit code."""
    folder = open_folder(config.run.dir)
    with verifiers(config, folder / "workers.log") as pool:
        hosts.initialize(config)
        configure_runtime(config)
        config = with_date(config, folder / "config.yaml")
        progress = Progress(config.log.progress and hosts.leads(), quiet=not hosts.leads())
        with hosts.failing_together():
            return _train(config, prepare(config, pool=pool, say=progress.say), folder, progress)


def _train(config: Config, setup: Setup, folder: Path, progress: Progress) -> int:
    with (
        stop_requests() as asked,
        jax.set_mesh(setup.mesh),
        Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints,
    ):

        def stop() -> bool:
            """Whether any process was asked to; all of them stop at the same step."""
            return hosts.any_says(asked())

        if checkpoints.steps():
            check_config(folder, config)
        hosts.wait_for_all("config")
        if hosts.leads():
            (folder / "config.yaml").write_text(cli.to_yaml(config))
        summarised = (folder / "summary.json").exists()
        finished = summarised and checkpoints.steps()[-1:] == [config.run.steps]
        # A GPU's compiler times kernels on the device, where nothing else should run then.
        alone = setup.mesh.devices.flat[0].platform == "gpu"
        totals = Totals()
        with compiling(setup, at_once=not (finished or alone)) as compiled:
            begun = _begin(setup, folder, checkpoints, totals, progress, stop)
            if begun is None:
                progress.say("stopped during the cold start; the same command begins it again")
                return 0
            state, totals = begun
            if int(state.step) == config.run.steps and summarised:
                progress.say(f"{folder} is finished; choose another --run.dir to train again")
                show_summary(config, folder, progress)
                return 0
            with totals.phase("compile"):
                programs = compiled(progress)
        return _loop(setup, state, programs, totals, folder, checkpoints, progress, stop)


def _begin(
    setup: Setup,
    folder: Path,
    checkpoints: Checkpoints,
    totals: Totals,
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[TrainState, Totals] | None:
    """The newest checkpoint's state and accounting, or the first; None if it was to stop during the cold start."""
    restored = restore(setup, folder, checkpoints, progress)
    if hosts.leads():
        save_content(setup, folder)
        if line := write_left_out(setup.task, folder / "left_out.jsonl"):
            progress.say(line)
    if restored is not None:
        return restored
    with totals.phase("sft"):
        first = first_params(setup, folder, progress, stop)
    if first.params is None:
        return None
    progress.say(_describe(setup, first.origin))
    if setup.config.algorithm.compat == "released":
        progress.say(
            "algorithm.compat=released: advantages and loss weights have the defects of PSPO's published code "
            "(docs/algorithms.md); for parity studies only"
        )
    return place_state(setup, first.params, first.frozen), totals


def _describe(setup: Setup, origin: str) -> str:
    """A line on the policy's size, and how it trains."""
    trained = sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    frozen = sum(x.size for x in jax.tree.leaves(setup.abstract.frozen))
    line = f"policy: {trained + frozen:,} parameters, {origin}"
    if frozen:
        line += f"; {trained:,} of adapters train"
    elif setup.config.policy.param_dtype == "bfloat16":
        line += "; trained in bfloat16, where small updates are lost: policy.param_dtype float32 keeps them"
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
    log = RunLog(folder, first, c.log.tensorboard, progress.console if c.log.progress else None, hosts.leads())
    scores: dict[str, float] = {}
    base = named_checksums(state.frozen)

    def save(state: TrainState, done: int, scores: dict[str, float] | None = None) -> None:
        metadata = {
            "dataset": setup.task.train.fingerprint(),
            "source": source_fingerprint(setup),
            "base": base,
            "totals": totals.save(),
        }
        checkpoints.save(done, ring_to_device(setup, state).to_save(), metadata, scores)

    def stopped(why: str) -> int:
        log.close()
        checkpoints.wait()
        progress.say(f"{why}; checkpoints {checkpoints.steps()} are from before")
        return 1

    begun = hosts.leads() and bool((folder / "metrics.jsonl").read_text())
    if first == 0 and not hosts.any_says(begun):
        scores = heldout_scores(setup, state, programs, totals, log)
        log.metrics(0, {"rollouts/total": 0, "num_tokens": 0, **_eval_names(scores)})
        progress.say(f"before training: greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}")
    with progress.phase("step", c.run.steps, first) as bar:
        for done in range(first + 1, c.run.steps + 1):
            try:
                state, values = one_step(setup, state, programs, totals, log, done)
            except NoVerdictError as error:
                return stopped(str(error))
            last = done == c.run.steps
            evaluated = last or (c.eval.every and done % c.eval.every == 0)
            if evaluated:
                scores = heldout_scores(setup, state, programs, totals, log)
                values |= _eval_names(scores)
            if last or (c.log.selection_every and done % c.log.selection_every == 0):
                seen = hosts.whole(programs.survey(state.selector, state.step))
                values |= {name: float(value) for name, value in seen.items() if not isinstance(value, dict)}
                log.strategy(done, {name: value for name, value in seen.items() if isinstance(value, dict)})
            log.metrics(done, values)
            if values["skipped_updates"] >= c.optimizer.max_skipped:
                return stopped(
                    f"stopped: {int(values['skipped_updates'])} updates in a row up to step {done} were not finite; "
                    "lower optimizer.learning_rate"
                )
            stopping = not last and stop()
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
    scores = scores or heldout_scores(setup, state, programs, totals, log)
    return _finish(setup, totals, folder, scores, progress)


def _eval_names(scores: dict[str, float]) -> dict[str, float | int]:
    return {f"eval/{name}": value for name, value in scores.items()}


def _numbers(values: dict[str, Any]) -> str:
    """The line beside the progress bar."""
    rate = f"{1 / values['step_time']:.1f} steps/s"
    if "reward" not in values:
        return f"enough groups were waiting, nothing was rolled out  {rate}"
    return (
        f"reward {values['reward']:.3f}  effective {values['groups/effective']:.0f}  "
        f"{values['tokens_per_second']:,.0f} tok/s  {rate}"
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
    if not hosts.leads():
        return 0
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
