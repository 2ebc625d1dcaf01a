"""Traces of chosen steps by the JAX profiler, with the phases of a step as annotations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from pspo_jax.config.text_fields import parse_profile
from pspo_jax.distributed import processes
from pspo_jax.runs.home import shown
from pspo_jax.training.run_end import Run

NAME = "profile"
"""Folder of a run folder that holds traces and profiles of memory."""


class Profile:
    """Writes a trace of the steps of run.profile; the methods do nothing for other steps."""

    def __init__(self, run: Run, steps: range):
        self._run = run
        self._steps = steps
        self._tracing = False

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Annotate step number `done`; the trace begins with the first step that is wanted and ends with the last."""
        if done in self._steps and not self._tracing:
            self._start()
        with jax.profiler.StepTraceAnnotation("step", step_num=done):
            yield
        if self._tracing and done == self._steps[-1]:
            self.stop()

    def update(self, done: int) -> None:
        """Write a profile of memory, if `done` is the last of the steps: its update has been dispatched."""
        if not self._steps or done != self._steps[-1] or not self._run.config.run.profile_memory:
            return
        path = self._folder() / f"memory_{done:06d}.prof"
        try:
            path.parent.mkdir(exist_ok=True)
            jax.profiler.save_device_memory_profile(path)
        except (OSError, RuntimeError) as error:
            self._run.progress.say(f"run.profile_memory: no profile of step {done} ({_reason(error)})")
            return
        stats = jax.local_devices()[0].memory_stats() or {}
        peak = (
            f"; the peak so far is {stats['peak_bytes_in_use'] / 2**30:.2f} GiB" if "peak_bytes_in_use" in stats else ""
        )
        self._run.progress.say(f"memory in the update of step {done}: {shown(path, self._run.folder)}{peak}")

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Traces of Python's calls are large and slow the host; the annotations are there without them.
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(self._folder(), profiler_options=options)
            self._tracing = True
        except (OSError, RuntimeError) as error:
            self._failed(error)

    def stop(self) -> None:
        """Write the trace, if one is being recorded."""
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._failed(error)
            return
        self._run.progress.say(
            f"run.profile: a trace of steps {self._run.config.run.profile} is in "
            f"{shown(self._folder(), self._run.folder)}; docs/runs.md says how to read it"
        )

    def _failed(self, error: OSError | RuntimeError) -> None:
        self._steps = range(0)
        self._run.progress.say(f"run.profile={self._run.config.run.profile}: no trace is written ({_reason(error)})")

    def _folder(self) -> Path:
        return self._run.folder / NAME


@contextmanager
def profiled(run: Run, first: int) -> Iterator[Profile]:
    """Yields the profile of a run whose first step is number `first`; a trace that is unfinished is written at the end.

    The leading process alone writes one.
    """
    wanted = run.config.run.profile
    steps = range(0)
    if wanted is not None and processes.is_primary():
        begin, end = parse_profile(wanted)
        steps = range(begin, end + 1)
        if first > end:
            run.progress.say(f"run.profile={wanted}: these steps were done before, and nothing is traced")
    profile = Profile(run, steps)
    try:
        yield profile
    finally:
        profile.stop()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
