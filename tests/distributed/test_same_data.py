"""Processes of one run have the same data and settings: one decides which rows are kept, and who differs is said."""

import subprocess
import sys

from tests.conftest import REPO
from tests.distributed.processes import free_port

SCRIPT = """
import sys, time
import jax
import numpy as np

address, number = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, number)
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import processes

processes.check_same("task.train_data", "equal")
if number == 0:
    time.sleep(1)  # the others wait for what it finds out
kept = np.array([1, 0, -1, 1], np.int8)
for _ in range(2):  # the same rows may be in a mixture twice
    print(processes.from_primary("gold/a", kept if processes.is_primary() else None).tolist())
try:
    processes.check_same("task.train_data", "other" if number == 1 else "equal")
except ConfigError as error:
    print(error)

from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.training.setup import configure_runtime

own = {"distributed.coordinator": address, "distributed.processes": 2, "distributed.process": number}
own |= {"run.compilation_cache": "off", "verifier.workers": 1 + number, "task.train_data": f"/disk{number}/rows.jsonl"}
for rate in (0.25, 0.25 + number):
    try:
        configure_runtime(replace(Config(), own | {"optimizer.learning_rate": rate}))
        print("equal")
    except ConfigError as error:
        print(error)
"""


def test_processes_hear_what_the_leader_decided_and_who_differs(child_env):
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, address]
    started = [
        subprocess.Popen(
            [*command, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env=child_env,
        )
        for number in range(2)
    ]
    for number, process in enumerate(started):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert lines[:2] == ["[1, 0, -1, 1]"] * 2
        assert lines[2].startswith("task.train_data: the data on ") and "(process 1)" in lines[2]
        assert "differ from those of the others" in lines[2] and "(process 0)" not in lines[2]
        assert lines[3:] == [
            "equal",
            f"optimizer.learning_rate={0.25 + number}: of the run's processes, {1 - number} has another value; "
            "start all of them with the same settings",
        ]
