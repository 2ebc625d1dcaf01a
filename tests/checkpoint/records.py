"""Checkpoints with the record that a run keeps beside its state."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.runs import history
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.training.setup import Setup


@contextmanager
def saved(prepared: Setup, state: Any, folder: Path, step: int = 3, **changes: Any):
    """The open checkpoints of a run folder, which hold this state as a run of these parts saves it.

    Args:
      changes: values of the record that are to differ from the run's own.
    """
    record = {
        "step": step,
        "config": history.settings(prepared.config),
        "dataset": prepared.task.train.fingerprint(),
        "heldout": prepared.task.heldout.fingerprint(),
        "source": None,
        "base": {},
        "totals": RunAccounting().save(),
    }
    with Checkpoints(folder / "checkpoints", prepared.config.checkpoint) as checkpoints:
        checkpoints.save(step, state.to_save(), record | changes)
        checkpoints.wait()
        yield checkpoints
