"""Evaluation statistics against brute force, bootstraps and properties; no input may cause a warning."""

import itertools
import math
import statistics as stdlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pspo_jax.evaluation.statistics import (
    average,
    majority_at_k,
    mean_accuracy,
    pass_at_k,
    se_problems,
    se_samples,
    summarise,
)

pytestmark = pytest.mark.filterwarnings("error")
NAN = math.nan
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)
VALUES = st.sampled_from([0.0, 1.0, 1.0, 0.5, NAN])


@st.composite
def samples(draw, values=VALUES):
    """right [P, n] and answers, P lists of n."""
    right = draw(hnp.arrays(np.float64, SHAPES, elements=values))
    answer = st.sampled_from([None, "7", "8", "9"])
    row = st.lists(answer, min_size=right.shape[1], max_size=right.shape[1])
    return right, draw(st.lists(row, min_size=right.shape[0], max_size=right.shape[0]))


def numbers(summary):
    flat = []
    for value in summary:
        flat += list(value.values()) if isinstance(value, dict) else [value]
    return flat


def brute_pass(right, k):
    """Every subset of k verdicts counted."""
    shares = []
    for row in right:
        verdicts = [v for v in row if not math.isnan(v)]
        subsets = list(itertools.combinations(verdicts, k))
        if subsets:
            shares.append(sum(max(s) >= 1 for s in subsets) / len(subsets))
    return sum(shares) / len(shares) if shares else NAN


def brute_majority(right, answers, k):
    n = right.shape[1]
    if k > n:
        return NAN
    scores = []
    for p in range(right.shape[0]):
        for block in range(n // k):
            votes = {}
            for i in range(block * k, block * k + k):
                if answers[p][i] is None or math.isnan(right[p, i]):
                    continue
                name = ("right",) if right[p, i] >= 1 else ("wrong", answers[p][i])
                votes[name] = votes.get(name, 0) + 1
            winners = [name for name in votes if votes[name] == max(votes.values())]
            scores.append(1 / len(winners) if ("right",) in winners else 0)
    return sum(scores) / len(scores)


@given(samples())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(sample):
    right, _ = sample
    for k in range(1, right.shape[1] + 2):
        assert pass_at_k(right, k) == pytest.approx(brute_pass(right, k), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("c", [0, 1, 3, 512, 1020, 1024])
@pytest.mark.parametrize("k", [1, 2, 64, 512, 1023, 1024])
def test_pass_at_k_is_exact_for_many_samples(c, k):
    none_right = Fraction(1)
    for i in range(k):
        none_right *= Fraction(max(1024 - c - i, 0), 1024 - i)
    right = np.arange(1024)[None] < c
    assert pass_at_k(right.astype(np.float32), k) == float(1 - none_right)


@given(samples())
def test_majority_at_k_matches_a_loop(sample):
    right, answers = sample
    for k in range(1, right.shape[1] + 2):
        assert majority_at_k(right, answers, k) == pytest.approx(
            brute_majority(right, answers, k), abs=1e-12, nan_ok=True
        )


@pytest.mark.parametrize(
    ("right", "answers", "expected"),
    [
        ([1, 1, 0, 0], ["1/2", "0.5", "3", "4"], 1),  # spellings of the right answer vote together
        ([1, 1, 0, 0], ["2", "2", "3", "3"], 1 / 2),
        ([1, 0, 0, 0], ["2", "3", "4", "5"], 1 / 4),
        ([1, 0, 0, 0], ["2", "3", "3", "5"], 0),
        ([1, 0, 0, 0], ["2", "3", None, None], 1 / 2),
        ([1, NAN, NAN, 0], ["2", "3", "3", "5"], 1 / 2),
        ([1, 0.9, 0, 0], ["2", "2", None, None], 1 / 2),  # 0.9 is not right
        ([NAN, NAN, 0, 1], ["2", "2", None, None], 0),  # no vote
    ],
)
def test_majority_votes(right, answers, expected):
    assert majority_at_k(np.array([right], float), [answers], 4) == expected


def test_majority_leaves_out_the_last_incomplete_block():
    right = np.array([[1.0, 1, 0, 0, 1]])
    assert majority_at_k(right, [["1", "1", "2", "2", "1"]], 2) == 1 / 2


@given(samples())
def test_majority_of_one_is_the_share_of_right_answers(sample):
    right, answers = sample
    answered = np.array([[a is not None for a in row] for row in answers])
    assert majority_at_k(right, answers, 1) == pytest.approx(float(((right >= 1) & answered).mean()))


def test_se_problems_matches_a_bootstrap_over_problems():
    rng = np.random.default_rng(0)
    problems = 40
    right = (rng.random((problems, 6)) < rng.beta(1, 1, (problems, 1))).astype(float)
    right[rng.random(right.shape) < 0.1] = NAN
    right[3] = NAN
    means = np.array([np.mean(row[~np.isnan(row)]) for row in right if not np.isnan(row).all()])
    kept = len(means)
    draws = means[rng.integers(0, kept, (20_000, kept))].mean(axis=1)
    assert se_problems(right) == pytest.approx(draws.std() * math.sqrt(kept / (kept - 1)), rel=0.03)


def test_se_samples_matches_a_bootstrap_within_problems():
    rng = np.random.default_rng(1)
    problems, n = 20, 8
    right = (rng.random((problems, n)) < rng.beta(1, 1, (problems, 1))).astype(float)
    picks = rng.integers(0, n, (10_000, problems, n))
    draws = np.take_along_axis(right[None], picks, axis=2).mean(axis=(1, 2))
    assert se_samples(right) == pytest.approx(draws.std() * math.sqrt(n / (n - 1)), rel=0.03)


def test_se_samples_with_unequal_numbers_of_verdicts():
    right = np.array([[1, 0, NAN, NAN], [1, 0, 0.5, NAN], [NAN] * 4])
    expected = math.sqrt(stdlib.variance([1, 0]) / 2 + stdlib.variance([1, 0, 0.5]) / 3) / 2
    assert se_samples(right) == pytest.approx(expected)
    assert math.isnan(se_samples(np.vstack([right, [1, NAN, NAN, NAN]])))


def test_accuracy_gives_every_problem_the_same_weight():
    right = np.array([[1, NAN, NAN, NAN], [0, 0, 0, 1], [NAN] * 4])
    assert mean_accuracy(right) == 0.625
    assert se_problems(right) == pytest.approx(0.375)


@given(samples(), st.randoms(use_true_random=False))
def test_the_order_of_problems_does_not_matter(sample, random):
    right, answers = sample
    order = list(range(len(answers)))
    random.shuffle(order)
    lengths = np.arange(right.size).reshape(right.shape)
    ks = range(1, right.shape[1] + 2)
    before = summarise(right, answers, lengths, lengths % 3 == 0, ks)
    after = summarise(right[order], [answers[p] for p in order], lengths[order], lengths[order] % 3 == 0, ks)
    assert numbers(after) == pytest.approx(numbers(before), abs=1e-12, nan_ok=True)


@given(samples(values=st.sampled_from([0.0, 0.5, 1.0])))
def test_pass_at_k_never_falls_with_k(sample):
    right, _ = sample
    curve = [pass_at_k(right, k) for k in range(1, right.shape[1] + 1)]
    assert curve == sorted(curve)
    assert curve[-1] == (right >= 1).any(axis=1).mean()


@given(samples(values=VALUES | st.floats(0, 1)))
def test_every_share_lies_between_0_and_1(sample):
    right, answers = sample
    lengths = np.ones(right.shape, int)
    s = summarise(right, answers, lengths, lengths > 1, range(1, right.shape[1] + 2))
    shares = [s.accuracy, s.se_samples, s.truncated, s.no_verdict, *s.pass_at.values(), *s.majority_at.values()]
    assert all(math.isnan(share) or 0 <= share <= 1 for share in shares)
    assert not s.se_problems < 0
    assert math.isnan(s.pass_at[right.shape[1] + 1]) and math.isnan(s.majority_at[right.shape[1] + 1])


@given(samples(), st.integers(1, 3))
def test_samples_without_a_verdict_change_nothing(sample, more):
    right, _ = sample
    padded = np.hstack([np.full((len(right), more), NAN), right])
    padded = np.vstack([padded, np.full((more, padded.shape[1]), NAN)])
    for of in (mean_accuracy, se_problems, se_samples, lambda r: pass_at_k(r, 2)):
        assert of(padded) == pytest.approx(of(right), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (3, 0)])
def test_no_samples_at_all(shape):
    s = summarise(np.zeros(shape), [[]] * shape[0], np.zeros(shape, int), np.zeros(shape, bool), [1])
    assert (s.problems, s.samples, s.by_task) == (*shape, ())
    assert all(math.isnan(x) for x in numbers(s)[2:-1])


def test_no_verdict_at_all():
    s = summarise(np.full((2, 3), NAN), [["1"] * 3] * 2, np.full((2, 3), 5), np.ones((2, 3), bool), [1])
    assert math.isnan(s.accuracy) and math.isnan(s.se_problems) and math.isnan(s.se_samples)
    assert math.isnan(s.pass_at[1]) and s.majority_at[1] == 0
    assert (s.mean_length, s.truncated, s.no_verdict) == (5, 1, 1)


def test_summary():
    right = np.array([[1, 0, 1, 1], [0, NAN, 0, 1]], np.float32)
    answers = [["4", "5", "4", "4"], ["1", "2", "1", "3"]]
    lengths = np.array([[10, 20, 30, 40], [50, 60, 70, 80]])
    s = summarise(right, answers, lengths, lengths > 70, [1, 4])
    assert (s.problems, s.samples, s.mean_length, s.truncated, s.no_verdict) == (2, 4, 45, 1 / 8, 1 / 8)
    assert s.accuracy == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert s.pass_at == {1: pytest.approx((3 / 4 + 1 / 3) / 2), 4: 1}
    assert s.majority_at == {1: 1 / 2, 4: 1 / 2}


def test_average():
    assert average([(0.5, 0.03), (0.7, 0.04)]) == pytest.approx((0.6, 0.025))
    assert all(math.isnan(x) for x in average([]))
    assert average([(0.5, NAN), (0.7, 0.04)]) == pytest.approx((0.6, NAN), nan_ok=True)


def test_refusals():
    right = np.ones((2, 3))
    answers = [["1"] * 3] * 2
    with pytest.raises(ValueError, match="k=0"):
        pass_at_k(right, 0)
    with pytest.raises(ValueError, match="k=-1"):
        majority_at_k(right, answers, -1)
    for bad in (answers[:1], [["1"] * 2] * 2):
        with pytest.raises(ValueError, match="2 lists of 3"):
            majority_at_k(right, bad, 1)
    with pytest.raises(ValueError, match="lengths"):
        summarise(right, answers, np.ones((2, 2), int), np.ones((2, 3), bool), [1])
    with pytest.raises(ValueError, match="truncated"):
        summarise(right, answers, np.ones((2, 3), int), np.ones((3, 2), bool), [1])
