"""A limit on the wall-clock time of a process, for queues that kill what runs longer."""

from __future__ import annotations

import time
from collections.abc import Callable

_SHARE_LEFT = 0.02
"""Smallest share of the limit that is left when a run ends before it."""
_MOST_LEFT = 60.0
"""Largest number of seconds that this share amounts to."""


class TimeLimit:
    """Says when too little time is left for another step and a save.

    Args:
      hours: limit, counted from now; None = there is none.
      clock: gives seconds.
    """

    def __init__(self, hours: float | None, clock: Callable[[], float] = time.monotonic):
        self.hours = hours
        self._clock = clock
        self._began = clock()
        self._last = self._began
        self._step = 0.0
        self._save = 0.0

    def lap_begins(self) -> None:
        """Count the next step from now on."""
        self._last = self._clock()

    def lap(self, save: float) -> None:
        """Count a step that ends now: everything since the step before.

        Args:
          save: seconds of the slowest save so far; 0 = none has ended.
        """
        now = self._clock()
        self._step = max(self._step, now - self._last)
        self._save = max(self._save, save)
        self._last = now

    def over(self) -> bool:
        """Whether less time is left than the slowest step and the slowest save take, half as much again allowed.

        A save that has not been timed counts as the slowest step does.
        """
        if self.hours is None:
            return False
        seconds = 3600 * self.hours
        needed = 1.5 * (self._step + (self._save or self._step))
        return self._clock() - self._began + max(needed, min(_SHARE_LEFT * seconds, _MOST_LEFT)) >= seconds
