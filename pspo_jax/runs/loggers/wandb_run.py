"""Weights & Biases. WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY and its other variables hold as everywhere.

Offline, every start of a run writes a folder of its own under wandb/ in the run folder. Each holds the metrics from the
first step on, since nobody can be asked what the ones before hold, so that the last of them is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import wandb

from pspo_jax.runs.loggers.interface import CLOSE_SECONDS, Item, LoggerRun, OpenRun, RunInfo, table


def _check() -> str | None:
    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun") or wandb.login(verify=False, prompt=False):
        return None
    return "has no key; run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"


def _open(info: RunInfo) -> LoggerRun:
    run = wandb.init(
        project=info.project,
        name=info.name,
        id=info.id,
        resume="allow",
        dir=str(info.folder),
        config=dict(info.config),
        settings=wandb.Settings(
            reinit="create_new",  # A program that calls `train` may have a run of its own.
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            # Without these, a server that fails would hold up the end of the process for minutes. The sender tries
            # to open the run again itself; metrics and files of an open run keep wandb's own patience.
            init_timeout=20,
            x_graphql_retry_max=2,
            x_graphql_retry_wait_max_seconds=4,
            finish_timeout=CLOSE_SECONDS,
            finish_timeout_raises=True,
        ),
    )

    def send(items: Sequence[Item]) -> None:
        for item in items:
            values: dict[str, object] = dict(item.metrics)
            if item.completions is not None:
                columns, rows = table(item.completions)
                values["completions"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
            run.log(values, step=item.step, commit=True)

    def files(paths: Sequence[Path]) -> None:
        artifact = wandb.Artifact(f"report-{info.id}", type="report")
        for path in paths:
            artifact.add_file(str(path))
        run.log_artifact(artifact)

    def end(finished: bool) -> int | None:
        run.finish(exit_code=0 if finished else 1)
        return None

    return LoggerRun(-1 if run.offline else run.step - 1, send, files, end)


LOGGER = OpenRun(_check, _open)
