"""A launcher stops what it started, starts nothing on top of it, and repeats what a repetition can help."""

from __future__ import annotations

import os
import shutil
import signal
import socket

import pytest

from tests.conftest import REPO
from tests.helpers import slow_except
from tests.launch.launched import Launched, write_stub

TWO = ["--processes", "2", "--wait", "0", "--", "--run.steps", "3"]


@pytest.fixture
def launch(tmp_path):
    """Starts launchers; one that a failed test leaves is ended with all it started."""
    started = []

    def start(*words, **options):
        started.append(Launched(tmp_path, *words, **options))
        return started[-1]

    yield start
    for one in started:
        for pid in [str(one.process.pid), *one.notes("began")]:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_reaches_every_trainer_and_none_is_started_again(launch, number, processes):
    one = launch("multi_gpu.sh", "--processes", processes, "--", "--run.steps", "3")
    one.until("began", int(processes))
    one.signal(number)
    code, out = one.finish()
    assert code == 0, out
    assert len(one.notes("SIGTERM")) == len(one.notes("saved")) == len(one.notes("began")) == int(processes)
    assert "retry" not in out and f"{signal.Signals(number).name}: stopping" in out


def test_trainers_save_when_their_launcher_is_killed(launch):
    one = launch("multi_gpu.sh", *TWO)
    one.until("began", 2)
    one.signal(signal.SIGKILL)
    one.finish()
    assert len(one.notes("saved")) == 2 and len(one.notes("began")) == 2


def test_what_does_not_stop_in_time_is_killed(launch):
    one = launch("multi_gpu.sh", "--grace", "1", *TWO, mode="deaf")
    one.until("began", 2)
    one.signal(signal.SIGTERM)
    code, _ = one.finish()
    assert code == 143 and len(one.notes("SIGTERM")) == 2 and len(one.notes("began")) == 2


def test_a_second_signal_kills_at_once(launch):
    one = launch("multi_gpu.sh", *TWO, mode="deaf")
    one.until("began", 2)
    one.signal(signal.SIGINT)
    one.until("SIGTERM", 2)
    one.signal(signal.SIGINT)
    assert one.finish()[0] == 130


def test_a_killed_launcher_kills_what_does_not_stop(launch):
    one = launch("multi_gpu.sh", "--grace", "1", *TWO, mode="deaf")
    one.until("began", 2)
    one.signal(signal.SIGKILL)
    one.finish()


@pytest.mark.parametrize(
    ("mode", "code", "began"),
    [("exit 0", 0, 2), ("exit 2", 2, 2), ("exit 75", 75, 2), ("exit 130", 130, 2), ("exit 1", 1, 6), ("killed", 1, 6)],
)
def test_only_what_a_retry_can_help_is_tried_again(launch, mode, code, began):
    one = launch("multi_gpu.sh", "--retries", "2", *TWO, mode=mode)
    found, out = one.finish()
    assert (found, len(one.notes("began"))) == (code, began), out


def test_the_waits_between_retries_grow(launch):
    one = launch("multi_gpu.sh", "--retries", "2", "--wait", "1", "--", "x", mode="exit 1")
    _, out = one.finish()
    assert "retry 1 of 2 in 1 s" in out and "retry 2 of 2 in 2 s" in out and "gave up after 2 retries" in out


def test_a_stop_during_the_wait_starts_nothing(launch):
    one = launch("multi_gpu.sh", "--wait", "60", "--", "x", mode="exit 1")
    one.until("began", 1)
    one.signal(signal.SIGTERM)
    code, _ = one.finish()
    assert code == 143 and len(one.notes("began")) == 1


def test_the_others_are_ended_before_a_failed_set_begins_again(launch):
    one = launch("multi_gpu.sh", "--retries", "1", "--grace", "1", *TWO, mode="first fails")
    code, out = one.finish()
    assert code == 1 and len(one.notes("began")) == 4, out
    order = [line.split(" ", 2)[2] for line in one.log.read_text().splitlines()]
    assert order.count("began") == 4


def test_a_port_that_is_taken_is_refused(launch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        one = launch("multi_gpu.sh", "--processes", "2", "--port", str(taken.getsockname()[1]), "--", "x")
        code, out = one.finish()
    assert code == 2 and "choose another --port" in out and not one.notes("began")


def test_arguments_arrive_as_they_were_given(tmp_path, launch):
    odd = ["two words", "it's", 'a "quote"', "two\nlines", "*.py", "$HOME", "", "back\\slash"]
    one = launch("multi_gpu.sh", "--", *odd, mode="exit 0", PYTHON=str(echo(tmp_path)))
    assert one.finish()[0] == 0
    assert (tmp_path / "words").read_bytes().split(b"\0")[:-1] == [w.encode() for w in ("-m", "pspo_jax.train", *odd)]


def echo(folder):
    """A program that writes its arguments down."""
    path = folder / "echo"
    path.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >{folder}/words\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("words", [["--processes"], ["--processes", "x"], ["--processes", "0"], ["--retries", "-1"]])
def test_a_bad_option_is_one_line(launch, words):
    code, out = launch("multi_gpu.sh", *words).finish()
    assert code == 2 and words[0] in out and out.count("\n") == 1


def test_a_missing_program_is_one_line(launch):
    code, out = launch("multi_gpu.sh", "--", "x", PYTHON="no-such-python").finish()
    assert code == 2 and "no-such-python: not found" in out and out.count("\n") == 1


POD = ["--name", "pod", "--zone", "z"]


@pytest.fixture
def pod(tmp_path, launch):
    """Starts tpu_pod_run.sh on a slice whose one worker is a folder."""
    programs = tmp_path / "programs"
    programs.mkdir()
    shutil.copy(REPO / "tests" / "launch" / "gcloud.sh", programs / "gcloud")
    (programs / "gcloud").chmod(0o755)
    write_stub(tmp_path / "worker" / "pspo_jax" / ".venv" / "bin" / "python")

    def start(*words, **options):
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "WORKER": str(tmp_path / "worker"), "GCLOUD_LOG": str(tmp_path / "gcloud.log")}
        return launch("tpu_pod_run.sh", *POD, *words, **(env | options))

    return start


RUN = ["--wait", "0", "--", "--run.dir", "/mnt/a folder"]


@pytest.mark.parametrize(
    "number", slow_except([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
)
def test_a_stopped_or_killed_pod_run_leaves_no_trainer(pod, number):
    one = pod(*RUN)
    one.until("began", 1)
    one.signal(number)
    code, out = one.finish()
    assert len(one.notes("began")) == len(one.notes("saved")) == 1, out
    assert code == (-9 if number == signal.SIGKILL else 0)


@pytest.mark.parametrize(
    ("mode", "code", "began"),
    slow_except(
        [("exit 1", 1, 3)],
        [("exit 0", 0, 1), ("exit 2", 2, 1), ("exit 75", 75, 1), ("exit 1", 1, 3), ("killed", 1, 3)],
        True,
    ),
)
def test_a_pod_run_repeats_only_what_a_retry_can_help(pod, mode, code, began):
    one = pod("--retries", "2", *RUN, mode=mode)
    found, out = one.finish()
    assert (found, len(one.notes("began"))) == (code, began), out


def test_a_second_pod_run_is_refused_and_the_first_one_can_be_stopped_from_elsewhere(pod):
    one = pod(*RUN)
    one.until("began", 1)
    code, out = pod(*RUN).output()
    assert code == 2 and "a trainer runs already" in out
    code, out = pod("--stop").output()
    assert code == 0 and len(one.notes("saved")) == 1, out
    assert one.finish()[0] == 0


def test_a_secret_reaches_the_trainer_and_nothing_else(pod, tmp_path):
    secret = 'hf_it\'s "odd" $HOME'
    echo_env = tmp_path / "worker" / "pspo_jax" / ".venv" / "bin" / "python"
    echo_env.write_text(f'#!/usr/bin/env bash\nprintf %s "$HF_TOKEN" >{tmp_path}/told\n')
    one = pod("--env", f"HF_TOKEN={secret}", "--env", "WANDB_API_KEY", *RUN, WANDB_API_KEY="wandb-secret")
    code, out = one.finish()
    assert code == 0, out
    assert (tmp_path / "told").read_text() == secret
    kept = tmp_path / "worker" / "pspo_jax" / "train.env"
    assert kept.stat().st_mode & 0o777 == 0o600
    arguments = (tmp_path / "gcloud.log").read_text()
    assert "HF_TOKEN" in arguments  # the name says what is passed on
    for text in (out, arguments):
        assert secret not in text and "wandb-secret" not in text


def test_a_signal_to_a_slurm_job_reaches_srun(launch, tmp_path):
    write_stub(tmp_path / "bin" / "srun")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    one = launch("slurm.sbatch", "--run.dir", "/shared/x", PATH=path)
    one.until("began", 1)
    one.signal(signal.SIGTERM)
    assert one.finish()[0] == 0 and len(one.notes("saved")) == 1


@pytest.mark.parametrize(
    "words", [["--x.password", "hunter2-a"], ["--x.api_key=hunter2-a"], ["https://me:hunter2-a@host"]]
)
@pytest.mark.parametrize("script", [["multi_gpu.sh", "--dry-run", "--"], ["slurm.sbatch", "--dry-run"]])
def test_a_secret_among_the_arguments_is_not_printed(launch, script, words):
    code, out = launch(*script, *words, "--model.tokenizer", "t", "--rollout.max_new_tokens=8").output()
    assert code == 0 and "hunter2" not in out and "***" in out
    assert "--model.tokenizer t --rollout.max_new_tokens=8" in out


def test_the_value_of_a_secret_variable_is_printed_nowhere(launch):
    code, out = launch(
        "multi_gpu.sh", "--dry-run", "--", "--x", "a-wandb-secret-b", WANDB_API_KEY="wandb-secret"
    ).output()
    assert code == 0 and "a-***-b" in out
