"""The faults of scripts/chaos.py. Each is a JSON object with a kind and all its random choices, so that it repeats.

A fault function starts the command, applies the fault, and returns the outcome; it raises misbehaviour of the program
as a `Finding`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _chaos_runs as runs
from _chaos_configs import Fields

Fault = dict[str, Any]


class Finding(Exception):
    """A trial in which the program misbehaved. Kinds: lost, silent, traceback, hang, leftover, exit."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclasses.dataclass
class Trial:
    """One run folder, through several faults."""

    fields: Fields
    place: Path
    """Holds the run folder and the outputs of all starts."""
    world: Path
    starts: int = 0
    damaged: dict[Path, bytes | None] = dataclasses.field(default_factory=dict)
    """Files that a fault has altered, and what was in them; None = there was none."""
    said: list[str] = dataclasses.field(default_factory=list)
    """Allowed differences from the uninterrupted run, with the reason."""

    @property
    def folder(self) -> Path:
        return self.place / "run"

    def start(self, extra: dict[str, str] | None = None) -> runs.Run:
        """Start the same command again."""
        self.starts += 1
        return runs.Run(self.fields, self.folder, self.world, self.place / f"output-{self.starts}.txt", extra)

    def end(self, run: runs.Run, allowed: set[int], limit: float = runs.LIMIT_SECONDS) -> int:
        """Wait for the run's end. Its exit code must be permitted, and its output must hold no traceback.

        A run that has lost its only checkpoint, or its config, to an earlier fault may always be refused.
        """
        allowed = allowed | {2} if self.damaged else allowed
        code = run.wait(limit)
        text = run.text()
        if code is None:
            raise Finding("hang", f"the run had not ended after {limit:.0f} s; {last_line(text)}")
        if "Traceback (most recent call last)" in text:
            raise Finding("traceback", f"exit code {code}; {last_line(text)}")
        if code not in allowed:
            raise Finding("exit", f"code {code} is none of {sorted(allowed)}; {last_line(text)}")
        if code and len(last_line(text)) > 1500:
            raise Finding("traceback", f"the last line has {len(last_line(text))} characters")
        until = time.monotonic() + 15
        while left := runs.left_behind(self.folder):
            if time.monotonic() > until:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise Finding("leftover", f"{len(left)} processes were alive 15 s after the run's end")
            time.sleep(0.05)
        return code


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"


def kill(trial: Trial, fault: Fault) -> None:
    """Send SIGKILL to all processes."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    run.signal(signal.SIGKILL)
    trial.end(run, {0, -signal.SIGKILL})


def ask_to_stop(trial: Trial, fault: Fault) -> None:
    """Send SIGTERM or SIGINT to all processes; they must end in order, with all finished work saved."""
    run = trial.start()
    alive = runs.wait_for(run, trial.folder, fault["moment"])
    run.signal(fault["signal"])
    # Until the program has installed its handlers, the signals end it like any program.
    trial.end(run, {0, -fault["signal"], 130, 143} if alive else {0})
    text = run.text()
    if "stopped after step" in text:
        done = int(text.rpartition("stopped after step")[2].split()[0].strip(",;:."))
        if done not in runs.whole_checkpoints(trial.folder):
            raise Finding("lost", f"the run said that step {done} was saved, and it is not there")


def kill_one(trial: Trial, fault: Fault) -> None:
    """Send SIGKILL to one of several processes; the others must end by themselves."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    victim = run.pids[fault["which"] % len(run.pids)]
    if victim in run.living():
        os.kill(victim, signal.SIGKILL)
    if run.wait() is None:
        raise Finding("hang", "the other processes went on after one was killed")


def pause(trial: Trial, fault: Fault) -> None:
    """Send SIGSTOP, wait for some seconds, and send SIGCONT."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    run.signal(signal.SIGSTOP)
    time.sleep(fault["seconds"])
    run.signal(signal.SIGCONT)
    trial.end(run, {0})


def second(trial: Trial, fault: Fault) -> None:
    """Start the same command again while the first is running; it must end at once, and the first must continue."""
    run = trial.start()
    if not runs.wait_for(run, trial.folder, fault["moment"]):
        trial.end(run, {0})
        return
    other = trial.start()
    code = other.wait()
    over = not run.living()
    # If both were still starting, either may be the first to reach the folder.
    trial.end(run, {0, 2} if code == 0 else {0})
    if code == 2 and len(other.text().splitlines()) > 1 and "error:" not in last_line(other.text()):
        raise Finding("silent", f"the second process did not say who holds the folder: {last_line(other.text())}")
    if code != 2 and not over:
        raise Finding("exit", f"the second process ended with code {code}: {last_line(other.text())}")
    trial.end(other, {0, 2})


def full(trial: Trial, fault: Fault) -> None:
    """Fill the disk; the run must end with one line, or finish its work."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    filler = trial.folder / "filler"
    with filler.open("wb") as out:
        free = shutil.disk_usage(trial.folder).free - fault["left"]
        # The run may have filled the rest meanwhile, which is just as good.
        with contextlib.suppress(OSError):
            os.posix_fallocate(out.fileno(), 0, max(free, 1))
    trial.end(run, {0, 1, 2})
    filler.unlink()


def limited(trial: Trial, fault: Fault) -> None:
    """Limit the size of files, as a quota does."""
    run = trial.start()
    if runs.wait_for(run, trial.folder, fault["moment"]):
        for pid in run.living():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    trial.end(run, {0, 1, 2})


def few_files(trial: Trial, fault: Fault) -> None:
    """Forbid the run to open more files."""
    run = trial.start()
    if runs.wait_for(run, trial.folder, fault["moment"]):
        for pid in run.living():
            held = len(os.listdir(f"/proc/{pid}/fd"))
            _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + fault["more"], most))
    trial.end(run, {0, 1, 2, -signal.SIGABRT})


def read_only(trial: Trial, fault: Fault) -> None:
    """Make the folder read-only."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    trial.folder.mkdir(exist_ok=True)
    with _bound_read_only(trial.folder):
        trial.end(run, {0, 1, 2})


@contextlib.contextmanager
def _bound_read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        # It is busy while a file is being written.
        for _ in range(100):
            if subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True).returncode == 0:
                break
            time.sleep(0.01)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def workers(trial: Trial, fault: Fault) -> None:
    """Kill or stop verifier workers; no completion may be lost without a message."""
    run = trial.start()
    runs.wait_for(run, trial.folder, fault["moment"])
    for pid in run.living():
        below = runs.descendants(pid)
        # The first is the process that forks the workers.
        struck = below[:1] if fault["who"] == "parent" else below[1:] if fault["who"] == "all" else below[1:2]
        for worker in struck:
            try:
                os.kill(worker, fault["signal"])
            except ProcessLookupError:
                continue
    code = trial.end(run, {0, 1})
    if code == 0 and fault["signal"] == signal.SIGSTOP:
        trial.said.append("a stopped worker's completions have no verdict")


def clock(trial: Trial, fault: Fault) -> None:
    """Let the wall clock jump."""
    library = _clock_library(trial.world)
    offset = trial.place / "offset"
    offset.write_bytes(ctypes.c_int64(0))
    run = trial.start({"LD_PRELOAD": str(library), "CHAOS_CLOCK_OFFSET": str(offset)})
    runs.wait_for(run, trial.folder, fault["moment"])
    with offset.open("r+b") as out:
        out.write(ctypes.c_int64(fault["seconds"]))
    trial.end(run, {0})


_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile int64_t *offset;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void begin(void) {
  real = dlsym(RTLD_NEXT, "clock_gettime");
  const char *path = getenv("CHAOS_CLOCK_OFFSET");
  int fd = path ? open(path, O_RDONLY) : -1;
  if (fd >= 0) {
    void *at = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) offset = at;
  }
}
int clock_gettime(clockid_t id, struct timespec *t) {
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME && offset) t->tv_sec += *offset;
  return code;
}
time_t time(time_t *out) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (out) *out = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec s;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &s);
  t->tv_sec = s.tv_sec;
  t->tv_usec = s.tv_nsec / 1000;
  return 0;
}
"""
"""A library that adds a number of seconds, read from a file, to the wall clock of one process."""


def _clock_library(world: Path) -> Path:
    library = world / "clock.so"
    if not library.exists():
        source = world / "clock.c"
        source.write_text(_CLOCK)
        partial = world / f"clock-{os.getpid()}.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", partial, source, "-ldl"], check=True)
        partial.rename(library)
    return library


FILES = {
    "array": "checkpoints/*/state/**/d/*",
    "manifest": "checkpoints/*/state/**/manifest.ocdbt",
    "array_metadata": "checkpoints/*/state/array_metadatas/*",
    "tree_metadata": "checkpoints/*/state/_*",
    "checkpoint_metadata": "checkpoints/*/_CHECKPOINT_METADATA",
    "commit": "checkpoints/*/commit_success.txt",
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "strategy": "strategy.jsonl",
    "prompts": "prompts/*",
    "completions": "completions/*",
    "cold_start": "cold_start/**/*",
    "summary": "summary.json",
    "any": "**/*",
}
"""Kinds of files of a run folder; a name that a run lacks is passed over."""
_WAYS = ("truncate", "flip", "empty", "delete", "garbage", "append")


def damage(trial: Trial, fault: Fault) -> None:
    """Alter a file of the folder between two starts; among files of checkpoints, one of the newest."""
    found = sorted(p for p in trial.folder.glob(FILES[fault["file"]]) if p.is_file())
    steps = runs.whole_checkpoints(trial.folder)
    if steps and fault["newest"]:
        newest = [p for p in found if f"checkpoints/{max(steps)}/" in str(p)]
        found = newest or found
    if not found:
        return
    path = found[fault["which"] % len(found)]
    before = path.read_bytes()
    trial.damaged.setdefault(path, before)
    rng = random.Random(fault["which"])
    data = bytearray(before)
    match fault["way"]:
        case "truncate":
            data = data[: rng.randrange(len(data) + 1) if data else 0]
        case "flip" if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "empty":
            data = bytearray()
        case "garbage":
            data = bytearray(rng.randbytes(max(len(data), 8)))
        case "append":
            data += rng.randbytes(20)
    if fault["way"] == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


FAULTS: dict[str, Callable[[Trial, Fault], None]] = {
    "kill": kill,
    "stop": ask_to_stop,
    "kill_one": kill_one,
    "pause": pause,
    "second": second,
    "full": full,
    "limited": limited,
    "few_files": few_files,
    "read_only": read_only,
    "workers": workers,
    "clock": clock,
    "damage": damage,
}


def draw(rng: random.Random, fields: Fields, mounts: bool) -> list[Fault]:
    """A random sequence of faults for a run. Damage follows a kill, as there would be nothing to damage otherwise.

    Args:
    mounts: whether this user may mount a small or read-only file system.
    """
    several = int(fields.get("distributed.processes", 1)) > 1
    kinds = ["kill", "kill", "stop", "pause", "second", "limited", "few_files", "clock", "damage", "damage", "damage"]
    kinds += ["full", "full", "read_only"] if mounts else []
    kinds += ["workers", "workers"] if fields.get("task.name") == "gsm8k" else []
    if several:
        kinds = ["kill", "kill_one", "kill_one", "stop", "damage", "second"]
    faults: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(kinds)
        if kind == "damage":
            faults.append({"kind": "kill", "moment": {"step": rng.randrange(1, int(fields["run.steps"])), "then": 0.1}})
        faults.append(_drawn(rng, kind, int(fields["run.steps"])))
    return faults


def _drawn(rng: random.Random, kind: str, steps: int) -> Fault:
    fault: Fault = {"kind": kind, "moment": runs.random_moment(rng, steps)}
    match kind:
        case "stop":
            fault["signal"] = int(rng.choice((signal.SIGTERM, signal.SIGINT)))
        case "kill_one":
            fault["which"] = rng.randrange(8)
        case "pause":
            fault["seconds"] = round(rng.uniform(0.2, 2), 2)
        case "full":
            fault["left"] = rng.choice((0, 4096, rng.randrange(200_000)))
        case "limited":
            fault["bytes"] = rng.choice((0, 100, rng.randrange(20_000)))
        case "few_files":
            fault["more"] = rng.choice((0, 1, rng.randrange(8)))
        case "workers":
            fault["who"] = rng.choice(("one", "all", "parent"))
            fault["signal"] = int(rng.choice((signal.SIGKILL, signal.SIGSTOP)))
        case "clock":
            fault["seconds"] = rng.choice((-1, 1)) * rng.choice((3600, 86_400, 300_000_000))
        case "damage":
            del fault["moment"]
            fault |= {"file": rng.choice(list(FILES)), "way": rng.choice(_WAYS), "which": rng.randrange(10**6)}
            fault["newest"] = rng.random() < 0.7
    return fault
