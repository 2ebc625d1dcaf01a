"""A sender's history has every step once and in order, whenever its logger fails, and never holds up its run."""

from __future__ import annotations

import http.server
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.runs.loggers import opening, sender
from pspo_jax.runs.loggers.interface import LoggerRun, RunInfo, table
from pspo_jax.runs.loggers.sender import Sender, end_all


def append(path, *steps):
    with path.open("a") as file:
        file.writelines(json.dumps({"step": s, "reward": s / 2, "kl": None, "crc/params": 7}) + "\n" for s in steps)


class Kept:
    """A logger that keeps what it is sent, and fails as it is told to."""

    def __init__(self, failures=(), reached=-1, partial=False):
        self.failures, self.reached, self.partial = list(failures), reached, partial
        self.items, self.paths, self.ended = [], [], None

    def _may_fail(self):
        if self.failures and self.failures.pop(0):
            raise ConnectionError("the network\nis away")

    def open(self):
        self._may_fail()
        return LoggerRun(self.reached, self.send, self.paths.extend, self.end)

    def send(self, items):
        self._may_fail()
        self.items.extend(items)

    def end(self, finished):
        self.ended = finished


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(sender, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(sender, "_LONGEST_WAIT", 0.002)


@settings(max_examples=25)
@given(st.lists(st.booleans(), max_size=12), st.lists(st.integers(1, 25), max_size=5), st.integers(-1, 12))
def test_every_step_arrives_once_and_in_order(tmp_path_factory, failures, bursts, reached):
    path, said = tmp_path_factory.mktemp("run") / "metrics.jsonl", []
    logger, step = Kept(failures, reached), 0
    append(path, 0)
    one = Sender("kept", logger.open, path, said.append)
    one.start()
    for burst in bursts:
        for _ in range(burst):
            step += 1
            if step % 5 == 0:
                one.completions(step, [{"step": step}])
            append(path, step)
            one.wake()
    one.files([path])
    end_all([one], True)
    assert [item.step for item in logger.items] == list(range(reached + 1, step + 1))
    assert all(item.metrics == {"reward": item.step / 2} for item in logger.items)
    tables = [item.step for item in logger.items if item.completions is not None]
    assert set(tables) <= set(range(5, step + 1, 5))
    assert logger.ended and logger.paths == [path]
    failed = any(failures[: len(failures) - len(logger.failures)])
    dropped = [line for line in said if "tables of completions could not be sent" in line]
    assert len(said) - len(dropped) == failed
    assert not failed or said[0].startswith("log.to=kept: the network is away; the run goes on")


def test_a_logger_that_never_answers_is_left_behind_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.3)
    path, said, never = tmp_path / "metrics.jsonl", [], threading.Event()
    one = Sender("deaf", never.wait, path, said.append)
    one.start()
    began = time.monotonic()
    for step in range(40):
        one.completions(step, [{"step": step}])
        append(path, step)
        one.wake()
    assert time.monotonic() - began < 0.3
    end_all([one], True)
    assert time.monotonic() - began < 2
    assert len(said) == 1 and said[0].startswith(
        "log.to=deaf: 40 lines of metrics, 40 tables of completions could not be sent"
    )


def test_what_a_logger_says_it_has_kept_counts(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    append(path, *range(8))
    one = Sender(
        "leaky", lambda: LoggerRun(-1, lambda items: None, lambda paths: None, lambda ok: 4), path, said.append
    )
    one.start()
    end_all([one], False)
    assert len(said) == 1 and "3 lines of metrics could not be sent" in said[0]


@pytest.fixture
def refusing():
    """The URL of a server that answers every request with an error, and the number of requests so far."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


def test_mlflow_s_own_client_meets_a_server_that_fails(tmp_path, monkeypatch, refusing):
    pytest.importorskip("mlflow", reason="mlflow is a test dependency; install '.[test]'")
    from pspo_jax.runs.loggers.mlflow_run import LOGGER

    url, seen = refusing
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    path, said = tmp_path / "metrics.jsonl", []
    append(path, 0, 1, 2)
    info = RunInfo("project", "run", "12345678", tmp_path, {"run.steps": 3})
    one = Sender("mlflow", lambda: LOGGER.open(info), path, said.append)
    one.start()
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    end_all([one], True)
    assert seen and len(said) == 2
    assert said[0].startswith("log.to=mlflow: API request to http") and "the run goes on" in said[0]
    assert said[1].startswith("log.to=mlflow: 3 lines of metrics could not be sent")


def test_a_table_has_the_columns_of_all_lines_but_images():
    columns, rows = table([{"step": 1, "images": ["data:"]}, {"step": 1, "logged/x": 2.0}])
    assert columns == ["step", "logged/x"] and rows == [[1, None], [1, 2.0]]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "trackio", "mlflow"):
        config = replace(Config(), {"log.to": f"tensorboard,{name}"})
        with pytest.raises(
            ConfigError, match=rf"^log.to=.*: needs the package {name}; pip install 'pspo-jax\[{name}\]'$"
        ):
            opening.check_packages(config)
    opening.check_packages(Config())


def test_the_id_is_kept_and_a_damaged_one_replaced(tmp_path):
    said = []
    first = opening._id(tmp_path, said.append)
    assert opening._id(tmp_path, said.append) == first and len(first) == 8 and not said
    (tmp_path / opening.ID).write_text("{")
    assert opening._id(tmp_path, said.append) != first and len(said) == 1
