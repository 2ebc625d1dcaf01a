"""The outer loop: steps, evaluations, checkpoints, logs. `train` runs it for programs and for the command alike."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from pspo_jax.arrays.state import TrainState
from pspo_jax.checkpoint.metadata import Metadata
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import parse_loggers
from pspo_jax.config.validation import validate
from pspo_jax.data.task import Task
from pspo_jax.data.text import write_left_out
from pspo_jax.distributed import processes
from pspo_jax.rewards.own_task import RewardFunction
from pspo_jax.runs import history
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.home import home_of, shown
from pspo_jax.runs.loggers.opening import check_loggers, check_packages, senders
from pspo_jax.runs.mirror import Mirror, mirrored
from pspo_jax.runs.run_date import with_date
from pspo_jax.runs.run_folder import RunLog, open_folder, with_type_of
from pspo_jax.runs.verdicts import NoVerdictError
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist, StorageError, writing
from pspo_jax.system.time_limit import TimeLimit
from pspo_jax.training.compile import Programs, compiling
from pspo_jax.training.first_params import first_params
from pspo_jax.training.host_step import StepContext, Values, buffer_to_device, heldout_scores, one_step
from pspo_jax.training.image_table import with_embeddings
from pspo_jax.training.profiling import profiled
from pspo_jax.training.resume import early_check, held_checksums, restore, save_content, source_fingerprint
from pspo_jax.training.run_end import (
    Callback,
    End,
    NotFiniteError,
    Run,
    TrainResult,
    ended_early,
    failed,
    finish,
    finished_before,
    is_finished,
    stop_reason,
    stopped,
    stopped_before,
)
from pspo_jax.training.setup import Setup, place_state, prepare, started


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
    limit = TimeLimit(config.run.hours)
    with (
        started(config, folder, say, signals=as_command, verify=verify) as (pool, asked),
        mirrored(folder, say or Progress(config.log.progress).say, processes.is_primary()) as mirror,
    ):
        config = with_type_of(folder, with_date(config, folder / "config.yaml"))
        shown = as_command and processes.is_primary()
        progress = Progress(config.log.progress and shown, quiet=not shown)
        if processes.is_primary():
            check_loggers(config)
        setup = prepare(config, pool=pool, say=progress.say, task=task, reward=reward)
        # What followed the machine is written down, but for the mesh, which a resumed run may lay out anew.
        kept = dataclasses.replace(setup.config, mesh=config.mesh)
        end = _train(kept, setup, folder, progress, asked, limit, callbacks, as_command, mirror)
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
    check_packages(config)
    return resolve(config)


def _train(
    config: Config,
    setup: Setup,
    folder: Path,
    progress: Progress,
    asked: Callable[[], bool],
    limit: TimeLimit,
    callbacks: Sequence[Callback],
    as_command: bool,
    mirror: Mirror | None,
) -> End:
    def stop() -> bool:
        return asked() or limit.over()

    if processes.any_process(stop()):
        line = "stopped before anything was begun; the same command begins again"
        return stopped_before(folder, progress, stop_reason(asked, limit), line)
    home = home_of(folder)
    if config.run.start_over and processes.is_primary() and (aside := history.start_over(home)):
        progress.say(f"run.start_over: what was in {home} is in {aside}; leave this flag out to carry on from now on")
        if mirror is not None:
            mirror.pull()
    processes.wait_for_all("start over")
    persist = Persist(config.checkpoint.on_error, config.checkpoint.retry_minutes, progress.say, stop)
    with (
        jax.set_mesh(setup.mesh),
        Checkpoints(home / "checkpoints", config.checkpoint, progress.say, stop) as checkpoints,
    ):
        run = Run(setup, config, folder, checkpoints, progress, asked, limit, persist, callbacks, as_command, mirror)
        early_check(setup, folder, checkpoints)
        if not checkpoints.steps() and processes.is_primary():
            history.refuse_lost(folder)
        processes.wait_for_all("config")
        # A GPU's compiler times kernels on the device, where nothing else should run then.
        alone = setup.mesh.devices.flat[0].platform == "gpu"
        totals = RunAccounting()
        with compiling(setup, at_once=not (_is_at_its_end(run) or alone)) as compiled:
            begun = _begin(run, totals)
            if begun is None:
                return stopped_before(folder, progress, stop_reason(asked, limit))
            state, totals = begun
            if _is_at_its_end(run):
                return finished_before(run, state)
            filled = with_embeddings(setup, state, progress, run.stop)
            if filled is None and checkpoints.steps():
                return stopped(run, state, int(state.step), {})
            if filled is None:
                return stopped_before(folder, progress, stop_reason(asked, limit))
            run = run._replace(setup=filled)
            with totals.phase("compile"):
                programs = compiled(progress)
        try:
            end = _loop(run, state, programs, totals)
            run.copy_files()
            return end
        except StorageError as error:
            there = checkpoints.whole()
            raise error if there in str(error) else StorageError(f"{error}; {there}") from error


def _is_at_its_end(run: Run) -> bool:
    """Whether an earlier call has finished the run, at the step of the newest checkpoint."""
    step = max(run.checkpoints.steps(), default=-1)
    return is_finished(run, step) and (step == run.config.run.steps or ended_early(run, step) is not None)


def _begin(run: Run, totals: RunAccounting) -> tuple[TrainState, RunAccounting] | None:
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


def _record_start(run: Run, step: int, changed: list[history.Change]) -> None:
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

    run: Run
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


def _loop(run: Run, state: TrainState, programs: Programs, totals: RunAccounting) -> End:
    """Steps up to run.steps or to the end by a field of `eval`, or until the run is to stop."""
    session, finished = _open_session(run, state, programs, totals), False
    try:
        end = _steps(session, state)
        finished = end.result.finished
        return end
    finally:
        session.context.log.close(finished)


def _steps(session: _Session, state: TrainState) -> End:
    """The steps of `_loop`, and the end that follows them."""
    run, totals, log = session.run, session.context.totals, session.context.log
    first, config = int(state.step), run.setup.config
    run.limit.lap_begins()
    scores = _before_training(session, state) if first == 0 else {}
    run.limit.lap(run.checkpoints.slowest)
    early = ended_early(run, first)
    if early is None and run.stop():
        return stopped(run, state, first, scores)
    steps = range(first + 1, config.run.steps + 1) if early is None else ()
    with run.progress.phase("step", config.run.steps, first) as bar, profiled(run, first + 1) as profile:
        for done in steps:
            try:
                with profile.step(done):
                    state, values = one_step(session.context, state, done, profile.update)
            except NoVerdictError as error:
                return failed(run, state, done - 1, error)
            last = done == config.run.steps
            evaluates = last or bool(config.eval.every and done % config.eval.every == 0)
            scores = heldout_scores(session.context, state) if evaluates else {}
            values = _log_step(session, state, done, values, scores)
            if values["skipped_updates"] >= config.optimizer.max_skipped:
                return failed(run, state, done, _not_finite(values, done))
            early = ended_early(run, done) if evaluates and not last else None
            stopping = _asked_by(run.callbacks, done, values)
            run.limit.lap(run.checkpoints.slowest)
            stopping = not last and early is None and (stopping or run.stop())
            # One process reports a save that failed at once; several do at the next save, which all of them make.
            late = processes.process_count() == 1 and run.checkpoints.failed()
            if evaluates or stopping or late or done % config.checkpoint.every == 0:
                session.save(state, done, scores if evaluates else None)
            bar(1, _numbers(values))
            if stopping:
                return stopped(run, state, done, scores)
            if early is not None:
                break
    run.checkpoints.wait()
    scores = scores or heldout_scores(session.context, state)
    return finish(run, state, totals, log, scores, early)


def _print_warning(text: str) -> None:
    print(text, file=sys.stderr)


def _open_session(run: Run, state: TrainState, programs: Programs, totals: RunAccounting) -> _Session:
    config = run.setup.config
    log = RunLog(
        run.folder,
        int(state.step),
        "tensorboard" in parse_loggers(config.log.to),
        run.progress.console if config.log.progress and run.as_command else None,
        processes.is_primary(),
        run.persist,
        run.progress.say,
        totals.counts["strategy_lines"],
        _print_warning if run.as_command else logging.getLogger("pspo_jax").warning,
        senders(config, run.folder, run.progress.say) if processes.is_primary() else (),
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
