"""Rows of a tokenised data set that are prompts, and the mixture of several tasks' rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.loading import quiet_datasets
from pspo_jax.data.synthetic.generated import GENERATED
from pspo_jax.data.task import LeftOut
from pspo_jax.data.tokenising import column_array

if TYPE_CHECKING:
    import datasets

SHOWN = 200
"""Characters of a question that the list of left-out rows shows."""


class Picked(NamedTuple):
    """A tokenised data set, and its rows that are prompts."""

    rows: datasets.Dataset
    """All rows, as `tokenised` makes them."""
    keep: Int[np.ndarray, "n"]
    """The rows that are prompts."""
    left_out: list[LeftOut]


def config_of_part(part: Config, total: int, share: float) -> Config:
    """The config of a mixture's task. It holds out only as many rows as the mixture evaluates of that task."""
    most = part.task.train_prompts if part.task.name in GENERATED else 0
    held_out = min(part.task.heldout_prompts, math.ceil(total * share))
    return replace(part, {"task.heldout_prompts": held_out, "task.train_prompts": most})


def mix(
    c: Config,
    parts: list[Config],
    shares: Float[np.ndarray, "m"],
    trains: list[Picked],
    heldouts: list[Picked],
) -> tuple[Picked, Picked]:
    """Training and held-out rows of a mixture. Rows that are neither are listed as left out."""
    rng = np.random.default_rng([c.task.seed, 3])
    names = [part.task.name if part.task.name in GENERATED else str(part.task.train_data) for part in parts]
    chosen = _choose_by_share(heldouts, shares, c.task.heldout_prompts, rng)
    trains = [_return_unused(*picks) for picks in zip(trains, heldouts, chosen, strict=True)]
    heldouts = [pick._replace(keep=kept) for pick, kept in zip(heldouts, chosen, strict=True)]
    trains = _make_disjoint(trains, heldouts, names)
    limits = [part.task.train_prompts if part.task.train_prompts != c.task.train_prompts else 0 for part in parts]
    trains = [
        keep_only(train, train.keep[: limit or None], name, "beyond task.train_prompts of its task")
        for train, limit, name in zip(trains, limits, names, strict=True)
    ]
    chosen = _choose_by_share(trains, shares, c.task.train_prompts, np.random.default_rng([c.task.seed, 3]))
    trains = [
        keep_only(train, kept, name, "beyond its share of task.mixture", part.task.name not in GENERATED)
        for train, kept, name, part in zip(trains, chosen, names, parts, strict=True)
    ]
    return _concatenated(trains, rng), _concatenated(heldouts, rng)


def _choose_by_share(
    picks: list[Picked], shares: Float[np.ndarray, "m"], total: int, rng: np.random.Generator
) -> list[Int[np.ndarray, "n"]]:
    """Random rows of every task in proportion to its share: as many as possible without repetition, at most `total`."""
    n = min(len(pick.keep) / share for pick, share in zip(picks, shares, strict=True))
    n = min(n, total) if total else n
    return [
        np.sort(rng.permutation(pick.keep)[: max(1, int(n * share + 1e-9))])
        for pick, share in zip(picks, shares, strict=True)
    ]


def _return_unused(train: Picked, heldout: Picked, kept: Int[np.ndarray, "n"]) -> Picked:
    """Training rows, with the rows that were held out of the same data but that the mixture does not evaluate."""
    if train.rows is not heldout.rows:
        return train
    return train._replace(keep=np.sort(np.concatenate([train.keep, np.setdiff1d(heldout.keep, kept)])))


def _make_disjoint(trains: list[Picked], heldouts: list[Picked], names: list[str]) -> list[Picked]:
    """Training rows whose question no task of the mixture holds out; a question of several tasks stays in the first."""
    out: list[Picked] = []
    for train, name in zip(trains, names, strict=True):
        for heldout in heldouts:
            train = drop_shared(train, heldout, name)
        for other in out:
            train = drop_shared(train, other, name, "duplicate")
        if not len(train.keep):
            raise ConfigError(f"task.mixture: {name} leaves no prompt ({why(train.left_out)}); change it or drop it")
        out.append(train)
    return out


def drop_shared(train: Picked, other: Picked, name: str, reason: str = "also held out") -> Picked:
    """Training rows whose question is not among the rows of `other`."""
    also = np.isin(column_array(train.rows, "question")[train.keep], column_array(other.rows, "question")[other.keep])
    return keep_only(train, train.keep[~also], name, reason)


def keep_only(pick: Picked, keep: Int[np.ndarray, "n"], name: str, reason: str, listed: bool = True) -> Picked:
    """`pick` with the rows `keep` alone; the other rows are listed as left out, for a reason."""
    out = np.setdiff1d(pick.keep, keep) if listed else np.zeros(0, int)
    texts = pick.rows.select(out)["text"] if len(out) else []
    items = [LeftOut(name, int(i), reason, text[:SHOWN]) for i, text in zip(out, texts, strict=True)]
    return pick._replace(keep=keep, left_out=pick.left_out + items)


def _concatenated(picks: list[Picked], rng: np.random.Generator) -> Picked:
    """The rows of several tasks as one set, shuffled."""
    rows = quiet_datasets().concatenate_datasets([pick.rows.select(pick.keep) for pick in picks])
    return Picked(rows, rng.permutation(len(rows)), [item for pick in picks for item in pick.left_out])


def why(left_out: Sequence[LeftOut]) -> str:
    """A text that says how many rows were left out for each reason."""
    counts = Counter(item.reason for item in left_out)
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common()) or "it has no rows"
