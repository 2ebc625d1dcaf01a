"""Runs of several real processes that find each other through a coordinator."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests import xla
from tests.runs.processes import flags


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(env, folder, processes, devices, **fields):
    """Start processes with `devices` CPU devices each; their output goes to <folder>.<number>.log."""
    port = free_port()
    started = []
    for number in range(processes):
        words = flags(
            folder,
            **fields,
            distributed__coordinator=f"127.0.0.1:{port}",
            distributed__processes=processes,
            distributed__process=number,
        )
        with Path(f"{folder}.{number}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pspo_jax.train", *words],
                env=env | {"XLA_FLAGS": xla.flags(devices)},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(process)
    return started


def output(folder, number):
    """The output of a process without Gloo's lines."""
    lines = Path(f"{folder}.{number}.log").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("[Gloo]"))


def finish_all(folder, started, timeout=400):
    for number, process in enumerate(started):
        assert process.wait(timeout=timeout) == 0, output(folder, number)
