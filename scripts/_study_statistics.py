"""Figures of a study: rollouts to the baseline's final score, areas under curves, intervals and corrected p-values."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

STEP, ROLLOUTS, TOKENS, GREEDY, SAMPLED = range(5)
"""Columns of a run's points."""
RESAMPLES = 10_000
"""Bootstrap samples of an interval."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds, with the bias-corrected and accelerated bootstrap interval (Efron, 1987).

    One seed, or seeds with equal values, give no width. Seeds of a bootstrap are few here, and its intervals are then
    somewhat too narrow.
    """
    found = np.asarray(values, np.float64)
    center = float(found.mean())
    if len(found) < 2 or np.ptp(found) < 1e-12:
        return Interval(center, center, center)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap((found,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0))
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():
        low, high = np.min(found), np.max(found)
    return Interval(center, float(low), float(high))


def reached(points: Sequence[Sequence[float]], axis: int, level: float, score: int = SAMPLED) -> float | None:
    """Where on `axis` the score first is at `level`, interpolated linearly between evaluations; None = nowhere."""
    for before, after in itertools.pairwise(points):
        if before[score] >= level:
            return before[axis]
        if after[score] >= level:
            share = (level - before[score]) / (after[score] - before[score])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def area(points: Sequence[Sequence[float]], limit: float, score: int = SAMPLED) -> float:
    """Mean score over the rollouts from 0 to `limit`, by the trapezoidal rule; the last score holds beyond the run."""
    rollouts = [point[ROLLOUTS] for point in points if point[ROLLOUTS] < limit]
    at = [*rollouts, limit]
    scores = np.interp(at, [point[ROLLOUTS] for point in points], [point[score] for point in points])
    return float(np.trapezoid(scores, at) / limit)


def score_at(points: Sequence[Sequence[float]], limit: float, score: int) -> float:
    """The score at the last evaluation within `limit` rollouts."""
    return [point for point in points if point[ROLLOUTS] <= limit][-1][score]


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test that the mean difference is 0; 1 where it cannot be taken."""
    found = np.asarray(differences, np.float64)
    if len(found) < 3 or np.ptp(found) < 1e-12:
        return 1.0
    return float(stats.ttest_1samp(found, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979)."""
    order = np.argsort(p_values)
    count = len(p_values)
    corrected = np.empty(count)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected.tolist()
