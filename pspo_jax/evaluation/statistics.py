"""Statistics of n sampled answers to each of P problems: accuracy, its standard errors, pass@k, maj@k.

`verdicts` [P, n] holds values in [0, 1], NaN where the verifier could not tell (no verdict). Shares are in [0, 1], not
percent. A number that the data do not determine is nan, never a warning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Answers = Sequence[Sequence[str | None]]
"""P lists of n extracted answers, None where nothing was extracted."""


class TaskAccuracy(NamedTuple):
    """The problems of one task, or of one kind, among those of a benchmark."""

    task: str
    """Label of the problems."""
    problems: int
    accuracy: float
    """avg@n."""
    se_problems: float


class Summary(NamedTuple):
    """One checkpoint on one benchmark."""

    problems: int
    samples: int
    """n, per problem."""
    accuracy: float
    """avg@n."""
    se_problems: float
    se_samples: float
    pass_at: dict[int, float]
    majority_at: dict[int, float]
    mean_length: float
    """Tokens."""
    truncated: float
    """Share of the samples."""
    no_verdict: float
    """Share of the samples."""
    by_task: tuple[TaskAccuracy, ...] = ()
    """The accuracy of each label's problems; empty if all problems have one label."""


def mean_accuracy(verdicts: Float[np.ndarray, "P n"]) -> float:
    """avg@n: the mean over problems of each problem's mean over its verdicts.

    Problems without a verdict are left out; nan if that is all of them.
    """
    return _mean(_judged(verdicts).mean)


def se_problems(verdicts: Float[np.ndarray, "P n"]) -> float:
    """Standard error of avg@n if the problems are a sample of a population: std(problem means, ddof 1) / sqrt(P').

    P' is the number of problems with a verdict; nan if P' < 2. The spread of the means holds the sampling noise too, so
    this is the whole error, not to be added to `se_samples` (Miller 2024, arXiv 2411.00640).
    """
    means = _judged(verdicts).mean
    return float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def se_samples(verdicts: Float[np.ndarray, "P n"]) -> float:
    """Standard error of avg@n from sampling alone, the problems fixed: sqrt(sum_p s2_p / n_p) / P'.

    s2_p is the unbiased variance of problem p's n_p verdicts; nan if a problem has one verdict only, or none has any.
    """
    value, known, count, mean = _judged(verdicts)
    if not len(mean) or count.min() < 2:
        return math.nan
    deviation = np.where(known, value - mean[:, None], 0.0)
    variance = (deviation**2).sum(axis=1) / (count - 1)
    return math.sqrt((variance / count).sum()) / len(mean)


def pass_at_k(verdicts: Float[np.ndarray, "P n"], k: int) -> float:
    """pass@k: the mean over problems of 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    n counts a problem's verdicts, c those of value 1. Problems with fewer than k verdicts are left out; nan if that is
    all of them.
    """
    _check(k)
    judged = _judged(verdicts)
    correct = (judged.value >= 1).sum(axis=1)
    return _mean([_any_of(int(n), int(c), k) for n, c in zip(judged.verdict_count, correct, strict=True) if n >= k])


def majority_at_k(verdicts: Float[np.ndarray, "P n"], answers: Answers, k: int) -> float:
    """maj@k: the expected correctness of the majority answer of k samples.

    The mean over the floor(n / k) disjoint blocks of k consecutive samples, then over problems; nan if k > n. Right
    samples (value 1) are one class however they are spelled, wrong ones are classed by their answer. Samples without
    an answer or a verdict do not vote. Tied classes share the vote; a block without a vote counts 0.
    """
    _check(k)
    problems, n = verdicts.shape
    if len(answers) != problems or any(len(row) != n for row in answers):
        raise ValueError(f"answers must be {problems} lists of {n}, as verdicts is")
    starts = range(0, n - k + 1, k)
    return _mean(
        [
            _block_vote(values[start : start + k], row[start : start + k])
            for values, row in zip(verdicts, answers, strict=True)
            for start in starts
        ]
    )


def summarise(
    verdicts: Float[np.ndarray, "P n"],
    answers: Answers,
    lengths: Int[np.ndarray, "P n"],
    truncated: Bool[np.ndarray, "P n"],
    ks: Sequence[int],
    tasks: Sequence[str] = (),
) -> Summary:
    """All statistics of a benchmark; `lengths` are in tokens, pass@k and maj@k are given for each k of `ks`.

    Args:
      tasks: the label of each problem; empty = none has one.
    """
    for name, array in {"lengths": lengths, "truncated": truncated}.items():
        if array.shape != verdicts.shape:
            raise ValueError(f"{name} has shape {array.shape}, verdicts {verdicts.shape}")
    problems, n = verdicts.shape
    return Summary(
        problems=problems,
        samples=n,
        accuracy=mean_accuracy(verdicts),
        se_problems=se_problems(verdicts),
        se_samples=se_samples(verdicts),
        pass_at={k: pass_at_k(verdicts, k) for k in ks},
        majority_at={k: majority_at_k(verdicts, answers, k) for k in ks},
        mean_length=_mean(lengths),
        truncated=_mean(truncated),
        no_verdict=_mean(np.isnan(verdicts)),
        by_task=_by_task(verdicts, tasks),
    )


def _by_task(verdicts: Float[np.ndarray, "P n"], tasks: Sequence[str]) -> tuple[TaskAccuracy, ...]:
    """The accuracy of each label's problems, in the order of the labels; () if there are not several labels."""
    names = sorted(set(tasks))
    if len(names) < 2:
        return ()
    of = {name: verdicts[np.array(tasks) == name] for name in names}
    return tuple(TaskAccuracy(name, len(v), mean_accuracy(v), se_problems(v)) for name, v in of.items())


def average(summaries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The plain mean of several benchmarks' (accuracy, standard error), and its error sqrt(sum se^2) / count.

    The benchmarks count as independent. (nan, nan) if there are none.
    """
    count = len(summaries)
    if not count:
        return math.nan, math.nan
    return sum(a for a, _ in summaries) / count, math.sqrt(sum(se**2 for _, se in summaries)) / count


class _Judged(NamedTuple):
    """The problems that have a verdict."""

    value: Float[np.ndarray, "Q n"]
    known: Bool[np.ndarray, "Q n"]
    verdict_count: Int[np.ndarray, "Q"]
    mean: Float[np.ndarray, "Q"]


def _judged(verdicts: Float[np.ndarray, "P n"]) -> _Judged:
    known = ~np.isnan(verdicts)
    keep = known.any(axis=1)
    value, known = verdicts[keep].astype(np.float64), known[keep]
    count = known.sum(axis=1)
    return _Judged(value, known, count, np.where(known, value, 0.0).sum(axis=1) / count)


def _any_of(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    # In whole numbers, and Python rounds the quotient of two integers correctly whatever their size: no overflow and
    # no cancellation.
    total = math.comb(n, k)
    return (total - math.comb(n - c, k)) / total


def _block_vote(values: Float[np.ndarray, "k"], answers: Sequence[str | None]) -> float:
    votes = [(v >= 1, a) for v, a in zip(values, answers, strict=True) if a is not None and not math.isnan(v)]
    correct = sum(is_right for is_right, _ in votes)
    wrong = Counter(answer for is_right, answer in votes if not is_right)
    if not correct or correct < max(wrong.values(), default=0):
        return 0.0
    return 1 / (1 + list(wrong.values()).count(correct))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if np.size(values) else math.nan


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
