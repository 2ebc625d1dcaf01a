"""One process in a run folder: locks of real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.runs.lock import NAME, locked

HOLD = """
import sys, time
from pathlib import Path
from pspo_jax.runs.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_process_is_told_who_holds_the_folder(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as raised, locked(tmp_path, print):
            pass
        line = str(raised.value)
        assert re.search(rf"run.dir=.*held by process {holder.pid} on {os.uname().nodename} since \d{{4}}-", line), line
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path, print):  # the dead one's does not count
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
    with locked(tmp_path, print):
        pass


def test_processes_of_one_run_do_not_fight(tmp_path):
    with locked(tmp_path, print), locked(tmp_path, print, 1), locked(tmp_path, print, 2):
        for number in range(3):
            with pytest.raises(ConfigError, match="held by"), locked(tmp_path, print, number):
                pass


def test_a_damaged_lock_file_still_locks(tmp_path):
    (tmp_path / NAME).write_bytes(b"\xff\x00garbage")
    with locked(tmp_path, print):
        (tmp_path / NAME).write_bytes(b"\xff\x00garbage")
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path, print):
            pass


def test_a_folder_that_takes_no_lock_is_named(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(ConfigError, match=r"run.dir=.*run.lock: Is a directory"), locked(tmp_path, print):
        pass
