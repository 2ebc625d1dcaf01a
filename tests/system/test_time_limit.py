"""A limit of wall-clock time leaves room for the slowest step and the slowest save, whatever the run has done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.system.time_limit import TimeLimit

seconds = st.floats(0.01, 100.0)


class Clock:
    """A clock that is set by hand."""

    now = 5.0

    def __call__(self):
        return self.now


@given(
    st.floats(1.0, 2000.0),
    st.lists(st.tuples(seconds, seconds), max_size=60),
    st.floats(0.0, 30.0),
    st.floats(0.0, 1.4),
)
def test_a_step_and_a_save_like_those_before_end_within_the_limit(limit, laps, setup, slower):
    """A run that asks before each step never begins one that would end, with its save, after the limit."""
    clock = Clock()
    found = TimeLimit(limit / 3600, clock)
    clock.now += setup
    found.lap_begins()
    slowest_step = slowest_save = 0.0
    for step, save in laps:
        if found.over():
            break
        # No step or save is slower than half as much again as those that were timed; the first ones were not.
        if slowest_step:
            step, save = min(step, slower * slowest_step), min(save, slower * slowest_save)
            assert clock.now + step + save <= 5.0 + limit + 1e-6
        clock.now += step
        slowest_step, slowest_save = max(slowest_step, step), max(slowest_save, save)
        found.lap(slowest_save)
    else:
        assert not laps or clock.now - 5.0 < limit or found.over()


def test_the_end_of_the_limit_itself_is_too_late():
    clock = Clock()
    limit = TimeLimit(1.0, clock)
    clock.now += 3600 - 61
    assert not limit.over()
    clock.now += 1
    assert limit.over()
    short = TimeLimit(10 / 3600, clock)
    clock.now += 9.7
    assert not short.over()
    clock.now += 0.2
    assert short.over()


def test_without_hours_there_is_no_limit():
    clock = Clock()
    limit = TimeLimit(None, clock)
    clock.now += 1e9
    limit.lap(1e9)
    assert not limit.over()
