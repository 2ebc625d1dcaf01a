"""MLflow. MLFLOW_TRACKING_URI and its other variables hold as everywhere.

MLflow chooses a run's id itself, so the run is found again by a tag that holds ours.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from pspo_jax.runs.loggers.interface import Item, LoggerRun, OpenRun, RunInfo, table

_TAG = "pspo_jax.run"
_MOST_METRICS = 1000
"""Metrics that a request may hold."""
_MOST_PARAMS = 100
"""Fields of the configuration that a request may hold."""
_LONGEST = 6000
"""Characters that the value of a field may have."""
_EVERY_LINE = "num_tokens"
"""Key of metrics.jsonl that every line has."""


def _open(info: RunInfo) -> LoggerRun:
    client = MlflowClient()
    found = client.get_experiment_by_name(info.project)
    experiment = client.create_experiment(info.project) if found is None else found.experiment_id
    runs = client.search_runs([experiment], f"tags.`{_TAG}` = '{info.id}'", max_results=1)
    run: Run = runs[0] if runs else client.create_run(experiment, run_name=info.name, tags={_TAG: info.id})
    run_id, tables = run.info.run_id, list[dict[str, str]]()
    if runs:
        client.update_run(run_id, status="RUNNING")
        tables += json.loads(run.data.tags.get("mlflow.loggedArtifacts", "[]"))
    # A field that a resumed run has changed keeps its first value, which MLflow does not let go.
    params = [Param(k, str(v)[:_LONGEST]) for k, v in info.config.items() if k not in run.data.params]
    for start in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
    # A process that was killed may have sent a part of a line; that of every line is sent last, and marks it as whole.
    last = {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in run.data.metrics}

    def send(items: Sequence[Item]) -> None:
        for item in items:
            if item.completions is None:
                continue
            columns, rows = table(item.completions)
            path = f"completions/step_{item.step:06d}.json"
            client.log_dict(run_id, {"columns": columns, "data": rows}, path)
            if all(x["path"] != path for x in tables):
                tables.append({"path": path, "type": "table"})
            client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(tables))
        now = int(1000 * time.time())
        metrics = [
            Metric(_name(key), x.metrics[key], now, x.step)
            for x in items
            for key in sorted(x.metrics, key=lambda key: key == _EVERY_LINE)
            if x.step > last.get(_name(key), -1)
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + _MOST_METRICS])

    def files(paths: Sequence[Path]) -> None:
        for path in paths:
            client.log_artifact(run_id, str(path))

    def end(finished: bool) -> int | None:
        client.set_terminated(run_id, "FINISHED" if finished else "KILLED")
        return None

    return LoggerRun(last.get(_EVERY_LINE, -1), send, files, end)


def _name(key: str) -> str:
    """A key with only the characters that MLflow takes."""
    return re.sub(r"[^\w.\- :/]", "_", key)


LOGGER = OpenRun(lambda: None, _open)
