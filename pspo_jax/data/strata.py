"""Strata of difficulty: which stratum a prompt is in, exact shares of the training prompts, and labels for metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.text_fields import Stratum

DIFFICULTY_COLUMNS = ("difficulty", "level")
"""Columns in which a difficulty is looked for if the config names none."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WHICH_WRONG, _WRONG_LABELS = 5, 7
"""Numbers of the streams of random numbers that choose the rows with wrong labels, and the labels."""


def number_in(value: object) -> float:
    """The number that a value is or begins with in its text; NaN = none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _NUMBER.search(value) if isinstance(value, str) else None
    return float(match.group()) if match else float("nan")


def difficulties(column: Callable[[str], list[object]], name: str | None) -> Float[np.ndarray, "N"] | None:
    """The numbers in a column of difficulties, NaN where there is none; None if no row has one.

    Args:
      column: the values of a column by its name.
      name: the column; None = the first of DIFFICULTY_COLUMNS that has numbers.
    """
    for one in DIFFICULTY_COLUMNS if name is None else (name,):
        numbers = np.array([number_in(value) for value in column(one)], np.float32)
        if np.isfinite(numbers).any():
            return numbers
    return None


def stratum_of(difficulty: Float[np.ndarray, "N"], strata: Sequence[Stratum]) -> Int[np.ndarray, "N"]:
    """The index of each prompt's stratum; -1 = it is in none, as where its difficulty is NaN."""
    out = np.full(len(difficulty), -1)
    for i, stratum in enumerate(strata):
        out[(difficulty >= stratum.low) & (difficulty <= stratum.high)] = i
    return out


def labels_of(difficulty: Float[np.ndarray, "N"], strata: Sequence[Stratum]) -> list[str]:
    """Labels of prompts for metrics and quotas: `difficulty_3+` in the stratum 3+, `difficulty_other` in none."""
    names = [f"difficulty_{stratum.name}" for stratum in strata]
    return [names[i] if i >= 0 else "difficulty_other" for i in stratum_of(difficulty, strata)]


def apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided in proportion to shares: each part is a whole number less than 1 from its exact share.

    What rounding down leaves goes to the largest remainders, and of equal ones to the first (Hamilton's method).
    """
    exact = np.array(shares, np.float64) / sum(shares) * total
    parts = np.floor(exact + 1e-9).astype(int)
    last = np.argsort(-(exact - parts), kind="stable")[: total - int(parts.sum())]
    parts[last] += 1
    return parts.tolist()


def counts_of(total: int, strata: Sequence[Stratum]) -> list[int]:
    """The number of training prompts in each stratum, of `total` in all.

    Raises:
      ConfigError: a stratum would have none.
    """
    counts = apportioned(total, [stratum.share for stratum in strata])
    for stratum, count in zip(strata, counts, strict=True):
        if not count:
            raise ConfigError(
                f"task.strata={written(strata)!r}: {stratum.name} has no prompt of {total}; raise its share, or "
                "task.train_prompts"
            )
    return counts


def chosen_rows(difficulty: Float[np.ndarray, "N"], strata: Sequence[Stratum], total: int) -> Int[np.ndarray, "n"]:
    """The first rows of each stratum, as many as its share of `total` is, in ascending order.

    Args:
      total: number of training prompts; 0 = as many as the rows of all strata allow.
    Raises:
      ConfigError: a stratum has too few rows.
    """
    stratum = stratum_of(difficulty, strata)
    there = np.bincount(stratum[stratum >= 0], minlength=len(strata)).tolist()
    counts = counts_of(total or _most(there, [s.share for s in strata]), strata)
    for one, wanted, found in zip(strata, counts, there, strict=True):
        if found < wanted:
            raise too_few(strata, one, wanted, found)
    return first_rows(stratum, counts)


def first_rows(stratum: Int[np.ndarray, "N"], counts: Sequence[int]) -> Int[np.ndarray, "n"]:
    """The first counts[i] rows of each stratum i, or all of them if there are fewer, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(stratum == i)[:n] for i, n in enumerate(counts)]))


def _most(there: Sequence[int], shares: Sequence[float]) -> int:
    """The largest total whose parts are at most `there`; at least 1."""
    total = int(min((n + 1) / share for n, share in zip(there, shares, strict=True)))
    while total > 1 and any(w > n for w, n in zip(apportioned(total, shares), there, strict=True)):
        total -= 1
    return max(total, 1)


def too_few(strata: Sequence[Stratum], stratum: Stratum, wanted: int, found: int) -> ConfigError:
    """The error that says that a stratum has fewer prompts than its share."""
    return ConfigError(
        f"task.strata={written(strata)!r}: {stratum.name} takes {wanted} prompts, and there are {found} of this "
        "difficulty; lower its share or task.train_prompts, or change the stratum"
    )


def written(strata: Sequence[Stratum]) -> str:
    """The strata as task.strata writes them."""
    return ", ".join(f"{stratum.name}={stratum.share:g}" for stratum in strata)


def wrong_rows(share: float, seed: int, count: int, stratum: Int[np.ndarray, "N"] | None) -> Bool[np.ndarray, "N"]:
    """The prompts whose gold answer is to be replaced: round(share x count), in every stratum the same share.

    Args:
      seed: task.seed.
      stratum: the stratum of each prompt; None = there are no strata.
    """
    kind = np.zeros(count, int) if stratum is None else stratum
    sizes = np.bincount(kind)
    out = np.zeros(count, bool)
    rng = np.random.default_rng([seed, _WHICH_WRONG])
    for i, wrong in enumerate(apportioned(round(share * count), sizes.tolist())):
        out[rng.permutation(np.flatnonzero(kind == i))[:wrong]] = True
    return out


def wrong_label_draws(seed: int) -> np.random.Generator:
    """The random numbers that choose wrong labels; those that choose the rows are others."""
    return np.random.default_rng([seed, _WRONG_LABELS])
