"""Launchers as real processes, with a stub in the place of the trainer that records the signals it gets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import REPO

SCRIPTS = REPO / "scripts"
STUB = """#!{python}
import os, signal, sys, time
mode = os.environ.get("STUB_MODE", "save")
number = sys.argv[sys.argv.index("--distributed.process") + 1] if "--distributed.process" in sys.argv else "0"
def note(text):
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(f"{{os.getpid()}} {{number}} {{text}}\\n")
def stop(signum, frame):
    note(signal.Signals(signum).name)
    if mode != "deaf":
        time.sleep(0.2)  # as long as a checkpoint takes
        note("saved")
        sys.exit(0)
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, stop)
note("began")
if mode.startswith("exit "):
    sys.exit(int(mode[5:]))
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "first fails" and number == "0":
    sys.exit(1)
while True:
    time.sleep(0.05)
"""


class Launched:
    """A launcher that runs, and what its stubs have noted."""

    def __init__(self, folder: Path, script: str, *words: str, mode: str = "save", **env: str):
        self.log = folder / "stub.log"
        self.log.touch()
        stub = write_stub(folder / "python")
        self.process = subprocess.Popen(
            # A shell starts background jobs with SIGINT ignored, and what ignores it from the start cannot trap it.
            ["env", "--default-signal=INT", "bash", str(SCRIPTS / script), *words],
            env=os.environ | {"PYTHON": str(stub), "STUB_LOG": str(self.log), "STUB_MODE": mode} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def notes(self, text: str) -> list[str]:
        """Processes that have noted this, as pids."""
        lines = [line.split(" ", 2) for line in self.log.read_text().splitlines()]
        return [pid for pid, _, noted in lines if noted == text]

    def until(self, text: str, count: int) -> None:
        """Wait until so many stubs have noted it."""
        wait_for(lambda: len(self.notes(text)) >= count, f"{count} x {text!r} in {self.log.read_text()!r}")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def output(self) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out

    def finish(self) -> tuple[int, str]:
        """The same; no stub may be left."""
        found = self.output()
        wait_for(lambda: not any(map(alive, self.notes("began"))), "a stub has outlived its launcher")
        return found


def write_stub(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


def alive(pid: str) -> bool:
    """Whether the process runs; one that waits for its burial does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(true, what: str, seconds: float = 60) -> None:
    """Poll, for what another process does in its own time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)
