"""Visit statistics: which prompts are eligible, which of equal prompts comes first, and what a visit records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pspo_jax.arrays.per_prompt import last_of_each, summed
from pspo_jax.config.strategies import SelectionConfig
from pspo_jax.selection.engine.stats import (
    ELIGIBLE,
    EXCLUDED,
    PADDING,
    RESTING,
    VisitStats,
    age_key,
    eligibility,
    hash_rows,
    init_stats,
    record_visit,
    sortable_float,
)

SEEDS = st.integers(0, 2**31 - 1)
STEPS = st.integers(0, 2**20 - 1)
ROW_COUNT = 16  # one shape, one compilation
ROWS = st.lists(st.integers(0, 2**31 - 1), min_size=ROW_COUNT, max_size=ROW_COUNT, unique=True)
LASTS = st.lists(st.just(-1) | STEPS | st.integers(0, 3), min_size=ROW_COUNT, max_size=ROW_COUNT)


def stats_of(last=-1, visits=0, unjudged=0, success=np.nan, task_ids=0):
    """Statistics of one prompt, or of as many as the lists are long."""
    values = np.broadcast_arrays(*map(np.atleast_1d, (last, visits, unjudged, success, task_ids)))
    types = (jnp.int32, jnp.int32, jnp.int8, jnp.float32, jnp.int8)
    return VisitStats(*(jnp.asarray(x, t) for x, t in zip(values, types, strict=True)))


def age(rows, last, seed=0):
    return np.asarray(age_key(jnp.asarray(rows, jnp.int32), jnp.asarray(last, jnp.int32), seed))


def test_new_statistics_know_no_visit_and_mark_padding():
    visit_stats = init_stats(3, 5, jnp.asarray([1, 0, 2]))
    assert visit_stats.task_ids.tolist() == [1, 0, 2, -1, -1]
    assert init_stats(3, 5, None).task_ids.tolist() == [0, 0, 0, -1, -1]
    assert visit_stats.last_step.tolist() == [-1] * 5
    assert visit_stats.visits.tolist() == visit_stats.unjudged.tolist() == [0] * 5
    assert np.isnan(visit_stats.success).all()
    assert sum(x.dtype.itemsize for x in visit_stats) == 15


@pytest.mark.parametrize(
    ("limits", "prompt", "now", "want"),
    [
        ({}, {}, 0, ELIGIBLE),
        ({}, {"last": 6, "visits": 1}, 7, ELIGIBLE),
        ({"cooldown": 0}, {"last": 6, "visits": 1}, 7, ELIGIBLE),
        # It rests for as many steps as the cooldown says.
        ({"cooldown": 2}, {"last": 6, "visits": 1}, 7, RESTING),
        ({"cooldown": 2}, {"last": 6, "visits": 1}, 8, RESTING),
        ({"cooldown": 2}, {"last": 6, "visits": 1}, 9, ELIGIBLE),
        ({"cooldown": 2}, {"last": 0, "visits": 1}, 1, RESTING),
        ({"cooldown": 5}, {}, 0, ELIGIBLE),
        ({"cooldown": 5}, {}, 3, ELIGIBLE),
        ({"max_visits": 3}, {"last": 2, "visits": 2}, 9, ELIGIBLE),
        ({"max_visits": 3}, {"last": 2, "visits": 3}, 9, EXCLUDED),
        ({"max_visits": 3}, {"last": 2, "visits": 4}, 9, EXCLUDED),
        ({"max_visits": 0}, {"last": 2, "visits": 10**6}, 9, ELIGIBLE),
        ({"max_unjudged": 3}, {"last": 2, "visits": 2, "unjudged": 2}, 9, ELIGIBLE),
        ({"max_unjudged": 3}, {"last": 2, "visits": 3, "unjudged": 3}, 9, EXCLUDED),
        ({"max_unjudged": 127}, {"last": 2, "visits": 200, "unjudged": 127}, 9, EXCLUDED),
        ({"max_unjudged": 3}, {"last": 2, "visits": 9, "unjudged": -1}, 9, ELIGIBLE),
        ({"max_unjudged": 0}, {"last": 2, "visits": 200, "unjudged": 127}, 9, ELIGIBLE),
        ({"max_visits": 3, "max_unjudged": 3}, {"last": 2, "visits": 3, "unjudged": -1}, 9, EXCLUDED),
        ({"max_visits": 9, "max_unjudged": 3}, {"last": 2, "visits": 3, "unjudged": 3}, 9, EXCLUDED),
        # Excluded is for good, so it is stronger than resting.
        ({"cooldown": 5, "max_visits": 1}, {"last": 8, "visits": 1}, 9, EXCLUDED),
        ({"cooldown": 5, "max_unjudged": 1}, {"last": 8, "visits": 1, "unjudged": 1}, 9, EXCLUDED),
        # Padding is padding whatever else it says.
        ({}, {"task_ids": -1}, 0, PADDING),
        ({"cooldown": 5}, {"task_ids": -1, "last": 8, "visits": 1}, 9, PADDING),
        ({"max_visits": 1}, {"task_ids": -1, "last": 8, "visits": 1}, 9, PADDING),
    ],
)
def test_tier(limits, prompt, now, want):
    assert eligibility(SelectionConfig(**limits), stats_of(**prompt), jnp.int32(now)).tolist() == [want]


def test_tiers_are_in_the_order_in_which_a_batch_is_filled():
    assert ELIGIBLE < RESTING < EXCLUDED < PADDING


@given(ROWS, LASTS, SEEDS)
def test_never_visited_is_before_any_visit_and_older_before_newer(rows, last, seed):
    got = age(rows, last, seed)
    assert got.dtype == np.float32 and np.isfinite(got).all() and (got > 0).all()
    for a, b in np.argwhere(np.less.outer(last, last)):
        assert got[a] > got[b]


@given(ROWS, LASTS, SEEDS)
def test_age_depends_on_row_visit_and_seed_alone(rows, last, seed):
    once = age(rows, last, seed)
    np.testing.assert_array_equal(once, age(rows, last, seed))
    np.testing.assert_array_equal(once[::-1], age(rows[::-1], last[::-1], seed))


@given(ROWS, SEEDS, st.lists(st.integers(2**20 - 2, 2**31 - 1), min_size=ROW_COUNT, max_size=ROW_COUNT))
def test_steps_that_cannot_be_told_apart_are_still_after_older_ones(rows, seed, last):
    last = [2**20 - 2, 2**20 - 1, 2**20, *last[3:]]
    got = age(rows, last, seed)
    assert np.isfinite(got).all() and (got > 0).all()
    assert got[0] > np.delete(got, np.equal(last, 2**20 - 2)).max()


@pytest.mark.parametrize("last", [-1, 0, 7, 2**20 - 1])
def test_prompts_of_the_same_age_are_in_a_pseudo_random_order_of_the_seed(last):
    rows = np.arange(4096)
    orders = [np.argsort(age(rows, np.full(4096, last), seed)) for seed in (0, 1)]
    for order in orders:
        assert abs(stats.spearmanr(order, rows).statistic) < 0.1
    assert abs(stats.spearmanr(*orders).statistic) < 0.1


@given(st.lists(st.integers(0, 2**30 + 2**29 - 1), min_size=ROW_COUNT, max_size=ROW_COUNT))
def test_ordered_keeps_the_order_of_numbers(numbers):
    numbers = [*numbers[4:], 0, 1, numbers[0] + 1, 2**30 + 2**29 - 1]
    got = sortable_float(jnp.asarray(np.array(numbers, np.uint32)))
    assert np.isfinite(got).all() and (np.asarray(got) > 0).all()
    np.testing.assert_array_equal(got[:, None] < got, np.less.outer(numbers, numbers))


def test_ordered_keeps_the_order_for_top_k():
    numbers = np.random.default_rng(0).integers(0, 2**30 + 2**29, 1000)
    got = jax.lax.top_k(sortable_float(jnp.asarray(numbers.astype(np.uint32))), 50)[1]
    np.testing.assert_array_equal(numbers[np.asarray(got)], np.sort(numbers)[::-1][:50])


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("first", [0, 10_000_000])
def test_scrambled_rows_are_uniform_and_distinct(seed, first):
    got = np.asarray(hash_rows(first + jnp.arange(2**16), seed))
    assert got.dtype == np.uint32 and len(set(got.tolist())) == 2**16
    for shift in (0, 8, 16, 24):
        assert stats.chisquare(np.bincount((got >> shift) & 255, minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("other", [1, 2, 2**31 - 1])
def test_scrambled_rows_differ_by_seed(other):
    rows = jnp.arange(2**16)
    difference = np.asarray(hash_rows(rows, 0) ^ hash_rows(rows, other))
    for shift in (0, 8, 16, 24):
        assert stats.chisquare(np.bincount((difference >> shift) & 255, minlength=256)).pvalue > 1e-3


def test_neighbours_are_scrambled_apart():
    """About half of the bits differ from one row to the next, each of them about half of the time."""
    got = np.asarray(hash_rows(jnp.arange(2**16), 0))
    flipped = got[1:] ^ got[:-1]
    share = [np.mean((flipped >> bit) & 1) for bit in range(32)]
    np.testing.assert_allclose(share, 0.5, atol=0.01)


@given(st.lists(st.integers(0, 6), min_size=10, max_size=10))
def test_last_of_each_marks_the_last_entry_and_numbers_the_prompts(ids):
    writes, group = (x.tolist() for x in last_of_each(jnp.asarray(ids, jnp.int32)))
    assert writes == [i not in ids[place + 1 :] for place, i in enumerate(ids)]
    assert [[a == b for b in group] for a in group] == [[a == b for b in ids] for a in ids]
    assert all(0 <= g < len(ids) for g in group)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-50, 50)), min_size=10, max_size=10))
def test_summed_is_over_all_entries_of_a_prompt(entries):
    ids, values = zip(*entries, strict=True)
    _, group = last_of_each(jnp.asarray(ids, jnp.int32))
    want = [sum(v for j, v in entries if j == i) for i in ids]
    assert summed(jnp.asarray(values, jnp.float32), group).tolist() == want
    assert summed(jnp.asarray(values, jnp.int32), group).tolist() == want


def test_a_visit_with_a_verdict_writes_its_success():
    before = stats_of(
        last=[-1, 3, 3], visits=[0, 4, 4], unjudged=[0, 2, -1], success=[np.nan, np.nan, 0.25], task_ids=[0, 1, 2]
    )
    after = record_visit(before, jnp.ones(3, bool), jnp.asarray([0.5, 0.0, 1.0]), jnp.asarray([1, 1, 2]), jnp.int32(9))
    assert after.last_step.tolist() == [9, 9, 9]
    assert after.visits.tolist() == [1, 5, 6]
    assert after.unjudged.tolist() == [-1, -1, -1]
    assert after.success.tolist() == [0.5, 0.0, 1.0]
    assert after.task_ids.tolist() == [0, 1, 2]
    assert [x.dtype for x in after] == [x.dtype for x in before]


def test_a_visit_without_a_verdict_counts_and_keeps_the_last_success():
    before = stats_of(
        last=3,
        visits=[0, 1, 4, 9, 200, 9],
        unjudged=[0, 1, -1, 126, 127, 126],
        success=[np.nan] * 2 + [0.25] + [np.nan] * 3,
    )
    times = jnp.asarray([1, 2, 1, 1, 1, 128])
    after = record_visit(before, jnp.zeros(6, bool), jnp.zeros(6), times, jnp.int32(9))
    assert after.last_step.tolist() == [9] * 6
    assert after.visits.tolist() == [1, 3, 5, 10, 201, 137]
    assert after.unjudged.tolist() == [1, 3, -1, 127, 127, 127]
    np.testing.assert_array_equal(after.success, before.success)
    assert [x.dtype for x in after] == [x.dtype for x in before]


def test_a_verdict_once_keeps_a_prompt_from_being_left_out():
    visit_stats, config = stats_of(), SelectionConfig(max_unjudged=2)
    verdicts = [False, True, *[False] * 5]
    for step, judged in enumerate(verdicts):
        visit_stats = record_visit(
            visit_stats, jnp.asarray([judged]), jnp.ones(1), jnp.ones(1, jnp.int32), jnp.int32(step)
        )
        assert eligibility(config, visit_stats, jnp.int32(step + 1)).tolist() == [ELIGIBLE]
    never = stats_of()
    for step in range(2):
        assert eligibility(config, never, jnp.int32(step)).tolist() == [ELIGIBLE]
        never = record_visit(never, jnp.zeros(1, bool), jnp.ones(1), jnp.ones(1, jnp.int32), jnp.int32(step))
    assert eligibility(config, never, jnp.int32(2)).tolist() == [EXCLUDED]
