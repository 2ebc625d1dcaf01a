"""Disks that are full: real ones of a few hundred kilobytes."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time

import numpy as np
import pytest

from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config import command_line
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.runs.access import read_lines
from pspo_jax.runs.run_folder import RunLog
from pspo_jax.system.storage import Persist, StorageError, append_whole, exhausted, os_reason, write_whole
from tests.checkpoint.trees import abstract, fill, small_disk, tree

SIZE = 150
"""Rows of a square array of 88 kB."""


def test_a_save_that_fails_is_one_line_and_the_older_checkpoint_is_whole(tmp_path, capfd):
    with small_disk(tmp_path / "disk", 400) as disk:
        with (
            pytest.raises(StorageError) as raised,
            Checkpoints(disk / "c", CheckpointConfig(every=1)) as checkpoints,
        ):
            checkpoints.save(1, tree(1, SIZE), {"note": 1})
            checkpoints.wait()
            filler = fill(disk)
            checkpoints.save(2, tree(2, SIZE), {"note": 2})
            checkpoints.wait()
        line = str(raised.value)
        for words in (
            "checkpoint 2",
            "No space left on device",
            "needs up to 90 kB",
            "are free",
            "checkpoint 1 is whole",
        ):
            assert words in line, line
        assert "\n" not in line and "Traceback" not in capfd.readouterr().err
        filler.unlink()
        with Checkpoints(disk / "c", CheckpointConfig()) as checkpoints:
            assert checkpoints.steps() == [1]
            state, _ = checkpoints.restore(abstract(tree(1, SIZE)), print)
            np.testing.assert_array_equal(state["w"], tree(1, SIZE)["w"])
            checkpoints.save(2, tree(2, SIZE), {"note": 2})
        assert not list((disk / "c").glob("*tmp*"))


def test_what_libraries_say_of_a_machine_that_ran_out_becomes_a_line():
    for text, words in (
        ("random_device::random_device(const std::string&): device not available", "ulimit -n"),
        ("RESOURCE_EXHAUSTED: Cannot allocate memory", "free memory"),
    ):
        assert words in str(exhausted(RuntimeError(text)))
    assert exhausted(RuntimeError("shapes differ")) is None


def test_retry_waits_for_room_and_loses_nothing(tmp_path):
    said = []
    config = CheckpointConfig(on_error="retry", retry_minutes=2)
    with small_disk(tmp_path / "disk", 700) as disk, Checkpoints(disk / "c", config, said.append) as checkpoints:
        checkpoints.save(1, tree(1, SIZE), {"note": 1})
        checkpoints.wait()
        filler = fill(disk)

        def make_room():
            while not any("tried again" in line for line in said):
                time.sleep(0.05)
            filler.unlink()

        helper = threading.Thread(target=make_room)
        helper.start()
        checkpoints.save(2, tree(2, SIZE), {"note": 2})
        checkpoints.wait()
        helper.join()
        assert checkpoints.steps() == [1, 2]
        state, metadata = checkpoints.restore(abstract(tree(2, SIZE)), print)
        assert metadata["note"] == 2
        np.testing.assert_array_equal(state["w"], tree(2, SIZE)["w"])


def save_to_full_disk(disk, config, stop):
    with Checkpoints(disk / "c", config, stop=stop) as checkpoints:
        fill(disk)
        checkpoints.save(1, tree(1, SIZE), {})
        checkpoints.wait()


def save_twice(disk):
    """The first save fails in the background."""
    with Checkpoints(disk / "c", CheckpointConfig()) as checkpoints:
        fill(disk)
        checkpoints.save(1, tree(1, SIZE), {})
        until = time.monotonic() + 60
        while not checkpoints.failed() and time.monotonic() < until:
            time.sleep(0.01)
        assert checkpoints.failed()
        checkpoints.save(2, tree(2, SIZE), {})


@pytest.mark.parametrize(("minutes", "stop"), [(0.01, False), (60.0, True)])
def test_retry_ends_after_its_minutes_or_when_a_stop_is_asked_for(tmp_path, minutes, stop):
    config = CheckpointConfig(on_error="retry", retry_minutes=minutes)
    with small_disk(tmp_path / "disk", 300) as disk, pytest.raises(StorageError, match="No space"):
        save_to_full_disk(disk, config, lambda: stop)


def test_a_failed_save_is_known_before_the_next_one(tmp_path):
    with small_disk(tmp_path / "disk", 300) as disk, pytest.raises(StorageError, match="checkpoint 1 could"):
        save_twice(disk)


def test_logs_on_a_full_disk_hold_whole_lines_alone(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        log = RunLog(disk, 0, tensorboard=False)
        log.metrics(1, {"reward": 0.5})
        filler = fill(disk)
        with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written.*No space.*needed and.*free"):
            for step in range(2, 2000):
                log.metrics(step, {"reward": 0.5, "note": step})
        reached = step
        filler.unlink()
        log.metrics(reached, {"reward": 0.5})
        records, broken = read_lines(disk / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, reached + 1)) and not broken


def test_logs_wait_for_room_if_told_to(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        filler, said = fill(disk), []

        def say(line):
            said.append(line)
            filler.unlink(missing_ok=True)

        persist = Persist("retry", 1.0, say)
        persist(lambda: write_whole(disk / "a.json", b"x" * 9000))
        assert (disk / "a.json").stat().st_size == 9000 and "tried again" in said[0]


def test_a_whole_file_replaces_the_one_before_or_leaves_it(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        write_whole(disk / "a", b"before")
        filler = fill(disk)
        with pytest.raises(StorageError):
            write_whole(disk / "a", b"x" * 9000)
        with pytest.raises(StorageError):
            append_whole(disk / "a", b"x" * 9000)
        assert (disk / "a").read_bytes() == b"before"
        filler.unlink()
        assert sorted(p.name for p in disk.iterdir()) == ["a"]


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_the_system_says_why(code):
    assert os_reason(OSError(code, os.strerror(code))) == os.strerror(code)
    assert os_reason(ValueError(f"RESOURCE_EXHAUSTED: Failed [os_error_code='{code}']")) == os.strerror(code)
    assert os_reason(ValueError("DATA_LOSS: checksum")) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO])
def test_a_machine_that_runs_out_of_something_is_one_line(number, capsys, monkeypatch):
    monkeypatch.setattr(command_line.os, "_exit", sys.exit)  # the real one would end the tests too

    def main(argv):
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, "pspo_jax.train")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert f"some/file: {os.strerror(number)}" in said and "the same command carries on" in said


def test_an_error_of_the_program_keeps_its_traceback():
    def main(argv):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "some/file")

    with pytest.raises(FileNotFoundError):
        command_line.run(main, "pspo_jax.train")
