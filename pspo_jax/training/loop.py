"""The outer loop: steps, evaluations, checkpoints, logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pspo_jax.arrays.state import TrainState
from pspo_jax.checkpoint.checksums import named_checksums
from pspo_jax.checkpoint.store import Checkpoints, saved_steps, whole_ones
from pspo_jax.config.schema import Config
from pspo_jax.data.text import write_left_out
from pspo_jax.distributed import processes
from pspo_jax.reporting.page import write_report
from pspo_jax.runs import history
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.run_date import with_date
from pspo_jax.runs.run_folder import RunLog, open_folder, read_summary, with_type_of, write_json
from pspo_jax.runs.verdicts import NoVerdictError
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist, StorageError, writing
from pspo_jax.training.compile import Programs, compiling
from pspo_jax.training.host_step import buffer_to_device, heldout_scores, one_step
from pspo_jax.training.resume import early_check, restore, save_content, source_fingerprint
from pspo_jax.training.setup import Setup, first_params, place_state, prepare, started


class _Run(NamedTuple):
    """What the parts of a run share."""

    setup: Setup
    config: Config
    """What config.yaml keeps: `setup.config` with the mesh as it was given."""
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    stop: Callable[[], bool]
    """Whether any process was asked to stop; all of them stop at the same step."""
    persist: Persist


def train(config: Config) -> int:
    """Train as the config says, or carry on where its run folder stopped. Returns the exit code."""
    folder = open_folder(config.run.dir)
    with started(config, folder) as (pool, asked):
        config = with_type_of(folder, with_date(config, folder / "config.yaml"))
        progress = Progress(config.log.progress and processes.is_primary(), quiet=not processes.is_primary())
        setup = prepare(config, pool=pool, say=progress.say)
        # What followed the machine is written down, but for the mesh, which a resumed run may lay out anew.
        return _train(dataclasses.replace(setup.config, mesh=config.mesh), setup, folder, progress, asked)


def _train(config: Config, setup: Setup, folder: Path, progress: Progress, asked: Callable[[], bool]) -> int:
    def stop() -> bool:
        return processes.any_process(asked())

    if stop():
        progress.say("stopped before anything was begun; the same command begins again")
        return 0
    if config.run.start_over and processes.is_primary() and (aside := history.start_over(folder)):
        progress.say(f"run.start_over: what was in {folder} is in {aside}; leave this flag out to carry on from now on")
    processes.wait_for_all("start over")
    persist = Persist(config.checkpoint.on_error, config.checkpoint.retry_minutes, progress.say, asked)
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(folder / "checkpoints", config.checkpoint, progress.say, asked) as checkpoints,
    ):
        run = _Run(setup, config, folder, checkpoints, progress, stop, persist)
        early_check(setup, folder, checkpoints)
        if not checkpoints.steps() and processes.is_primary():
            history.refuse_lost(folder)
        processes.wait_for_all("config")
        finished = _summarised(run) and checkpoints.steps()[-1:] == [config.run.steps]
        # A GPU's compiler times kernels on the device, where nothing else should run then.
        alone = setup.mesh.devices.flat[0].platform == "gpu"
        totals = RunAccounting()
        with compiling(setup, at_once=not (finished or alone)) as compiled:
            begun = _begin(run, totals)
            if begun is None:
                return 0
            state, totals = begun
            if int(state.step) == config.run.steps and _summarised(run):
                progress.say(f"{folder} is finished; choose another --run.dir to train again, or a larger --run.steps")
                show_summary(config, folder, progress)
                return 0
            with totals.phase("compile"):
                programs = compiled(progress)
        try:
            return _loop(run, state, programs, totals)
        except StorageError as error:
            there = whole_ones(saved_steps(checkpoints.folder))
            raise error if there in str(error) else StorageError(f"{error}; {there}") from error


def _summarised(run: _Run) -> bool:
    """Whether the run has ended with so many steps; all processes find the same."""
    found = read_summary(run.folder) if processes.is_primary() else None
    return processes.any_process(found is not None and found["steps"] == run.config.run.steps)


def _begin(run: _Run, totals: RunAccounting) -> tuple[TrainState, RunAccounting] | None:
    """The newest checkpoint's state and accounting, or the first; None if it was to stop during the cold start.

    config.yaml is written when the checkpoint has agreed to these settings, and not before.
    """
    setup, folder, progress = run.setup, run.folder, run.progress
    restored = restore(setup, folder, run.checkpoints, progress)
    changed = [] if restored is None else restored.changes
    if processes.is_primary():
        if not history.config_is_whole(folder):
            progress.say(f"{folder / 'config.yaml'}: is damaged; it is written anew")
        step = 0 if restored is None else int(restored.state.step)
        run.persist(lambda: _note(run, step, changed))
    if restored is not None:
        return restored.state, restored.totals
    first = first_params(setup, folder, progress, run.stop, totals.phase)
    if first.params is None:
        return None
    progress.say(_describe(setup, first.origin))
    if setup.config.algorithm.variant == "published_code":
        progress.say(
            "algorithm.variant=published_code: advantages and loss weights have the defects of PSPO's published code "
            "(docs/algorithms.md); for parity studies only"
        )
    return place_state(setup, first.params, first.frozen), totals


def _note(run: _Run, step: int, changed: list[history.Change]) -> None:
    """What the run is from here on: its changes, the prompts' hashes, config.yaml."""
    for line in history.record(run.folder, step, changed):
        run.progress.say(line)
    with writing(run.folder):
        save_content(run.setup, run.folder)
        left_out = write_left_out(run.setup.task, run.folder / "left_out.jsonl")
    if left_out:
        run.progress.say(left_out)
    history.write_config(run.folder, run.config)


def _describe(setup: Setup, origin: str) -> str:
    """A line on the policy's size, and how it trains."""
    trained = sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    frozen = sum(x.size for x in jax.tree.leaves(setup.abstract.frozen))
    line = f"model: {trained + frozen:,} parameters, {origin}"
    if frozen:
        line += f"; {trained:,} of adapters train"
    elif setup.config.model.param_dtype == "bfloat16":
        line += (
            "; held in bfloat16, where updates below 1/512 of a weight are lost: model.param_dtype float32 keeps them"
        )
    return line


def _loop(run: _Run, state: TrainState, programs: Programs, totals: RunAccounting) -> int:
    setup, folder, checkpoints, progress, c = run.setup, run.folder, run.checkpoints, run.progress, run.setup.config
    first = int(state.step)
    console = progress.console if c.log.progress else None
    log = RunLog(
        folder,
        first,
        c.log.tensorboard,
        console,
        processes.is_primary(),
        run.persist,
        progress.say,
        totals.counts["strategy_lines"],
    )
    base = named_checksums(state.frozen)

    def save(state: TrainState, done: int, scores: dict[str, float] | None = None) -> None:
        checkpoints.save(done, buffer_to_device(setup, state).to_save(), _metadata(setup, done, base, totals), scores)

    def stopped(why: str) -> int:
        checkpoints.wait()
        progress.say(f"{why}; checkpoints {checkpoints.steps()} are from before")
        return 1

    scores = _before_training(run, state, programs, totals, log, save) if first == 0 else {}
    if run.stop():
        return _stopped(run, first)
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
                seen = processes.to_host(programs.summary(state.selector, state.step))
                values |= {name: float(value) for name, value in seen.items() if not isinstance(value, dict)}
                histograms = {name: value for name, value in seen.items() if isinstance(value, dict)}
                log.strategy(done, histograms)
                totals.counts["strategy_lines"] += bool(histograms)
            log.metrics(done, values)
            if values["skipped_updates"] >= c.optimizer.max_skipped:
                return stopped(
                    f"stopped: {int(values['skipped_updates'])} updates in a row up to step {done} were not finite; "
                    "lower optimizer.learning_rate"
                )
            stopping = not last and run.stop()
            # One process reports a save that failed at once; several do at the next save, which all of them make.
            late = processes.process_count() == 1 and checkpoints.failed()
            if evaluated or stopping or late or done % c.checkpoint.every == 0:
                save(state, done, scores if evaluated else None)
            bar(1, _numbers(values))
            if stopping:
                return _stopped(run, done)
    checkpoints.wait()
    scores = scores or heldout_scores(setup, state, programs, totals, log)
    return _finish(run, totals, scores)


def _metadata(setup: Setup, done: int, base: dict[str, int], totals: RunAccounting) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    return {
        "step": done,
        "config": history.settings(setup.config),
        "dataset": setup.task.train.fingerprint(),
        "heldout": setup.task.heldout.fingerprint(),
        "source": source_fingerprint(setup),
        "base": base,
        "totals": totals.save(),
    }


def _before_training(
    run: _Run,
    state: TrainState,
    programs: Programs,
    totals: RunAccounting,
    log: RunLog,
    save: Callable[[TrainState, int], None],
) -> dict[str, float]:
    """Save and evaluate step 0; its scores, if it has not been evaluated already.

    From step 1 on there is thus always a checkpoint to carry on from.
    """
    save(state, 0)
    scores: dict[str, float] = {}
    if not run.stop() and not processes.any_process(processes.is_primary() and log.begun()):
        scores = heldout_scores(run.setup, state, programs, totals, log)
        log.metrics(0, {"rollouts/total": 0, "num_tokens": 0, **_eval_names(scores)})
        run.progress.say(f"before training: greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}")
    run.checkpoints.wait()
    return scores


def _stopped(run: _Run, done: int) -> int:
    """The end of a run that was asked to stop; the exit code."""
    run.checkpoints.wait()
    run.progress.say(f"stopped after step {done}, saved; the same command carries on")
    return 0


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


def _finish(run: _Run, totals: RunAccounting, scores: dict[str, float]) -> int:
    """summary.json and report.html, then the table."""
    setup, folder, progress = run.setup, run.folder, run.progress
    seconds = {**totals.seconds, "total": totals.total()}
    seconds["setup"] = max(seconds["total"] - sum(totals.seconds.values()), 0.0)
    summary = {
        "eval": scores,
        "steps": setup.config.run.steps,
        "rollouts": totals.counts["rollouts"],
        "tokens": totals.counts["generated"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if not processes.is_primary():
        return 0
    run.persist(lambda: write_json(folder / "summary.json", summary))
    if setup.config.log.report:
        run.persist(lambda: progress.say(f"report: {write_report([folder], folder / 'report.html')}"))
    show_summary(setup.config, folder, progress)
    return 0


def show_summary(config: Config, folder: Path, progress: Progress) -> None:
    """The table at the end of a run, from its summary.json."""
    summary = read_summary(folder)
    if summary is None:
        return
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
