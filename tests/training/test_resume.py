"""Changed data: which prompts are the old ones, what is said of the change, and where per-prompt state goes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection import SelectorContext, selector
from pspo_jax.training.resume import difference, old_rows

hashes = st.one_of(st.integers(0, 9), st.integers(2**64 - 4, 2**64 - 1), st.integers(0, 2**64 - 1))
prompts = st.lists(hashes, min_size=1, max_size=20)


def array(values):
    return np.array(values, np.uint64)


@given(prompts, prompts)
def test_old_rows(before, now):
    found = old_rows(array(before), array(now))
    assert found.tolist() == [before.index(x) if x in before else -1 for x in now] and found.dtype == np.int32


@given(st.lists(hashes, min_size=1, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_old_rows_of_a_shuffle(before, random):
    order = random.sample(range(len(before)), len(before))
    assert old_rows(array(before), array([before[i] for i in order])).tolist() == order


@given(prompts, prompts)
def test_difference(before, now):
    text = difference(array(before), array(now))
    added, removed = set(now) - set(before), set(before) - set(now)
    parts = [f"{len(before)} then, {len(now)} now", f"{len(added)} new", f"{len(removed)} gone"]
    if added:
        parts.append(f"the first new one is row {next(i for i, x in enumerate(now) if x in added)}")
    elif not removed:
        parts.append("the same in another order or template")
    assert text == ", ".join(parts) and "\n" not in text


def test_difference_in_words():
    assert difference(array(range(2000)), array(range(1, 2001))) == (
        "2,000 then, 2,000 now, 1 new, 1 gone, the first new one is row 1999"
    )


@settings(max_examples=12)
@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_follow_rows(data, old_n, new_n):
    places = data.draw(st.lists(st.integers(-1, old_n - 1), min_size=new_n, max_size=new_n))
    old = {"a": np.arange(old_n) + 1.0, "b": np.arange(2.0 * old_n).reshape(old_n, 2) + 100, "step": np.int32(7)}
    fresh = {"a": -np.arange(1.0, new_n + 1), "b": -np.ones((new_n, 2)), "step": np.int32(0)}
    found = follow_rows(*(jax.tree.map(jnp.asarray, tree) for tree in (old, fresh)), jnp.asarray(places))
    assert found["step"] == 7
    for name in "ab":
        expected = [old[name][p] if p >= 0 else fresh[name][i] for i, p in enumerate(places)]
        np.testing.assert_array_equal(found[name], expected)


def test_uniform_begins_a_new_epoch():
    chosen = selector(SelectionConfig("uniform"), ForgettingConfig("fixed"), SelectorContext(4, 2, 10, 0))
    nothing = RolloutOutcome(jnp.zeros((4, 2)), jnp.zeros((4, 2)), jnp.zeros((4, 2)))
    state = chosen.init(6)
    for step in range(2):
        ids, _, state = chosen.select(state, jax.random.key(0), jnp.int32(step), 4)
        state = chosen.observe(state, ids, nothing, jnp.int32(step))
    places = jnp.array([0, 1, 2, 3, 4, 5, -1, -1])
    state = chosen.follow(state, chosen.init(8), places)
    assert state.visit_stats.visits[:8].sum() == 8  # visits are kept, and yet the order begins anew
    seen = []
    for step in range(2, 4):
        ids, weight, state = chosen.select(state, jax.random.key(step), jnp.int32(step), 4)
        state = chosen.observe(state, ids, nothing, jnp.int32(step))
        seen += ids.tolist()
        assert weight.tolist() == [1.0] * 4
    assert sorted(seen) == list(range(8))
