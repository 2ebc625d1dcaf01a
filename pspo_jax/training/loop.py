"""The outer loop: steps, evaluations, checkpoints, logs. `train` runs it for programs and for the command alike."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax

from pspo_jax.arrays.state import TrainState
from pspo_jax.checkpoint.metadata import Metadata
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.plugins import is_plugin
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate
from pspo_jax.data.task import Task
from pspo_jax.data.text import write_left_out
from pspo_jax.distributed import processes
from pspo_jax.reporting.page import write_report
from pspo_jax.rewards.own_task import RewardFunction
from pspo_jax.runs import history
from pspo_jax.runs.access import read_summary
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.home import home_of, shown
from pspo_jax.runs.mirror import Mirror, mirrored
from pspo_jax.runs.run_date import with_date
from pspo_jax.runs.run_folder import RunLog, open_folder, with_type_of, write_json
from pspo_jax.runs.verdicts import NoVerdictError
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist, StorageError, writing
from pspo_jax.training.compile import Programs, compiling
from pspo_jax.training.first_params import first_params
from pspo_jax.training.host_step import StepContext, Values, buffer_to_device, heldout_scores, one_step
from pspo_jax.training.resume import early_check, held_checksums, restore, save_content, source_fingerprint
from pspo_jax.training.setup import Setup, place_state, prepare, started


class NotFiniteError(Exception):
    """optimizer.max_skipped updates in a row were not finite; the message says up to which step."""


class Callback(Protocol):
    """A function of the caller's that the loop calls after each step."""

    def __call__(self, step: int, metrics: dict[str, float | int], /) -> bool | None:
        """True asks the run to stop; it is saved then. `metrics` is the step's line of metrics.jsonl."""


class TrainResult(NamedTuple):
    """The end of a call of `train`."""

    step: int
    """Training steps done, all of them saved."""
    finished: bool
    """Whether run.steps are done; False = the run was asked to stop, and another call carries on."""
    scores: dict[str, float]
    """Held-out `greedy` and `sampled` accuracy and `no_verdict` share at that step; empty if it was not evaluated."""
    folder: Path
    """The run folder; for a run in a bucket, the working folder that stands for it on this machine."""
    state: TrainState | None
    """The train state on the devices; None if the run stopped before it had one."""


class _Run(NamedTuple):
    """The parts of a run that its functions share."""

    setup: Setup
    config: Config
    """The config that config.yaml keeps: `setup.config` with the mesh as it was given."""
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    stop: Callable[[], bool]
    """Says whether any process was asked to stop; all of them stop at the same step."""
    persist: Persist
    callbacks: Sequence[Callback]
    as_command: bool
    """Whether the run prints; False = it logs."""
    mirror: Mirror | None
    """Mirror that copies the folder's small files to the bucket that it stands for; None if it stands for none."""

    def copy_files(self) -> None:
        """Copy the folder's small files to the bucket, if the run is in one; raises StorageError as `persist` does."""
        if self.mirror is not None:
            self.persist(self.mirror.push)


class _End(NamedTuple):
    """The end of the loop: a result, or the error that ended it on all processes alike."""

    result: TrainResult
    error: NoVerdictError | NotFiniteError | None = None


def train(
    config: Config,
    task: Task | None = None,
    reward: RewardFunction | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    as_command: bool = False,
) -> TrainResult:
    """Train as the config says, or carry on where its run folder stopped.

    This is the loop of `python -m pspo_jax.train`, with the same files in `config.run.dir`. It prints nothing: lines go
    to the logger "pspo_jax", on level INFO. Of the process it changes what JAX and Orbax keep there: XLA's flags and
    compilation cache (run.compilation_cache=off leaves the cache alone), and the log level of Orbax. Where a run has
    several processes, an exception in one of them ends all of them.

    Args:
      config: as `pspo_jax.replace` makes it; fields that nobody set follow the task and the algorithm.
      task: a task of the caller's own, such as `pspo_jax.own_task` makes; None = the one that the config names.
      reward: a function (completions, gold answers) -> floats that takes the place of the task's reward; None = the
        task's. It is called in this process.
      callbacks: are called after each step with (step, metrics); True asks the run to stop.
      as_command: whether to print lines and progress, and to stop on SIGINT, SIGTERM and SIGHUP, as the command does.
        False leaves signal handlers alone.
    Raises:
      ConfigError: the config is refused, or the folder holds a run that it cannot carry on.
      StorageError: files cannot be read or written now; another call carries on.
      NoVerdictError: more completions than verifier.max_no_verdict have no verdict.
      NotFiniteError: optimizer.max_skipped updates in a row were not finite.
    """
    config = _checked(config, task, reward)
    folder = open_folder(config.run.dir)
    # Before the processes have joined, each one prints; afterwards the leading one alone.
    say = None if as_command else Progress(enabled=False, quiet=True).say
    verify = task is None and reward is None
    with (
        started(config, folder, say, signals=as_command, verify=verify) as (pool, asked),
        mirrored(folder, say or Progress(config.log.progress).say, processes.is_primary()) as mirror,
    ):
        config = with_type_of(folder, with_date(config, folder / "config.yaml"))
        shown = as_command and processes.is_primary()
        progress = Progress(config.log.progress and shown, quiet=not shown)
        setup = prepare(config, pool=pool, say=progress.say, task=task, reward=reward)
        # What followed the machine is written down, but for the mesh, which a resumed run may lay out anew.
        kept = dataclasses.replace(setup.config, mesh=config.mesh)
        end = _train(kept, setup, folder, progress, asked, callbacks, as_command, mirror)
    if end.error is not None:
        raise end.error
    return end.result


def _checked(config: Config, task: Task | None, reward: RewardFunction | None) -> Config:
    """The resolved config; ConfigError if it is refused, or asks for what the caller's functions replace."""
    if task is not None:
        config = replace(config, {"task.name": "own"})
    if reward is not None and config.reward.terms.strip() != Config().reward.terms:
        raise ConfigError(
            f"reward.terms={config.reward.terms!r}: the function given to train takes its place; leave one of them out"
        )
    validate(config)
    return resolve(config)


def _train(
    config: Config,
    setup: Setup,
    folder: Path,
    progress: Progress,
    asked: Callable[[], bool],
    callbacks: Sequence[Callback],
    as_command: bool,
    mirror: Mirror | None,
) -> _End:
    def stop() -> bool:
        return processes.any_process(asked())

    nothing = _End(TrainResult(0, False, {}, folder, None))
    if stop():
        progress.say("stopped before anything was begun; the same command begins again")
        return nothing
    home = home_of(folder)
    if config.run.start_over and processes.is_primary() and (aside := history.start_over(home)):
        progress.say(f"run.start_over: what was in {home} is in {aside}; leave this flag out to carry on from now on")
        if mirror is not None:
            mirror.pull()
    processes.wait_for_all("start over")
    persist = Persist(config.checkpoint.on_error, config.checkpoint.retry_minutes, progress.say, asked)
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(home / "checkpoints", config.checkpoint, progress.say, asked) as checkpoints,
    ):
        run = _Run(setup, config, folder, checkpoints, progress, stop, persist, callbacks, as_command, mirror)
        early_check(setup, folder, checkpoints)
        if not checkpoints.steps() and processes.is_primary():
            history.refuse_lost(folder)
        processes.wait_for_all("config")
        finished = _is_finished(run) and checkpoints.steps()[-1:] == [config.run.steps]
        # A GPU's compiler times kernels on the device, where nothing else should run then.
        alone = setup.mesh.devices.flat[0].platform == "gpu"
        totals = RunAccounting()
        with compiling(setup, at_once=not (finished or alone)) as compiled:
            begun = _begin(run, totals)
            if begun is None:
                return nothing
            state, totals = begun
            if int(state.step) == config.run.steps and _is_finished(run):
                return _finished_before(run, state)
            with totals.phase("compile"):
                programs = compiled(progress)
        try:
            end = _loop(run, state, programs, totals)
            run.copy_files()
            return end
        except StorageError as error:
            there = checkpoints.whole()
            raise error if there in str(error) else StorageError(f"{error}; {there}") from error


def _is_finished(run: _Run) -> bool:
    """Whether the run has ended after so many steps; all processes find the same."""
    found = read_summary(run.folder) if processes.is_primary() else None
    return processes.any_process(found is not None and found["steps"] == run.config.run.steps)


def _finished_before(run: _Run, state: TrainState) -> _End:
    """The end of a run that had been finished by an earlier call."""
    folder = run.folder
    run.progress.say(
        f"{shown(folder, folder)} is finished; choose another --run.dir to train again, or a larger --run.steps"
    )
    show_summary(run.config, folder, run.progress)
    summary = read_summary(folder)
    scores = {} if summary is None else {name: float(value) for name, value in summary["eval"].items()}
    return _End(TrainResult(int(state.step), True, scores, folder, state))


def _begin(run: _Run, totals: RunAccounting) -> tuple[TrainState, RunAccounting] | None:
    """The newest checkpoint's state and accounting, or the first; None if a stop was asked for during the cold start.

    config.yaml is written once the checkpoint has agreed to these settings, and not before.
    """
    setup, folder, progress = run.setup, run.folder, run.progress
    restored = restore(setup, folder, run.checkpoints, progress)
    changed = [] if restored is None else restored.changes
    if processes.is_primary():
        if not history.config_is_whole(folder):
            progress.say(f"{shown(folder / 'config.yaml', folder)}: is damaged; it is written anew")
        step = 0 if restored is None else int(restored.state.step)
        run.persist(lambda: _record_start(run, step, changed))
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
    return place_state(setup, first.params, first.frozen, progress), totals


def _record_start(run: _Run, step: int, changed: list[history.Change]) -> None:
    """Record what the run is from here on: changed settings, the prompts' hashes, left-out rows, config.yaml."""
    for line in history.record(run.folder, step, changed):
        run.progress.say(line)
    with writing(run.folder):
        save_content(run.setup, run.folder)
        left_out = write_left_out(run.setup.task, run.folder / "left_out.jsonl")
    if left_out:
        run.progress.say(left_out)
    history.write_config(run.folder, run.config)


def _describe(setup: Setup, origin: str) -> str:
    """A line on the model's size, and how it trains."""
    trained = sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    frozen = sum(x.size for x in jax.tree.leaves(setup.abstract.frozen))
    line = f"model: {trained + frozen:,} parameters, {origin}"
    if frozen:
        line += f"; {trained:,} of {'adapters' if setup.architecture.lora is not None else 'them'} train"
    elif setup.config.model.param_dtype == "bfloat16":
        line += (
            "; held in bfloat16, where updates below 1/512 of a weight are lost: model.param_dtype float32 keeps them"
        )
    return line


class _Session(NamedTuple):
    """A run whose programs are compiled and whose logs are open."""

    run: _Run
    context: StepContext
    held: Metadata
    """Checksums of the weights that checkpoints leave out."""

    def save(self, state: TrainState, done: int, scores: dict[str, float] | None = None) -> None:
        """Start to save step `done`; for a run in a bucket, after its logs up to that step are copied there."""
        self.run.copy_files()
        setup, totals = self.run.setup, self.context.totals
        metadata: Metadata = {
            "step": done,
            "config": history.settings(setup.config),
            "dataset": setup.task.train.fingerprint(),
            "heldout": setup.task.heldout.fingerprint(),
            "source": source_fingerprint(setup),
            **self.held,
            "totals": totals.save(),
        }
        self.run.checkpoints.save(done, buffer_to_device(setup, state).to_save(), metadata, scores)


def _loop(run: _Run, state: TrainState, programs: Programs, totals: RunAccounting) -> _End:
    """Steps up to run.steps, or until a stop is asked for."""
    first, config = int(state.step), run.setup.config
    session = _open_session(run, state, programs, totals)
    scores = _before_training(session, state) if first == 0 else {}
    if run.stop():
        return _stopped(run, state, first, scores)
    with run.progress.phase("step", config.run.steps, first) as bar:
        for done in range(first + 1, config.run.steps + 1):
            try:
                state, values = one_step(session.context, state, done)
            except NoVerdictError as error:
                return _failed(run, state, done - 1, error)
            last = done == config.run.steps
            evaluates = last or bool(config.eval.every and done % config.eval.every == 0)
            scores = heldout_scores(session.context, state) if evaluates else {}
            values = _log_step(session, state, done, values, scores)
            if values["skipped_updates"] >= config.optimizer.max_skipped:
                return _failed(run, state, done, _not_finite(values, done))
            stopping = _asked_by(run.callbacks, done, values)
            stopping = not last and (stopping or run.stop())
            # One process reports a save that failed at once; several do at the next save, which all of them make.
            late = processes.process_count() == 1 and run.checkpoints.failed()
            if evaluates or stopping or late or done % config.checkpoint.every == 0:
                session.save(state, done, scores if evaluates else None)
            bar(1, _numbers(values))
            if stopping:
                return _stopped(run, state, done, scores)
    run.checkpoints.wait()
    scores = scores or heldout_scores(session.context, state)
    return _finish(run, state, totals, scores)


def _print_warning(text: str) -> None:
    print(text, file=sys.stderr)


def _open_session(run: _Run, state: TrainState, programs: Programs, totals: RunAccounting) -> _Session:
    config = run.setup.config
    log = RunLog(
        run.folder,
        int(state.step),
        config.log.tensorboard,
        run.progress.console if config.log.progress and run.as_command else None,
        processes.is_primary(),
        run.persist,
        run.progress.say,
        totals.counts["strategy_lines"],
        _print_warning if run.as_command else logging.getLogger("pspo_jax").warning,
    )
    return _Session(run, StepContext(run.setup, programs, totals, log), held_checksums(state))


def _log_step(session: _Session, state: TrainState, done: int, values: Values, scores: dict[str, float]) -> Values:
    """Log a step's metrics, with its held-out scores and, where it is due, the selector's summary; returns them all."""
    config, (_, programs, totals, log) = session.run.setup.config, session.context
    values = values | _eval_names(scores)
    if done == config.run.steps or (config.log.selection_every and done % config.log.selection_every == 0):
        summary = processes.to_host(programs.summary(state.selector, state.step))
        values |= {name: float(value) for name, value in summary.items() if not isinstance(value, dict)}
        histograms = {name: value for name, value in summary.items() if isinstance(value, dict)}
        log.strategy(done, histograms)
        totals.counts["strategy_lines"] += bool(histograms)
    log.metrics(done, values)
    return values


def _asked_by(callbacks: Sequence[Callback], done: int, values: Values) -> bool:
    """Call all callbacks; whether any of them, on any process, asks to stop."""
    if not callbacks:
        return False
    answers = [callback(done, dict(values)) for callback in callbacks]
    return processes.any_process(any(answers))


def _not_finite(values: Values, done: int) -> NotFiniteError:
    return NotFiniteError(
        f"stopped: {int(values['skipped_updates'])} updates in a row up to step {done} were not finite; "
        "lower optimizer.learning_rate"
    )


def _before_training(session: _Session, state: TrainState) -> dict[str, float]:
    """Save and evaluate step 0; its scores, or none if it has been evaluated before or a stop is asked for.

    From step 1 on there is thus always a checkpoint to carry on from.
    """
    run, log = session.run, session.context.log
    session.save(state, 0)
    scores: dict[str, float] = {}
    if not run.stop() and not processes.any_process(processes.is_primary() and log.begun()):
        scores = heldout_scores(session.context, state)
        log.metrics(0, {"rollouts/total": 0, "num_tokens": 0, **_eval_names(scores)})
        run.progress.say(f"before training: greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}")
    run.checkpoints.wait()
    return scores


def _stopped(run: _Run, state: TrainState, done: int, scores: dict[str, float]) -> _End:
    """The end of a run that was asked to stop."""
    run.checkpoints.wait()
    run.progress.say(f"stopped after step {done}, saved; the same command carries on")
    return _End(TrainResult(done, False, scores, run.folder, state))


def _failed(run: _Run, state: TrainState, done: int, error: NoVerdictError | NotFiniteError) -> _End:
    """The end of a run that cannot go on as it is."""
    run.checkpoints.wait()
    message = f"{error}; checkpoints {run.checkpoints.steps()} are from before"
    run.progress.say(message)
    return _End(TrainResult(done, False, {}, run.folder, state), type(error)(message))


def _eval_names(scores: dict[str, float]) -> Values:
    return {f"eval/{name}": value for name, value in scores.items()}


def _numbers(values: Values) -> str:
    """The line beside the progress bar."""
    rate = f"{1 / values['step_time']:.1f} steps/s"
    if "reward" not in values:
        return f"enough groups were waiting, nothing was rolled out  {rate}"
    return (
        f"reward {values['reward']:.3f}  effective {values['groups/effective']:.0f}  "
        f"{values['tokens_per_second']:,.0f} tok/s  {rate}"
    )


def _finish(run: _Run, state: TrainState, totals: RunAccounting, scores: dict[str, float]) -> _End:
    """Write summary.json and report.html, then show the table."""
    setup, folder, progress = run.setup, run.folder, run.progress
    end = _End(TrainResult(setup.config.run.steps, True, scores, folder, state))
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
        return end
    run.persist(lambda: write_json(folder / "summary.json", summary))
    if setup.config.log.report:
        run.persist(lambda: progress.say(f"report: {shown(write_report([folder], folder / 'report.html'), folder)}"))
    show_summary(setup.config, folder, progress)
    return end


def show_summary(config: Config, folder: Path, progress: Progress) -> None:
    """Show the table at the end of a run, from its summary.json."""
    summary = read_summary(folder)
    if summary is None:
        return
    scores = summary["eval"]
    labels = [name.removeprefix("greedy/") for name in scores if name.startswith("greedy/")]
    resolved = resolve(config)
    own = [
        str(name)
        for name in (resolved.selection.name, resolved.advantage.name, resolved.loss.surrogate)
        if is_plugin(str(name))
    ]
    scores = summary["eval"]
    labels = [name.removeprefix("greedy/") for name in scores if name.startswith("greedy/")]
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items())
    progress.table(
        f"{' with '.join([config.algorithm.name, *own])} on {config.task.name}, {summary['steps']} steps",
        [
            ("held-out greedy", f"{scores['greedy']:.3f}"),
            ("held-out sampled", f"{scores['sampled']:.3f}"),
            *(
                [("with other images, greedy", f"{scores['greedy_other_images']:.3f}")]
                if "greedy_other_images" in scores
                else []
            ),
            *[
                (f"{x}, greedy / sampled", f"{scores[f'greedy/{x}']:.3f} / {scores[f'sampled/{x}']:.3f}")
                for x in labels
            ],
            ("rollouts", f"{summary['rollouts']:,}"),
            ("tokens generated", f"{summary['tokens']:,}"),
            ("seconds", seconds),
        ],
    )
