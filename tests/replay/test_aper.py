"""Which completions are stored, evicted and drawn, against plain Python; and how often each is drawn."""

from functools import lru_cache
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.groups import split_groups
from pspo_jax.arrays.state import Prompts
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, extra_completions, rollout_capacity, update_completions
from pspo_jax.config.validation import validate
from pspo_jax.replay import Groups, aper
from tests.replay.oracle import PlainRollouts

B, G, P, T = 3, 4, 3, 2
ADVANTAGES = (0.0, -0.5, 0.25, 2.0, -1.0)


def config_of(**fields):
    named = {"algorithm.name": "aper", "rollout.prompts": B, "rollout.group_size": G}
    return resolve(replace(Config(), named | {k.replace("__", "."): v for k, v in fields.items()}))


@lru_cache(maxsize=16)
def made(**fields):
    replay = aper(config_of(**fields))
    return replay, jax.jit(replay.add_rollouts)


def batch_of(first, step, advantages):
    """Groups of which every array holds the completion's name, or that of its group's first completion."""
    names = first + np.arange(B * G, dtype=np.int32).reshape(B, G)
    tokens = np.broadcast_to(names[..., None], (B, G, T))
    group, full = names[:, 0], np.float32(names)
    return Groups(
        prompts=Prompts(group, np.broadcast_to(group[:, None], (B, P)), np.full(B, 2, np.int32), full[:, 0] / 1000),
        tokens=tokens,
        mask=np.ones((B, G, T), bool),
        log_probs=-np.float32(tokens) / 1000,
        rewards=full / 10,
        advantages=np.float32(advantages).reshape(B, G),
        ended=np.ones((B, G), bool),
        step=np.full(B, step, np.int32),
        counted=np.ones(B, bool),
    )


def entries(groups):
    """(name, step, advantage) of the counted completions; checks that all arrays of one are of the same completion."""
    groups = jax.device_get(groups)
    there, name = groups.counted, groups.tokens[:, 0, 0]
    assert (groups.mask == there[:, None, None]).all() and not groups.advantages[~there].any()
    np.testing.assert_allclose(groups.log_probs[:, 0, 1], -name / 1000, rtol=1e-6)
    np.testing.assert_allclose(groups.rewards[:, 0], name / 10, rtol=1e-6)
    # The prompt is that of the completion's group: no completion may change its prompt on the way.
    prompt = groups.prompts.ids[there]
    assert (groups.prompts.tokens[there] == prompt[:, None]).all()
    assert ((name[there] - prompt >= 0) & (name[there] - prompt < G)).all()
    np.testing.assert_allclose(groups.prompts.loss_weight[there], prompt / 1000, rtol=1e-6)
    rows = zip(name[there], groups.step[there], groups.advantages[there, 0], strict=True)
    return [(int(n), int(s), float(a)) for n, s, a in rows]


histories = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.sampled_from(ADVANTAGES), min_size=B * G, max_size=B * G)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25)
@given(histories, st.sampled_from([(0, 3, 1, 3), (7, 4, 2, 7), (5, 9, 1, 1)]), st.integers(0, 9))
def test_the_buffer_is_the_lists_and_draws_come_from_it(history, sizes, seed):
    """Entry, eviction and order; never too old, never advantage 0, never twice, and as many as there are places."""
    capacity, max_age, min_age, extra = sizes
    fields = {"capacity": capacity, "max_age": max_age, "min_age": min_age, "extra": extra}
    replay, add_rollouts = made(**{f"replay__{k}": v for k, v in fields.items()})
    buffer = replay.init(B, G, P, T)
    plain = PlainRollouts(capacity or B * G * max_age, max_age, min_age)
    first, step, key = 1, 0, jax.random.key(seed)
    for gap, advantages in history:
        step += gap
        batch = batch_of(first, step, advantages)
        able = plain.able(step)
        kept, same = replay.mix_batch(buffer, batch, step, key)
        assert kept is batch and same is buffer
        added, buffer = add_rollouts(buffer, batch, np.int32(step), key)
        drawn = entries(added)
        assert added.tokens.shape == (extra, 1, T) and len(drawn) == min(extra, len(able))
        assert set(drawn) <= able and len(set(drawn)) == len(drawn)
        assert all(min_age <= step - s <= max_age and a != 0 for _, s, a in drawn)
        plain.enter([(first + i, step, a) for i, a in enumerate(advantages)])
        assert sorted(entries(buffer.groups)) == sorted(plain.buffer)
        first += B * G


def full(advantages, **fields):
    """A replay whose buffer holds completions of step 0 with these advantages."""
    replay, add_rollouts = made(**fields)
    _, buffer = add_rollouts(replay.init(B, G, P, T), batch_of(1, 0, advantages), jnp.int32(0), jax.random.key(0))
    nothing = batch_of(100, 1, [0.0] * (B * G))
    return lambda buffer, key: add_rollouts(buffer, nothing, jnp.int32(1), key)[0], buffer


def in_turn(weights, number):
    """Probability that each entry is among `number` successive draws in proportion to the weights."""
    found = np.zeros(len(weights))
    for chosen in permutations(range(len(weights)), number):
        left, probability = sum(weights), 1.0
        for i in chosen:
            probability *= weights[i] / left
            left -= weights[i]
        found[list(chosen)] += probability
    return found


@pytest.mark.parametrize("number", [1, 3])
def test_completions_are_drawn_in_proportion_to_the_size_of_their_advantages(number):
    advantages = [0.1, -0.2, 0.4, -0.8, 1.6, 0.0, 0.0, 2.5, 0.0, -0.05, 0.35, -0.35]
    draw, buffer = full(advantages, replay__extra=number)
    keys = jax.random.split(jax.random.key(5), 20_000)
    names = np.asarray(jax.jit(jax.vmap(lambda key: draw(buffer, key).tokens[:, 0, 0]))(keys))
    found = np.bincount(names.ravel(), minlength=B * G + 1)[1:] / len(keys)
    want = in_turn(np.abs(advantages), number)
    assert found[np.array(advantages) == 0].sum() == 0
    # Five standard errors of a share of 20,000 draws.
    assert (np.abs(found - want) <= 5 * np.sqrt(want * (1 - want) / len(keys)) + 1e-12).all()


def test_a_changed_stored_advantage_changes_what_is_drawn():
    draw, buffer = full([0.5] * 6 + [-0.5] * 6, replay__extra=1)
    keys = jax.random.split(jax.random.key(1), 50)
    before = [int(draw(buffer, key).tokens[0, 0, 0]) for key in keys]
    slot = int(jnp.argmax(buffer.groups.tokens[:, 0, 0] == 4))
    raised = buffer.groups.advantages.at[slot].set(-1e4)
    changed = buffer.replace(groups=buffer.groups.replace(advantages=raised))
    after = [int(draw(changed, key).tokens[0, 0, 0]) for key in keys]
    assert len(set(before)) > 5 and set(after) == {4}
    # Stored advantages come back as they were, and their sign does not matter to the draw.
    assert float(draw(changed, keys[0]).advantages[0, 0]) == -1e4


def test_a_completion_without_a_token_in_the_loss_does_not_enter():
    batch = batch_of(1, 0, [1.0] * (B * G))
    batch.ended[1] = False
    for masked, stored in ((False, 12), (True, 8)):
        replay, add_rollouts = made(loss__mask_truncated=masked)
        _, buffer = add_rollouts(replay.init(B, G, P, T), batch, jnp.int32(0), jax.random.key(0))
        assert int(buffer.groups.counted.sum()) == stored


def test_a_group_splits_into_its_completions():
    batch = batch_of(1, 3, [1.0] * (B * G))
    found = split_groups(batch)
    assert entries(found) == [(1 + i, 3, 1.0) for i in range(B * G)]
    assert found.prompts.ids.tolist() == np.repeat(batch.prompts.ids, G).tolist()


@pytest.mark.parametrize(("group_size", "extra"), [(2, 3), (4, 3), (7, 3), (8, 6), (16, 12)])
def test_a_quarter_of_the_batch_comes_back_by_default(group_size, extra):
    config = config_of(rollout__group_size=group_size)
    assert extra_completions(config) == extra
    assert update_completions(config) == B * group_size + extra
    assert rollout_capacity(config) == 3 * B * group_size
    assert extra_completions(config_of(algorithm__name="popo")) == 0


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"replay.extra": 9, "loss.minibatches": 2}, "replay.extra=9: must be a multiple of loss.minibatches=2"),
        ({"replay.capacity": 10}, "replay.extra=64: is more than the 10 completions that are stored"),
        ({"replay.extra": 1000}, "replay.extra=1000: is more than the 768 completions that are stored"),
        ({"replay.max_age": 2**17}, "replay.max_age=131072: would store 33554432 completions"),
        ({"replay.min_age": 4}, "replay.min_age=4: must be at most replay.max_age=3"),
        (
            {"replay.max_uses": 3},
            "replay.name=aper does not read it; drop it, or set replay.name to popo",
        ),
        ({"replay.order": "random"}, "replay.order=random: replay.name=aper does not read it"),
        ({"replay.effective": "advantages"}, "replay.effective=advantages: replay.name=aper"),
        ({"replay.extra": 8, "algorithm.name": "popo"}, "replay.extra=8: replay.name=popo does not read it"),
        ({"replay.max_age": 9, "algorithm.name": "grpo"}, "set replay.name to popo or aper"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(values, line):
    with pytest.raises(ConfigError) as error:
        validate(replace(Config(), {"algorithm.name": "aper"} | values))
    assert line in str(error.value) and "\n" not in str(error.value)
