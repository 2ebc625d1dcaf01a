"""Trackio. TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL and its other variables hold as everywhere.

A run of Trackio is known by its name within a project, which therefore ends in the run's id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trackio
from trackio.sqlite_storage import SQLiteStorage

from pspo_jax.runs.loggers.interface import Item, LoggerRun, OpenRun, RunInfo, table


def _is_local() -> bool:
    return not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))


def _open(info: RunInfo) -> LoggerRun:
    name = f"{info.name}-{info.id}"
    run = trackio.init(
        project=info.project,
        name=name,
        resume="allow",
        config=dict(info.config),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )

    def send(items: Sequence[Item]) -> None:
        for item in items:
            values: dict[str, object] = dict(item.metrics)
            if item.completions is not None:
                columns, rows = table(item.completions)
                values["completions"] = trackio.Table(columns=columns, data=rows)
            run.log(values, step=item.step)

    def files(paths: Sequence[Path]) -> None:
        artifact = trackio.Artifact(f"report-{info.id}", type="report")
        for path in paths:
            artifact.add_file(str(path))
        run.log_artifact(artifact)

    def end(finished: bool) -> int | None:
        run.finish()
        # Trackio warns of what it could not write, and raises nothing.
        if not _is_local():
            return None
        last = SQLiteStorage.get_last_step(info.project, name)
        return -1 if last is None else last

    # The only place of the last step there is for both a folder and a server.
    return LoggerRun(run._next_step - 1, send, files, end)


LOGGER = OpenRun(lambda: None, _open)
