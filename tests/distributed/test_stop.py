"""Joining other processes leaves the program's own handling of signals in place."""

import subprocess
import sys

from tests.conftest import REPO
from tests.distributed.processes import free_port

SCRIPT = """
import os, signal, sys
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.system.interrupts import stop_requests
from pspo_jax.distributed import processes

with stop_requests() as stop:
    processes.initialize(replace(Config(), {"distributed.coordinator": sys.argv[1]}))
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop())
"""


def test_sigterm_is_still_heard_once_the_processes_have_joined(child_env):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, f"127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=child_env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
