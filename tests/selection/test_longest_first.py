"""Batches in the order of expected length: the same prompts are drawn, and the longest start first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.command_line import parse
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.rollout import SamplingParams, counting_sampler
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.engine.longest_first import interleave
from pspo_jax.training.algorithm import build
from tests.helpers import random_prompts, tiny_policy
from tests.selection.helpers import compiled_whole

N, B, G = 40, 8, 2


def selectors(chunks=1, **fields):
    """A selector, plain and with its batches ordered."""
    config = replace(Config(), {"rollout.prompts": B, "rollout.group_size": G, "rollout.chunks": chunks, **fields})
    return compiled(config), compiled(replace(config, {"rollout.slots": 4, "rollout.longest_first": True}))


@functools.cache
def compiled(config):
    return compiled_whole(build(config).selector)


def outcome(lengths):
    zeros = np.zeros((len(lengths), G), np.float32)
    lengths = np.asarray(lengths, np.float32)[:, None] + np.array([-1, 1], np.float32)
    return RolloutOutcome(zeros + np.arange(G, dtype=np.float32), zeros, zeros, 0.0, lengths)


def drawn(selector, state, step):
    ids, weight, state = selector.select(state, jax.random.key(step), jnp.int32(step), B)
    return np.asarray(ids), np.asarray(weight), state


def test_metrics_of_a_round_are_those_of_the_selector():
    plain, ordered = selectors(**{"algorithm.name": "posterior_mixed", "selection.predictor": "hidden_states"})
    known = PromptMetadata(np.zeros(N, np.int16), features=np.zeros((N, 3), np.float32))

    def metrics(selector):
        found = selector.outcome_metrics(selector.init(N, known), jnp.arange(B), outcome([5] * B), 0)
        return {name: float(value) for name, value in found.items()}

    assert metrics(plain) == metrics(ordered) == {"selection/predictor_error": pytest.approx(0, abs=1e-6)}


@pytest.mark.parametrize("name", [pytest.param("pspo", marks=pytest.mark.slow), "prioritized_replay"])
def test_what_is_drawn_stays_and_the_longest_come_first(name):
    plain, ordered = selectors(**{"algorithm.name": name})
    one, other = plain.init(N), ordered.init(N)
    length = np.random.default_rng(0).permutation(N) + 10.0
    for step in range(6):
        ids, weight, one = drawn(plain, one, step)
        order, weights, other = drawn(ordered, other, step)
        assert dict(zip(ids, weight, strict=True)) == dict(zip(order, weights, strict=True))
        known = np.asarray(other.prompt_lengths)[order]
        expected = np.where(known > 0, known, float(other.mean_length))
        assert (np.diff(expected) <= 0).all()
        one = plain.observe(one, jnp.asarray(ids), outcome(length[ids]), jnp.int32(step))
        other = ordered.observe(other, jnp.asarray(order), outcome(length[order]), jnp.int32(step))
        np.testing.assert_allclose(np.asarray(other.prompt_lengths)[order], length[order])
    jax.tree.map(np.testing.assert_array_equal, plain.to_table(one, 6), ordered.to_table(other, 6))


def test_a_changed_length_changes_the_next_batch():
    _, ordered = selectors(**{"task.train_prompts": B})
    state = ordered.init(B)
    for lengths in (np.arange(B) + 5.0, 40 - np.arange(B) * 5.0):
        for _ in range(6):  # the newest visits outweigh the older ones
            state = ordered.observe(state, jnp.arange(B), outcome(lengths), jnp.int32(0))
        ids, _, _ = drawn(ordered, state, 1)
        np.testing.assert_array_equal(ids, np.argsort(-lengths))


def test_a_new_prompt_is_expected_to_be_as_long_as_the_mean():
    _, ordered = selectors(**{"task.train_prompts": B})
    ids = jnp.asarray([3, 5])
    state = ordered.observe(ordered.init(B), ids, outcome([30.0, 10.0]), jnp.int32(0))
    assert float(state.mean_length) == 20
    order, _, _ = drawn(ordered, state, 1)
    assert order[0] == 3 and order[-1] == 5


def test_a_prompt_that_is_twice_in_a_batch_has_one_length_whatever_the_order():
    _, ordered = selectors()
    ids, lengths = np.asarray([3, 5, 3]), np.asarray([30.0, 10.0, 8.0])
    orders = [0, 1, 2], [2, 1, 0]
    both = [ordered.observe(ordered.init(N), jnp.asarray(ids[o]), outcome(lengths[o]), 0) for o in orders]
    np.testing.assert_array_equal(both[0].prompt_lengths, both[1].prompt_lengths)
    assert float(both[0].prompt_lengths[3]) == 30


def test_changed_data_keeps_what_is_known():
    _, ordered = selectors()
    state = ordered.observe(ordered.init(N), jnp.arange(B), outcome(np.arange(B) + 5.0), jnp.int32(0))
    places = jnp.asarray([7, -1, 2, 0, -1, 30, 1, 3])
    followed = ordered.follow(state, ordered.init(B), places)
    np.testing.assert_array_equal(followed.prompt_lengths[:B], [12, 0, 7, 5, 0, 0, 6, 8])
    assert followed.mean_length == state.mean_length


interleaved = jax.jit(interleave, static_argnums=1)


@given(st.integers(1, 8), st.integers(1, 8))
def test_every_part_starts_with_its_longest(parts, each):
    order = np.asarray(interleaved(np.arange(parts * each), parts)).reshape(parts, each)
    assert sorted(order.ravel()) == list(range(parts * each))
    assert (np.diff(order, axis=1) > 0).all()
    assert (order[:, 0] == np.arange(parts)).all()


@pytest.mark.slow
def test_slots_end_earlier_with_the_longest_first():
    """Greedy lengths depend on the prompt alone, so an order is all that changes."""
    model, params, _ = tiny_policy()
    prompts = random_prompts(12, 9)
    settings = SamplingParams(0.0, 1.0, 0, jnp.asarray([13, 3, 5]), 24)
    sample = jax.jit(counting_sampler(model, 1, 24, 14, 3))
    rows, _ = sample(params, prompts, jax.random.key(0), settings)
    order = np.argsort(-np.asarray(rows.lengths[:, 0]), kind="stable")
    assert len(set(np.asarray(rows.lengths).ravel())) > 2

    def computed(order):
        taken = jax.tree.map(lambda x: x[jnp.asarray(order)], prompts)
        return int(sample(params, taken, jax.random.key(0), settings)[1].tokens)

    assert computed(order) < computed(order[::-1])


def test_an_order_without_slots_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.longest_first=True: rollout.slots=None does not read it"):
        parse(["--rollout.longest_first", "true"], "train", "")
