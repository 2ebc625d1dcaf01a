"""The cost of a run so far: seconds by phase, rollouts, tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from pspo_jax.checkpoint.metadata import AccountingRecord

PHASES = ("setup", "load", "compile", "sft", "select", "rollout", "verify", "update", "eval")


class RunAccounting:
    """Counts and seconds since the run began, across resumes; checkpoints hold them, and they affect nothing."""

    def __init__(self, saved: AccountingRecord | None = None):
        saved = saved or AccountingRecord()
        self.counts: dict[str, int] = {
            "rollouts": 0,
            "effective": 0,
            "generated": 0,
            "tokens": 0,
            "strategy_lines": 0,
            **saved.get("counts", {}),
        }
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0) | saved.get("seconds", {})
        self._before = saved.get("total", 0.0)
        self._began = time.monotonic()

    def total(self) -> float:
        """Seconds since the run began, without pauses between its parts."""
        return self._before + time.monotonic() - self._began

    def save(self) -> AccountingRecord:
        """The accounting as a checkpoint holds it."""
        return {"counts": self.counts, "seconds": self.seconds, "total": self.total()}

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, float]]:
        """Time a block, and annotate it in a profiler's trace; the yielded dict holds its seconds afterwards."""
        out: dict[str, float] = {}
        began = time.monotonic()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield out
        finally:
            out["seconds"] = time.monotonic() - began
            self.seconds[name] += out["seconds"]


def add_step(
    totals: RunAccounting, values: dict[str, float | int], rounds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Count a step's rollouts and tokens, and put the cumulative counts into its metrics `values`.

    All rollouts count, those too that no update used.

    Args:
      rounds: for each batch that was rolled out, lengths of the prompts [B] and of their completions [B, G].
    """
    for prompts, lengths in rounds:
        generated = int(lengths.sum())
        totals.counts["rollouts"] += lengths.size
        totals.counts["generated"] += generated
        totals.counts["tokens"] += generated + int(prompts.sum()) * lengths.shape[1]
    if rounds:
        totals.counts["effective"] += int(values["groups/effective"]) * rounds[0][1].shape[1]
    values |= {
        "rollouts/total": totals.counts["rollouts"],
        "rollouts/effective": totals.counts["effective"],
        "tokens/generated": totals.counts["generated"],
        "num_tokens": totals.counts["tokens"],
    }
