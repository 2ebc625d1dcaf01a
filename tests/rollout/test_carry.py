"""Carry-over: which groups wait and which are a batch, and that their tokens are those of a rollout in one piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.state import ROLLOUT, purpose_key
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.rollout.carry import is_whole, new_pending, roll_out, take_batch
from pspo_jax.rollout.token_loop import RolloutShape
from tests.helpers import random_prompts, tiny_policy

EOS, PAD, P, T, B, G, BUDGET = 13, 14, 9, 12, 8, 4, 5
SETTINGS = SamplingParams(jnp.float32(1), jnp.float32(1), jnp.int32(0), jnp.asarray([EOS, 3], jnp.int32), jnp.int32(T))


@functools.cache
def programs(budget=BUDGET):
    """(params, a round, the choice of a batch, the static sampler): all tests share them."""
    model, params, _ = tiny_policy()
    shape = RolloutShape(G, T, PAD)

    def one_round(params, pending, fresh, key, step, number):
        return roll_out(model, params, pending, fresh, key, step, number, SETTINGS, shape, budget)

    take = jax.jit(lambda pending: take_batch(pending, B, SETTINGS.temperature))
    return params, jax.jit(one_round), take, make_sampler(model, G, T, PAD)


def prompts_of(first):
    """Prompts number first to first + B - 1, by their tokens and ids."""
    prompts = random_prompts(B, P, seed=first)
    return dataclasses.replace(prompts, ids=prompts.ids + first)


@dataclasses.dataclass
class Group:
    """A group as the oracle sees it: what it will have drawn in the end, and how much of it has been drawn."""

    prompt: int
    tokens: np.ndarray
    lengths: np.ndarray
    versions: list[int]

    def whole(self):
        return bool((self.lengths <= BUDGET * len(self.versions)).all())


def oracle_step(pending, step, begun, complete):
    """The batch of a step, what is left, and the prompts begun before each round, in plain Python.

    `complete(number, begun)` gives the groups that may begin in a round, as a rollout in one piece completes them.
    """
    rounds = []
    while sum(group.whole() for group in pending) < B:
        rounds.append(begun)
        goes_on = [group for group in pending if not group.whole()]
        new = complete(len(rounds) - 1, begun)[: B - len(goes_on)]
        for group in [*goes_on, *new]:
            group.versions.append(step)
        pending, begun = [*pending, *new], begun + len(new)
    batch = [group for group in pending if group.whole()][:B]
    return batch, [group for group in pending if not any(group is taken for taken in batch)], begun, rounds


@settings(max_examples=6)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_groups_wait_and_form_batches_as_an_oracle_in_plain_python_says(seed, steps):
    """With unchanged weights each completion is that of the static sampler, whatever the rounds that it took."""
    params, one_round, take, sample = programs()
    key, pending, left, begun = jax.random.key(seed), new_pending(B, G, P, T, BUDGET, False), [], 0
    for step in range(steps):

        def complete(number, begun, step=step):
            prompts = prompts_of(begun)
            drawn = sample(params, prompts, purpose_key(key, step, ROLLOUT), SETTINGS, number * B * G)
            ids, tokens, lengths = (np.asarray(x) for x in (prompts.ids, drawn.tokens, drawn.lengths))
            return [Group(int(ids[i]), tokens[i], lengths[i], []) for i in range(B)]

        batch, left, begun, rounds = oracle_step(left, step, begun, complete)
        for number, first in enumerate(rounds):
            pending = one_round(params, pending, prompts_of(first), key, jnp.int32(step), jnp.int32(number))
        pending, found = take(pending)
        assert np.asarray(found.prompts.ids).tolist() == [group.prompt for group in batch]
        np.testing.assert_array_equal(found.tokens, [group.tokens for group in batch])
        np.testing.assert_array_equal(found.lengths, [group.lengths for group in batch])
        versions = [[*group.versions, *[-1] * (3 - len(group.versions))] for group in batch]
        np.testing.assert_array_equal(found.versions, versions)
        assert int(pending.held) == len(left) and int(pending.unfinished) == sum(not group.whole() for group in left)
        ids = np.asarray(pending.groups.prompts.ids)[: len(left)]
        assert ids.tolist() == [group.prompt for group in left]


@functools.cache
def after_updates(steps=6):
    """Batches of steps whose weights change, with the weights of each step and what is pending in the end."""
    params, one_round, take, _ = programs()
    key, pending, begun, batches = jax.random.key(3), new_pending(B, G, P, T, BUDGET, False), 0, []
    weights = []
    for step in range(steps):
        weights.append(params)
        number = 0
        while int(pending.held) - int(pending.unfinished) < B:
            before = int(pending.held)
            pending = one_round(params, pending, prompts_of(begun), key, jnp.int32(step), jnp.int32(number))
            begun, number = begun + int(pending.held) - before, number + 1
        pending, batch = take(pending)
        batches.append(batch)
        params = changed(params, step)
    return batches, weights, pending, begun


@jax.jit
def changed(params, seed):
    """Other weights, as after an update."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), seed), len(leaves))
    moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return tree.unflatten(moved)


def test_each_token_has_the_log_prob_of_the_policy_that_drew_it():
    """Segments of one completion are of several policies, whose prefixes the later ones read by their own weights."""
    batches, weights, *_ = after_updates()
    model = tiny_policy()[0]

    @jax.jit
    def log_probs_under(params, batch):
        p = batch.prompts
        found = completion_log_probs(
            model,
            params,
            jnp.repeat(p.tokens, G, axis=0),
            jnp.repeat(p.lengths, G, axis=0),
            batch.tokens.reshape(B * G, T),
            batch.temperature,
        )[0]
        return found.reshape(B, G, T)

    stale = 0
    for step, batch in enumerate(batches):
        under = np.stack([log_probs_under(params, batch) for params in weights])
        version = np.repeat(np.asarray(batch.versions), BUDGET, axis=1)[:, None, :T]
        mask, drawn = np.asarray(batch.mask), np.asarray(batch.log_probs)
        assert (np.broadcast_to(version, mask.shape)[mask] >= 0).all() and version.max() <= step
        expected = np.take_along_axis(under, np.broadcast_to(np.maximum(version, 0), mask.shape)[None], axis=0)[0]
        assert np.abs(np.where(mask, drawn - expected, 0)).max() < 1e-5
        older = mask & (version < step)
        stale += older.sum()
        if older.any():
            assert np.abs(np.where(older, drawn - under[step], 0)).max() > 1e-3
    assert stale > 50


def test_nothing_is_dropped():
    """Every prompt that has begun is in exactly one batch or pending, and so is every token that was drawn."""
    batches, _, pending, begun = after_updates()
    held = int(pending.held)
    seen = [np.asarray(batch.prompts.ids) for batch in batches] + [np.asarray(pending.groups.prompts.ids)[:held]]
    assert sorted(np.concatenate(seen).tolist()) == list(range(begun))
    for batch in batches:
        last = np.take_along_axis(np.asarray(batch.tokens), np.asarray(batch.lengths)[..., None] - 1, axis=2)[..., 0]
        assert (np.isin(last, [EOS, 3]) | (np.asarray(batch.lengths) == T)).all()
        np.testing.assert_array_equal(np.isin(last, [EOS, 3]), batch.ended)
    there = np.arange(2 * B) < held
    np.testing.assert_array_equal(
        np.flatnonzero(there & ~np.asarray(is_whole(pending.groups))).size, pending.unfinished
    )


@pytest.mark.slow
def test_with_a_budget_of_the_longest_completion_a_round_is_the_static_rollout_to_the_bit():
    params, one_round, take, sample = programs(T)
    key, prompts = jax.random.key(11), prompts_of(0)
    pending = one_round(params, new_pending(B, G, P, T, T, False), prompts, key, jnp.int32(4), jnp.int32(0))
    pending, found = take(pending)
    expected = sample(params, prompts, purpose_key(key, 4, ROLLOUT), SETTINGS)
    assert int(pending.held) == 0 and (np.asarray(found.versions) == 4).all()
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(found, versions=None), expected)
