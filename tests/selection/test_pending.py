"""Prompts whose groups are pending are drawn again only where there are no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import slow_except
from tests.selection.helpers import make, outcome

BATCH, PROMPTS, ROOM = 8, 40, 40
FIELDS = {"uniform": {"exploration": 0.25}, "pps": {"exploration": 0.25, "cooldown": 1}, "mopps": {}, "greso": {}}


@functools.cache
def selector_of(name):
    """A selector that has seen three batches, its state, and a compiled draw beside pending prompts."""
    made = make(name, BATCH, **FIELDS[name])
    state = made.init(PROMPTS)
    for step in range(3):
        ids, _, state = made.select(state, step)
        rewards = np.random.default_rng(step).random((BATCH, 4)) < 0.5
        state = made.observe(state, ids, outcome(rewards.astype(np.float32)), step)

    def draw(state, key, pending):
        return made.selector.select(state, key, jnp.int32(3), BATCH, pending)

    return state, jax.jit(draw)


@settings(max_examples=20)
@pytest.mark.parametrize("name", slow_except(["uniform"], list(FIELDS)))
@given(st.lists(st.integers(0, PROMPTS - 1), max_size=ROOM), st.integers(0, 2**31 - 1))
def test_pending_prompts_come_last(name, pending, seed):
    state, draw = selector_of(name)
    places = np.full(ROOM, -1, np.int32)
    places[: len(pending)] = pending
    ids, weight, after = (jax.device_get(x) for x in draw(state, jax.random.key(seed), jnp.asarray(places)))
    assert len(set(ids.tolist())) == BATCH and ids.min() >= 0 and weight.min() > 0 and weight.max() == 1
    others = set(range(PROMPTS)) - set(pending)
    again = set(ids.tolist()) & set(pending)
    assert len(again) == max(0, BATCH - len(others))
    # The state that the run goes on with knows nothing of what is pending.
    none = jax.device_get(draw(state, jax.random.key(seed), jnp.full(ROOM, -1, jnp.int32))[2])
    jax.tree.map(np.testing.assert_array_equal, after, none)


@pytest.mark.parametrize("name", slow_except([], list(FIELDS)))
def test_without_pending_prompts_a_draw_is_the_usual_one_to_the_bit(name):
    state, draw = selector_of(name)
    usual = jax.jit(
        lambda state, key: make(name, BATCH, **FIELDS[name]).selector.select(state, key, jnp.int32(3), BATCH)
    )
    key, none = jax.random.key(5), jnp.full(ROOM, -1, jnp.int32)
    jax.tree.map(np.testing.assert_array_equal, draw(state, key, none), usual(state, key))
