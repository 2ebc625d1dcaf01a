"""A check before training of which gold answers can be verified at all; its verdicts are remembered."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from pspo_jax.data.tokenising import column_array
from pspo_jax.distributed import processes
from pspo_jax.system.storage import write_whole
from pspo_jax.verifiers import math_answer
from pspo_jax.verifiers.workers.pool import Pool, Request

if TYPE_CHECKING:
    import datasets

ACCEPTED, REFUSED, NO_VERDICT = 1, 0, -1
CHECKED = ("math", "gsm8k")
"""Tasks whose gold answers may be unreadable; those of other tasks are generated, or are letters."""
_BLOCK = 2048
"""Gold answers per batch of requests."""
_ANNOUNCED_FROM = 2000
"""Gold answers from which on the check is announced."""


def check_gold(
    rows: datasets.Dataset, which: Int[np.ndarray, "n"], pool: Pool, folder: Path, say: Callable[[str], None]
) -> Int[np.ndarray, "n"]:
    """ACCEPTED, REFUSED or NO_VERDICT for each row's gold answer, given back as `\\boxed{gold}`.

    Args:
      rows: the table that `tokenised` makes.
      which: the rows to check.
      folder: the folder that keeps the verdicts. They are found again for the same rows and rules; rows without a
        verdict are checked again.
      say: told before a check that takes long.
    """
    if not len(which) or rows[int(which[0])]["kind"] not in CHECKED:
        return np.full(len(which), ACCEPTED, np.int8)
    rules = f"{version('math-verify')} {math_answer.RULES}"
    key = hashlib.sha256(column_array(rows, "digest")[which].tobytes() + rules.encode()).hexdigest()[:24]
    processes.check_same("task.train_data, task.heldout_data", key)
    # One process decides for all: two might find their deadlines missed for different rows.
    found = _checked(rows, which, pool, folder / f"golds-{key}.npy", say) if processes.is_primary() else None
    return processes.from_primary(f"gold/{key}", found)


def _checked(
    rows: datasets.Dataset, which: Int[np.ndarray, "n"], pool: Pool, path: Path, say: Callable[[str], None]
) -> Int[np.ndarray, "n"]:
    """The verdicts that `path` remembers, and a check of the other rows.

    A missed deadline is not remembered, because it may be met the next time.
    """
    out = _remembered(path, len(which))
    unknown = np.flatnonzero(out == NO_VERDICT)
    if not len(unknown):
        return out
    if len(unknown) >= _ANNOUNCED_FROM:
        say(f"checking that {len(unknown):,} gold answers can be verified (once; task.check_gold false skips it)")
    for i in range(0, len(unknown), _BLOCK):
        part = unknown[i : i + _BLOCK]
        out[part] = _block(rows.select(which[part])["answer"], pool)
    data = io.BytesIO()
    np.save(data, out)
    write_whole(path, data.getvalue(), shared=True)
    return out


def _remembered(path: Path, count: int) -> Int[np.ndarray, "n"]:
    """Verdicts of an earlier start; NO_VERDICT where there is none yet."""
    unknown = np.full(count, NO_VERDICT, np.int8)
    if not path.exists():
        return unknown
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return unknown  # cut off; it is written anew
    if found.shape != (count,):
        return unknown
    return np.where(np.isin(found, (ACCEPTED, REFUSED)), found, NO_VERDICT).astype(np.int8)


def _block(golds: list[str], pool: Pool) -> Int[np.ndarray, "n"]:
    """The verdicts of some gold answers."""
    replies = pool.submit([Request("gold", {"gold": gold}) for gold in golds]).result()
    return np.array([NO_VERDICT if r.score is None else int(r.score == 1) for r in replies], np.int8)
