"""Real processes of a training run for scripts/chaos.py: starting them, waiting for a moment, reading their folder.

A run of one process is forked from this one, which has imported the package without touching a device, to save the
seconds of the imports. Runs of several processes, and those that need another environment, start with
`python -m pspo_jax.train`.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _chaos_configs import Fields, flags

from pspo_jax.checkpoint.store import saved_steps
from pspo_jax.config import command_line
from pspo_jax.train import main

LIMIT_SECONDS = 240.0
"""A run that has not ended by then hangs; the slowest here takes a tenth of it on a quiet machine."""
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_TIMES = ("time/", "step_time", "tokens_per_second")
TRIAL = "PSPO_JAX_CHAOS_TRIAL"
"""Environment variable by which the processes that a trial has left behind are found."""


class Run:
    """The started processes of one command.

    Args:
      extra: environment variables on top of the campaign's; with any, the run is not forked but executed.
    """

    def __init__(self, fields: Fields, folder: Path, world: Path, output: Path, extra: dict[str, str] | None = None):
        self.output = output
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        output.write_text("")
        count = int(fields.get("distributed.processes", 1))
        devices = int(fields.get("devices", 1))
        words = [*flags(fields, folder), "--run.compilation_cache", str(world / "xla")]
        env = os.environ | (extra or {})
        env |= {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count} {_QUICK}",
            TRIAL: str(folder),
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(world), str(Path.cwd()), os.environ.get("PYTHONPATH")])),
        }
        if count == 1 and not extra:
            self.pids.append(_fork(words, env, world, output))
            return
        port = _free_port()
        for number in range(count):
            more = [] if count == 1 else _place(number, count, port)
            command = [sys.executable, "-m", "pspo_jax.train", *words, *more]
            with output.open("ab") as out:
                process = subprocess.Popen(
                    command,
                    env=env,
                    cwd=world,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.pids.append(process.pid)

    def living(self) -> list[int]:
        """The processes that have not ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def signal(self, number: int, which: list[int] | None = None) -> None:
        for pid in self.living() if which is None else which:
            os.kill(pid, number)

    def wait(self, limit: float = LIMIT_SECONDS) -> int | None:
        """The first process's exit code after all have ended; None = they did not end in time and were killed."""
        until = time.monotonic() + limit
        while self.living():
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
                while self.living():
                    time.sleep(0.01)
                return None
            time.sleep(0.01)
        return self.codes[self.pids[0]]

    def text(self) -> str:
        return self.output.read_text(errors="replace")


def _fork(words: list[str], env: dict[str, str], cwd: Path, output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    # It is opened here because the run may soon be forbidden to open files.
    out, null = os.open(output, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    pid = os.fork()
    if pid:
        os.close(out)
        os.close(null)
        return pid
    code: Any = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        sys.path.insert(0, str(cwd))
        sys.argv = ["pspo_jax.train", *words]
        command_line.run(main, "pspo_jax.train")
    except SystemExit as stop:
        code = stop.code
    finally:
        try:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # the child must never continue as if it were the campaign
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _place(number: int, count: int, port: int) -> list[str]:
    words = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process": number}
    # A process whose partner was killed before it joined waits this long for it.
    words |= {"join_timeout": 60, "heartbeat_timeout": 10}
    return [word for k, v in words.items() for word in (f"--distributed.{k}", str(v))]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


Moment = dict[str, float]
"""When a fault strikes: {"after": seconds from the start}, {"step": logged steps} or {"saving": logged steps}, the last
once a checkpoint is being written; each with "then", more seconds."""


def random_moment(rng: random.Random, steps: int) -> Moment:
    kind = rng.choice(("after", "step", "step", "saving"))
    first = rng.uniform(0, 4) if kind == "after" else rng.randrange(0, steps)
    return {kind: round(first, 3), "then": round(rng.choice((0.0, rng.uniform(0, 0.3))), 3)}


def wait_for(run: Run, folder: Path, moment: Moment, limit: float = LIMIT_SECONDS) -> bool:
    """Wait for the moment; returns whether the run was still alive then."""
    until = time.monotonic() + limit
    reached = _condition(folder, moment)
    while run.living() and not reached() and time.monotonic() < until:
        time.sleep(0.003)
    time.sleep(moment.get("then", 0.0))
    return bool(run.living())


def _condition(folder: Path, moment: Moment) -> Callable[[], bool]:
    began = time.monotonic()
    if "after" in moment:
        return lambda: time.monotonic() - began >= moment["after"]
    logged = moment.get("step", moment.get("saving", 0))

    def partial() -> bool:
        return "saving" not in moment or any(".orbax-checkpoint-tmp" in p.name for p in folder.glob("checkpoints/*"))

    return lambda: len(_lines(folder / "metrics.jsonl")) > logged and partial()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def whole_checkpoints(folder: Path) -> dict[int, int]:
    """Step of each complete checkpoint -> CRC of all its files."""
    found = {}
    for step in saved_steps(folder / "checkpoints"):
        crc = 0
        for path in sorted((folder / "checkpoints" / str(step)).rglob("*")):
            if path.is_file():
                crc = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(folder)).encode(), crc))
        found[step] = crc
    return found


def aside_checkpoints(folder: Path) -> set[int]:
    """Steps of the checkpoints that were moved aside instead of deleted."""
    return {
        int("".join(c for c in p.name if c.isdigit()) or -1)
        for aside in folder.glob("*")
        if aside.is_dir() and aside.name != "checkpoints"
        for p in [*aside.glob("*"), *aside.glob("*/*")]
        if p.is_dir() and p.name.rstrip("_").isdigit()
    }


def results(folder: Path) -> dict[str, Any]:
    """Everything in which equal runs agree: metrics without times, checksums of the last checkpoint, dumps."""
    metrics = [json.loads(line) for line in _lines(folder / "metrics.jsonl")]
    last = saved_steps(folder / "checkpoints")[-1]
    saved = json.loads((folder / "checkpoints" / str(last) / "_CHECKPOINT_METADATA").read_text())
    dumps = {p.name: p.read_bytes() for p in sorted((folder / "completions").glob("*"))}
    return {
        "metrics": [{k: repr(v) for k, v in line.items() if not k.startswith(_TIMES)} for line in metrics],
        "checksums": {last: saved["custom_metadata"]["checksums"]},
        "completions": {name: zlib.crc32(data) for name, data in dumps.items()},
        "strategy": _lines(folder / "strategy.jsonl"),
        "eval": json.loads((folder / "summary.json").read_text())["eval"],
    }


def difference(a: dict[str, Any], b: dict[str, Any], ignored: set[str]) -> str | None:
    """The first difference between the results of two runs, apart from the ignored ones; None = they are equal."""
    for name in a:
        if name not in ignored and a[name] != b[name]:
            one, other = a[name], b[name]
            if name == "metrics" and len(one) == len(other):
                step = next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
                keys = sorted(k for k in {**one[step], **other[step]} if one[step].get(k) != other[step].get(k))
                return f"metrics of step {step}: {', '.join(keys[:6])}"
            return f"{name}: {str(one)[:150]} / {str(other)[:150]}"
    return None


def left_behind(folder: Path) -> list[int]:
    """Processes that a trial's run has started and that are still alive. A forked run is waited for elsewhere."""
    mark = f"{TRIAL}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and int(path.name) != os.getpid() and mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """All descendants of a process, the nearest first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(path.name))
    found, queue = [], [pid]
    while queue:
        below = parents.get(queue.pop(0), [])
        found += below
        queue += below
    return found
