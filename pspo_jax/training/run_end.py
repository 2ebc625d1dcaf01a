"""How a run ends: what ended it, its summary and report, and what `train` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

from pspo_jax.arrays.state import TrainState
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.plugins import is_plugin
from pspo_jax.config.presets import resolve
from pspo_jax.config.run_stages import EvalConfig
from pspo_jax.config.schema import Config
from pspo_jax.distributed import processes
from pspo_jax.reporting.page import write_report
from pspo_jax.reporting.priorities import write_priorities
from pspo_jax.runs.access import metrics_of, read_summary
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.runs.home import shown
from pspo_jax.runs.loggers.opening import senders
from pspo_jax.runs.loggers.sender import Sender, end_all
from pspo_jax.runs.mirror import Mirror
from pspo_jax.runs.run_folder import RunLog, write_json
from pspo_jax.runs.verdicts import NoVerdictError
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import Persist
from pspo_jax.system.time_limit import TimeLimit
from pspo_jax.training.setup import Setup

EndedBy = Literal["run.steps", "eval.target", "eval.patience", "run.hours", "request", "error"]
OUT_OF_TIME = 75
"""Exit code of a run that run.hours has stopped: that of a failure for now, EX_TEMPFAIL."""


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
    """Whether the run is at its end: run.steps are done, or eval.target or eval.patience has ended it; False = it was
    stopped, and another call carries on."""
    scores: dict[str, float]
    """Held-out `greedy` and `sampled` accuracy and `no_verdict` share at that step; empty if it was not evaluated."""
    folder: Path
    """The run folder; for a run in a bucket, the working folder that stands for it on this machine."""
    state: TrainState | None
    """The train state on the devices; None if the run stopped before it had one."""
    ended_by: EndedBy
    """The field that ended the run; request = a signal or a callback did."""


class Run(NamedTuple):
    """The parts of a run that its functions share."""

    setup: Setup
    config: Config
    """The config that config.yaml keeps: `setup.config` with the mesh as it was given."""
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    asked: Callable[[], bool]
    """Says whether any process was asked to stop; all of them stop at the same step."""
    limit: TimeLimit
    persist: Persist
    callbacks: Sequence[Callback]
    as_command: bool
    """Whether the run prints; False = it logs."""
    mirror: Mirror | None
    """Mirror that copies the folder's small files to the bucket that it stands for; None if it stands for none."""

    def stop(self) -> bool:
        """Whether the run is to stop: any process was asked to, or run.hours are nearly over."""
        return processes.any_process(self.asked() or self.limit.over())

    def copy_files(self) -> None:
        """Copy the folder's small files to the bucket, if the run is in one; raises StorageError as `persist` does."""
        if self.mirror is not None:
            self.persist(self.mirror.push)


class End(NamedTuple):
    """The end of the loop: a result, or the error that ended it on all processes alike."""

    result: TrainResult
    error: NoVerdictError | NotFiniteError | None = None


def early_end(config: EvalConfig, scores: Sequence[tuple[int, float | None]]) -> str | None:
    """A clause on the field of `eval` that ends a run after these evaluations, such as "eval.target=0.9: ..."; or None.

    Args:
      scores: (step, greedy accuracy) of every evaluation, in their order; None or NaN = no completion had a verdict.
    """
    best, best_step, since = -math.inf, 0, 0
    for step, score in scores:
        if score is not None and score > best:
            best, best_step, since = score, step, 0
        else:
            since += 1
    if config.target is not None and best >= config.target:
        return f"eval.target={config.target:g}: the greedy accuracy was {best:.4g} at step {best_step}"
    if config.patience and since >= config.patience:
        found = "no evaluation had a verdict" if best == -math.inf else f"the best, {best:.4g}, was at step {best_step}"
        return f"eval.patience={config.patience}: the greedy accuracy has not risen for {since} evaluations; {found}"
    return None


def ended_early(run: Run, step: int) -> str | None:
    """`early_end` of the evaluations up to a step that the run's metrics.jsonl holds; all processes find the same."""
    config = run.setup.config.eval
    if config.target is None and not config.patience:
        return None
    found = None
    if processes.is_primary():
        lines = [line for line in metrics_of(run.folder) if "eval/greedy" in line and line["step"] <= step]
        found = early_end(config, [(line["step"], line["eval/greedy"]) for line in lines])
    return processes.text_from_primary(found or "") or None


def is_finished(run: Run, step: int) -> bool:
    """Whether summary.json says that the run has ended after so many steps; all processes find the same."""
    found = read_summary(run.folder) if processes.is_primary() else None
    return processes.any_process(found is not None and found["steps"] == step)


def finished_before(run: Run, state: TrainState) -> End:
    """The end of a run that had been finished by an earlier call; loggers get what they lack of it."""
    folder, step = run.folder, int(state.step)
    early = None if step == run.config.run.steps else ended_early(run, step)
    go_on = (
        "choose another --run.dir to train again, or a larger --run.steps"
        if early is None
        else f"{early}; leave {early.partition('=')[0]} out to train on, or choose another --run.dir"
    )
    run.progress.say(f"{shown(folder, folder)} is finished; {go_on}")
    show_summary(run.config, folder, run.progress)
    if processes.is_primary():
        left = senders(run.setup.config, folder, run.progress.say)
        for sender in left:
            sender.start()
        _hand_over(run, left)
        end_all(left, True)
    summary = read_summary(folder)
    scores = {} if summary is None else {name: float(value) for name, value in summary["eval"].items()}
    return End(TrainResult(step, True, scores, folder, state, _field_of(early)))


def _field_of(early: str | None) -> EndedBy:
    """The field that a clause of `early_end` begins with; of None, run.steps."""
    name = "run.steps" if early is None else early.partition("=")[0]
    return next(field for field in get_args(EndedBy) if field == name)


def stop_reason(asked: Callable[[], bool], limit: TimeLimit) -> EndedBy:
    """Whether run.hours stopped the run or a request did, which counts first; all processes find the same."""
    if limit.hours is None:
        return "request"
    over = processes.any_process(limit.over())
    return "run.hours" if over and not processes.any_process(asked()) else "request"


def stopped_before(folder: Path, progress: Progress, reason: EndedBy, line: str | None = None) -> End:
    """The end of a run that stopped before its first step; `line` is said, if it has not been."""
    if reason == "run.hours":
        line = f"run.hours: {line or 'too little time is left for training steps'}"
    if line is not None:
        progress.say(line)
    return End(TrainResult(0, False, {}, folder, None, reason))


def stopped(run: Run, state: TrainState, done: int, scores: dict[str, float]) -> End:
    """The end of a run that was asked to stop, or whose run.hours are nearly over."""
    run.checkpoints.wait()
    ended_by = stop_reason(run.asked, run.limit)
    reason = f"run.hours={run.limit.hours:g}: " if ended_by == "run.hours" else ""
    run.progress.say(f"{reason}stopped after step {done}, saved; the same command carries on")
    return End(TrainResult(done, False, scores, run.folder, state, ended_by))


def failed(run: Run, state: TrainState, done: int, error: NoVerdictError | NotFiniteError) -> End:
    """The end of a run that cannot go on as it is."""
    run.checkpoints.wait()
    message = f"{error}; checkpoints {run.checkpoints.steps()} are from before"
    run.progress.say(message)
    return End(TrainResult(done, False, {}, run.folder, state, "error"), type(error)(message))


def finish(
    run: Run,
    state: TrainState,
    totals: RunAccounting,
    log: RunLog,
    scores: dict[str, float],
    early: str | None,
) -> End:
    """Write summary.json and report.html, hand the loggers their files, and show the table.

    Args:
      early: the clause of `ended_early`; None = run.steps are done.
    """
    setup, folder, progress = run.setup, run.folder, run.progress
    step = int(state.step)
    end = End(TrainResult(step, True, scores, folder, state, _field_of(early)))
    if early is not None:
        progress.say(f"ended after step {step} of {setup.config.run.steps}, saved: {early}")
    seconds = {**totals.seconds, "total": totals.total()}
    seconds["setup"] = max(seconds["total"] - sum(totals.seconds.values()), 0.0)
    summary = {
        "eval": scores,
        "steps": step,
        "rollouts": totals.counts["rollouts"],
        "tokens": totals.counts["generated"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if not processes.is_primary():
        return end
    run.persist(lambda: write_json(folder / "summary.json", summary))
    if setup.config.log.report:
        run.persist(lambda: progress.say(f"report: {shown(write_report([folder], folder / 'report.html'), folder)}"))
    _hand_over(run, log.senders)
    show_summary(setup.config, folder, progress)
    return end


def _hand_over(run: Run, receivers: Sequence[Sender]) -> None:
    """Hand report.html and a picture of the priorities to the loggers, if there are any."""
    if not receivers:
        return
    report, picture = run.folder / "report.html", run.folder / "priorities.png"
    run.persist(lambda: write_priorities(run.folder, picture))
    for receiver in receivers:
        receiver.files([path for path in (report, picture) if path.exists()])


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
