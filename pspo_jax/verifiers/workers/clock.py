"""Clocks of a worker process: the time it has used a processor, and the time it has waited for one.

A deadline that counts the first and not the second gives the same verdict on a busy machine as on an idle one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Time that the main thread of a process has used since it began."""

    cpu: float
    """Seconds on a processor."""
    starved: float
    """Seconds in which it could have run while other processes had the processors; 0 if the system does not say."""
    state: str
    """R = runs or could run, S and D = waits, T = stopped, Z = ended; the letters of /proc/PID/stat."""


def usage(pid: int) -> Usage | None:
    """The time that a process has used so far; None where there is no /proc, or no such process.

    Linux keeps nanoseconds in /proc/PID/schedstat, and only clock ticks (0.01 s) in /proc/PID/stat, which is read where
    the former is missing.
    """
    try:
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, ticks = fields[0], int(fields[11]) + int(fields[12])
    try:
        cpu, starved, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return Usage(ticks * _TICK, 0.0, state)
    return Usage(int(cpu) * 1e-9, int(starved) * 1e-9, state)


class TimeSpent(NamedTuple):
    """Time that a process has used for one request."""

    cpu: float
    """Seconds on a processor; 0 where the system does not say."""
    waited: float
    """Seconds since the request began, without those in which other processes had the processors."""
    state: str
    """As in `Usage`; "?" where the system does not say."""


def time_spent(pid: int, begun: Usage | None, seconds: float) -> TimeSpent:
    """The time that a process has used since `begun`, which is `seconds` ago by the clock."""
    now = usage(pid)
    if now is None or begun is None:
        return TimeSpent(0.0, seconds, "?")
    return TimeSpent(now.cpu - begun.cpu, max(0.0, seconds - (now.starved - begun.starved)), now.state)
