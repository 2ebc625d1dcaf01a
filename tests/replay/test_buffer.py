"""Which group lands in which slot, against a deque; and what a group keeps on its way."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.groups import empty_groups, keep
from pspo_jax.arrays.state import Prompts
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.replay import Groups, effective, filter_ineffective, popo
from pspo_jax.replay.dynamic_sampling import append, new_queue, take_first
from tests.replay.oracle import PlainReplay, Stored

B, G, P, T = 5, 4, 3, 2
# Variances of 1, 2, 3 and 4 right of 4: no two are so close that float32 and Python may rank them differently.
REWARDS = ((0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 0, 2))


def batch_of(groups, step):
    """Groups whose every array holds their name."""
    b = len(groups)
    name = np.array([g.name for g in groups], np.int32)
    full = np.broadcast_to(name[:, None, None], (b, G, T))
    made = Groups(
        prompts=Prompts(
            np.array([g.prompt for g in groups], np.int32),
            np.broadcast_to(name[:, None], (b, P)),
            np.full(b, 2, np.int32),
            np.float32(name / 1000),
        ),
        tokens=full,
        mask=np.ones((b, G, T), bool),
        log_probs=np.float32(-full / 100),
        rewards=np.array([g.rewards for g in groups], np.float32),
        advantages=np.float32(full[..., 0] / 10),
        ended=np.ones((b, G), bool),
        step=np.full(b, step, np.int32),
        counted=np.ones(b, bool),
    )
    return jax.device_put(made)


@lru_cache(maxsize=64)
def made(**fields):
    config = replace(Config(), {"rollout.prompts": B, **{f"replay.{k}": v for k, v in fields.items()}})
    replay = popo(config)
    return replay._replace(init=jax.jit(replay.init, static_argnums=(0, 1, 2, 3))), jax.jit(replay.mix_batch)


def run(history, replay, mix_batch, plain):
    """Both through a history of (prompt, kind of rewards) batches and gaps of steps; compare at each step."""
    buffer = replay.init(B, G, P, T)
    name, step = 1, 0
    for gap, groups in history:
        step += gap
        batch = [Stored(name + i, prompt, step, REWARDS[kind]) for i, (prompt, kind) in enumerate(groups)]
        name += B
        out, buffer = mix_batch(buffer, batch_of(batch, step), jnp.int32(step), jax.random.key(0))
        out, held = jax.device_get((out, buffer))
        expected = plain.mix_batch(batch, step)
        found = [int(n) if c else None for n, c in zip(out.tokens[:, 0, 0], out.counted, strict=True)]
        assert found == expected
        stored = {
            int(n): (int(s), int(u))
            for n, s, u, c in zip(
                held.groups.tokens[:, 0, 0], held.groups.step, held.uses, held.groups.counted, strict=True
            )
            if c
        }
        assert stored == {g.name: (g.step, g.uses) for g in plain.buffer}
        check_contents(out)


def check_contents(out):
    """A slot's arrays are all of one group; a slot without a group is masked and worth nothing."""
    out = jax.device_get(out)
    name = np.asarray(out.tokens[:, 0, 0])
    there = np.asarray(out.counted)
    np.testing.assert_array_equal(out.prompts.tokens[:, 0], name)
    np.testing.assert_allclose(out.log_probs[:, 1, 1], -name / 100, rtol=1e-6)
    np.testing.assert_allclose(out.advantages[:, 2], np.where(there, name / 10, 0), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(out.prompts.loss_weight)[there], name[there] / 1000, rtol=1e-6)
    assert np.asarray(out.mask).all(axis=(1, 2)).tolist() == there.tolist()
    ids = np.asarray(out.prompts.ids)[there]
    fresh = np.asarray(out.step == out.step.max())[there]
    # Stored groups never repeat a prompt; a batch that names one twice is its selector's doing.
    assert all(sum(ids == i) == 1 for i in ids[~fresh])


histories = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, len(REWARDS) - 1)), min_size=B, max_size=B),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(histories, st.sampled_from([(5, 3, 2), (3, 2, 1), (12, 6, 3), (1, 1, 1), (7, 9, 9)]))
def test_newest_first_is_the_deques(history, sizes):
    capacity, age, uses = sizes
    replay, mix_batch = made(capacity=capacity, max_age=age, max_uses=uses)
    run(history, replay, mix_batch, PlainReplay(capacity, age, uses))


@settings(max_examples=30)
@given(histories, st.sampled_from(["variance", "fresh_priority"]), st.sampled_from([1, 3]))
def test_other_orders_are_the_deques(history, order, least):
    replay, mix_batch = made(capacity=8, max_age=5, max_uses=2, min_age=least, order=order, tau=1.7)
    run(history, replay, mix_batch, PlainReplay(8, 5, 2, least, order=order, tau=1.7))


@given(histories, st.sampled_from([0.2, 0.4, 0.79, 1.0]))
def test_share_limits_what_is_replayed(history, share):
    replay, mix_batch = made(max_share=share)
    run(history, replay, mix_batch, PlainReplay(B, 3, 2, share=share))


def ring_with(groups, step, **fields):
    replay, mix_batch = made(**fields)
    return mix_batch(replay.init(B, G, P, T), batch_of(groups, step), jnp.int32(step), jax.random.key(0))[1]


def five(first, prompt, kinds, step):
    return [Stored(first + i, prompt + i, step, REWARDS[k]) for i, k in enumerate(kinds)]


def test_random_order_is_by_key_and_covers_all():
    fields = {"order": "random", "max_uses": 9}
    _, mix_batch = made(**fields)
    buffer = ring_with(five(1, 10, (2, 2, 2, 2, 2), 0), 0, **fields)
    batch = batch_of(five(6, 20, (0, 2, 2, 2, 2), 1), 1)
    seen = {int(mix_batch(buffer, batch, jnp.int32(1), jax.random.key(k))[0].tokens[0, 0, 0]) for k in range(60)}
    assert seen == {1, 2, 3, 4, 5}


def test_kl_order_takes_the_nearest_and_needs_a_measure():
    replay, _ = made(order="kl")
    buffer = ring_with(five(1, 10, (2, 2, 2, 2, 2), 0), 0)
    batch = batch_of(five(6, 20, (0, 0, 2, 2, 2), 1), 1)
    distance = lambda stored: jnp.abs(stored.tokens[:, 0, 0] - 3.2)  # noqa: E731
    out, _ = jax.jit(replay.mix_batch, static_argnums=4)(buffer, batch, jnp.int32(1), jax.random.key(0), distance)
    assert out.tokens[:2, 0, 0].tolist() == [3, 4]
    with pytest.raises(ValueError, match="distance"):
        replay.mix_batch(buffer, batch, jnp.int32(1), jax.random.key(0))


def test_nothing_changes_while_every_group_is_effective():
    _, mix_batch = made()
    buffer = ring_with(five(1, 10, (2, 3, 4, 2, 3), 0), 0)
    batch = batch_of(five(6, 20, (2, 3, 4, 2, 3), 1), 1)
    out, after = mix_batch(buffer, batch, jnp.int32(1), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, out, batch)
    assert sorted(after.groups.tokens[:, 0, 0].tolist()) == [6, 7, 8, 9, 10]


def test_missing_verdicts_make_no_group_effective():
    groups = batch_of(five(1, 10, (2, 3, 2, 2, 0), 0), 0)
    nan = jnp.nan
    rewards = (
        groups.rewards.at[0]
        .set(nan)
        .at[1]
        .set(jnp.array([nan, nan, nan, 1.0]))
        .at[2]
        .set(jnp.array([nan, 0.0, 0.0, 1.0]))
    )
    assert effective(dataclasses.replace(groups, rewards=rewards)).tolist() == [False, False, True, True, False]


def test_an_advantage_can_make_a_group_effective():
    groups = batch_of(five(0, 10, (0, 0, 1, 2, 0), 0), 0)
    assert effective(groups).tolist() == [False, False, False, True, False]
    assert effective(groups, "advantages").tolist() == [False, True, True, True, True]
    assert effective(keep(groups, jnp.arange(5) < 2), "advantages").tolist() == [False, True, False, False, False]


def test_the_filter_drops_ineffective_groups():
    replay = filter_ineffective(Config())
    groups = batch_of(five(1, 10, (2, 0, 1, 3, 2), 0), 0)
    out, state = replay.mix_batch((), groups, jnp.int32(0), jax.random.key(0))
    assert out.counted.tolist() == [True, False, False, True, True] and state == ()
    check_contents(out)


def test_the_guard_halves_the_share_and_lets_it_grow():
    replay, _ = made(ess_floor=0.5, max_share=0.8)
    buffer = replay.init(B, G, P, T)
    shares = []
    for ess in (0.1, 0.2, 0.3, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0):
        buffer = replay.adapt_share(buffer, jnp.float32(ess))
        shares.append(round(float(buffer.share), 4))
    assert shares == [0.4, 0.2, 0.2, 0.25, 0.3125, 0.3906, 0.4883, 0.6104, 0.7629]
    assert float(replay.adapt_share(buffer, jnp.float32(1.0)).share) == pytest.approx(0.8)
    off, _ = made(max_share=0.8)
    assert float(off.adapt_share(off.init(B, G, P, T), jnp.float32(0)).share) == pytest.approx(0.8)


def test_an_empty_batch_is_filled():
    """Dynamic sampling may have found nothing at all."""
    _, mix_batch = made()
    buffer = ring_with(five(1, 10, (2, 3, 4, 2, 3), 0), 0)
    out, _ = mix_batch(buffer, empty_groups(B, G, P, T), jnp.int32(1), jax.random.key(0))
    # Largest variance first; of equals the first of its batch.
    assert out.tokens[:, 0, 0].tolist() == [3, 2, 5, 1, 4]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=B, max_size=B), max_size=8))
def test_the_queue_is_a_list(rounds):
    """Groups wait in the order they came, no prompt twice; batches leave from the front."""
    queue, plain, name = new_queue(2 * B, G, P, T), [], 1
    for step, groups in enumerate(rounds):
        batch = [Stored(name + i, prompt, step, REWARDS[2]) for i, (prompt, _) in enumerate(groups)]
        name += B
        wanted = [want for _, want in groups]
        queue = jax.jit(append)(queue, batch_of(batch, step), jnp.asarray(wanted))
        for group, want in zip(batch, wanted, strict=True):
            if want and group.prompt not in {g.prompt for g in plain}:
                plain.append(group)
        assert int(queue.held) == len(plain)
        if len(plain) >= B or step % 3 == 2:
            first, queue = jax.jit(take_first, static_argnums=1)(queue, B)
            first = jax.device_get(first)
            assert first.tokens[first.counted, 0, 0].tolist() == [g.name for g in plain[:B]]
            assert first.step[first.counted].tolist() == [g.step for g in plain[:B]]
            check_contents(first)
            plain = plain[B:]
            assert int(queue.held) == len(plain)
