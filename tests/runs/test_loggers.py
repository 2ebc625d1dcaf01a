"""A run that is killed and resumed has one history in wandb, trackio and mlflow, read back through their own code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import wandb_file
from tests.runs.processes import TIMES, finish, metrics, start, wait_for_step

for package in ("wandb", "trackio", "mlflow"):
    pytest.importorskip(package, reason=f"{package} is a test dependency; install '.[test]'")

STEPS = 24
FIELDS = {
    "algorithm__name": "pspo",
    "run__steps": STEPS,
    "sft__steps": 0,
    "log__report": True,
    "log__to": "wandb,trackio,mlflow",
    "log__project": "trials",
    "log__name": "killed",
    "log__completions_every": 6,
}


@pytest.fixture(scope="module")
def local(child_env, tmp_path_factory):
    """The folder of all loggers, and the environment in which they keep everything there."""
    folder = tmp_path_factory.mktemp("loggers")
    return folder, child_env | {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


@pytest.fixture(scope="module")
def resumed(local):
    """The folder of a run that was killed after some steps, and resumed."""
    folder, env = local[0] / "run", local[1]
    process = start(env, folder, **FIELDS)
    assert wait_for_step(process, folder, at_least=7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    out = finish(start(env, folder, **FIELDS))
    assert "could not be sent" not in out and "the run goes on" not in out, out
    assert [line["step"] for line in metrics(folder)] == list(range(STEPS + 1))
    return folder


def same(row, line):
    """Whether a row of a logger has the numbers of a line of metrics.jsonl, but for times, which a killed run's first
    process may have measured."""
    numbers = {k: v for k, v in line.items() if v is not None and k != "step" and not k.startswith(("crc/", *TIMES))}
    return all(row[key] == pytest.approx(value) for key, value in numbers.items())


def test_wandb(resumed):
    runs = sorted(resumed.glob("wandb/offline-run-*"))
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1  # the same run
    (file,) = runs[-1].glob("*.wandb")
    rows = [row for row in wandb_file.history(file) if "num_tokens" in row or "eval/greedy" in row]
    assert [row["_step"] for row in rows] == list(range(STEPS + 1))
    assert all(same(row, line) for row, line in zip(rows, metrics(resumed), strict=True))
    tables = {row["_step"]: row["completions.nrows"] for row in rows if row.get("completions._type") == "table-file"}
    assert tables[STEPS] == 16
    (table,) = runs[-1].glob(f"files/media/table/completions_{STEPS}_*.table.json")
    assert "advantage" in json.loads(table.read_text())["columns"]
    kept = [record.artifact.name for record in wandb_file.records(file) if record.HasField("artifact")]
    assert any(name.startswith("report-") for name in kept)


def test_trackio(resumed, local):
    """It reads its folder from the environment when it is imported, so another process asks it."""
    call = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as s\n"
        "(run,) = trackio.Api().runs('trials')\n"
        "print(json.dumps([run.name, run.config, s.get_logs('trials', run.name)]))"
    )
    done = subprocess.run([sys.executable, "-c", call], env=local[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, config, rows = json.loads(done.stdout)
    assert name.startswith("killed-") and config["run.steps"] == STEPS and config["log.project"] == "trials"
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert all(same(row, line) for row, line in zip(rows, metrics(resumed), strict=True))
    assert len(next(row["completions"]["_value"] for row in rows if row["step"] == STEPS)) == 16
    assert list((local[0] / "trackio" / "artifacts").rglob("*"))


def test_mlflow(resumed, local, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(local[1]["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("trials")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "killed"
    assert run.data.params["run.steps"] == str(STEPS)
    lines = metrics(resumed)
    for key in ("num_tokens", "reward", "learning_rate"):
        found = client.get_metric_history(run.info.run_id, key)
        wanted = [(line["step"], line[key]) for line in lines if key in line]
        assert [metric.step for metric in found] == [step for step, _ in wanted]
        assert [metric.value for metric in found] == pytest.approx([value for _, value in wanted])
    names = {x.path for x in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "priorities.png", "completions"} <= names
    table = json.loads(_artifact(client, run, f"completions/step_{STEPS:06d}.json", tmp_path))
    dump = [json.loads(x) for x in (resumed / "completions" / f"step_{STEPS:06d}.jsonl").read_text().splitlines()]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == dump


def _artifact(client, run, path, folder):
    return Path(client.download_artifacts(run.info.run_id, path, str(folder))).read_text()


@pytest.mark.slow
def test_loggers_that_fail_change_nothing_of_a_run(resumed, local):
    """Trackio cannot write, and there is no server of mlflow's: the run is the same, and says what is missing."""
    folder, blocked = local[0] / "failing", local[0] / "file"
    blocked.write_text("")
    env = local[1] | {"TRACKIO_DIR": str(blocked / "x"), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    out = finish(start(env, folder, **(FIELDS | {"log__to": "trackio,mlflow"})))
    assert metrics(folder) == metrics(resumed)
    for name in ("trackio", "mlflow"):
        assert f"log.to={name}: {STEPS + 1} lines of metrics" in out, out
    assert out.count("the run goes on") == 1
