"""Rollouts in slots and stages: equal to the static batch, and in no more memory than was asked for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.model.interface import MASKED
from pspo_jax.rollout import SamplingParams, counting_sampler
from pspo_jax.rollout.stages import Stage, automatic_stages, cache_columns, make_stages
from tests.helpers import random_prompts, slow_except, tiny_policy
from tests.xla import AS_USERS_DO

EOS, PAD, T, G, B = 13, 14, 256, 2, 8
ROWS = B * G


def settings(top_p=1.0, limit=T):
    return SamplingParams(
        jnp.float32(0.8), jnp.float32(top_p), jnp.int32(0), jnp.asarray([EOS], jnp.int32), jnp.int32(limit)
    )


def ending(model):
    """The model with the length of each prompt's completions in its params, and EOS at these lengths alone."""

    def at_end(logits, length, t):
        others = logits.at[..., EOS].set(MASKED)
        end = jnp.full_like(logits, MASKED).at[..., EOS].set(0)
        return jnp.where((length == t + 1)[..., None], end, others)

    def decoder(params, *args):
        inner, lengths = model.decoder(params[0], *args), params[1]

        def step(cache, tokens, t):
            logits, cache = inner.step(cache, tokens, t)
            return at_end(logits, lengths[:, None], t + 1), cache

        return inner._replace(logits=at_end(inner.logits, lengths, 0), step=step)

    def slots(params, prompts, *args):
        inner, lengths = model.slots(params[0], prompts, *args), params[1]
        shards = args[1]

        def load(held, slot, prompt, waiting, place):
            cache, length = held
            new = jax.vmap(lambda x, i: x[i])(lengths.reshape(shards, -1), prompt)
            length = jax.vmap(lambda x, i, value: x.at[i].set(value, mode="drop"))(length, slot, new)
            return inner.load(cache, slot, prompt, waiting, place), length

        def step(held, tokens, t):
            logits, cache = inner.step(held[0], tokens, t)
            return at_end(logits, held[1], t + 1), (cache, held[1])

        return inner._replace(
            logits=at_end(inner.logits, lengths, 0),
            slots=lambda rows, columns: (inner.slots(rows, columns), jnp.zeros((shards, rows), jnp.int32)),
            load=load,
            save=lambda waiting, place, held, slot: inner.save(waiting, place, held[0], slot),
            step=step,
        )

    return model._replace(decoder=decoder, slots=slots)


@functools.cache
def sampler(slots=None, stages=1):
    """sample(lengths of the prompts' completions, ...) of the tiny policy."""
    model, params, _ = tiny_policy()
    sample = jax.jit(counting_sampler(ending(model), G, T, PAD, slots, 1, stages), compiler_options=AS_USERS_DO)
    prompts, key = random_prompts(B, 9), jax.random.key(0)
    return lambda lengths, *args: sample((params, jnp.asarray(lengths)), prompts, key, settings(*args))


CASES = {
    "rows end at each boundary": ([200, 1, 64, 65, 66, 128, 129, T],),
    "top-p": ([1, 40, 65, 66, T, 129, 200, 130], 0.9),
    "none ends early": ([T + 1] * B,),
    "all end in the first token": ([1] * B,),
    "all end in the first stage": ([40, 2, 3, 64, 17, 5, 64, 1],),
    "all reach the second stage and end there": ([65, 66, 100, 128, 127, 65, 66, 101],),
    "a limit at a boundary": ([200, 1, 64, 65, 66, 128, 129, T], 1.0, 65),
}
LAYOUTS = [(8, 3), (1, 1), (3, 1), (15, 1), (5, 2), (12, 2), (4, 3), (15, 3)]


@pytest.mark.parametrize(("slots", "stages"), slow_except([(5, 2)], LAYOUTS, several=True))
def test_stages_change_no_row(slots, stages):
    """Whatever the memory and the number of stages are, rows are those of the static batch."""
    for case in CASES.values():
        want, _ = sampler()(*case)
        got, _ = sampler(slots, stages)(*case)
        limit = case[2] if len(case) > 2 else T
        np.testing.assert_array_equal(got.lengths, np.minimum(case[0], limit)[:, None].repeat(G, 1))
        assert_equal(want, got)


def assert_equal(want, got):
    """Tokens are equal, and log-probs but for a last bit or two: the order of sums differs with the number of rows."""
    for name in ("tokens", "mask", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(want, name), getattr(got, name), name)
    for name in ("log_probs", "sampling_log_probs"):
        np.testing.assert_allclose(getattr(want, name), getattr(got, name), atol=2e-6, err_msg=name)


def simulate(lengths, stages, chunk):
    """Decoding steps of each stage, by plain Python over the lengths of the rows."""
    queues = [[row for row, n in enumerate(lengths) if n > 1], *([] for _ in stages[1:])]
    steps = [0] * len(stages)
    while any(queues):
        for j, stage in enumerate(stages):
            is_last = j == len(stages) - 1
            at = 1 if j == 0 else stages[j - 1].columns + 1  # tokens that a row has as it comes
            slots = [None] * stage.slots  # (row, tokens)

            def free(queues=queues, slots=slots, j=j, stage=stage, is_last=is_last):
                waiting = 0 if is_last else stages[j + 1].waiting - len(queues[j + 1])
                return stage.slots if is_last else waiting - sum(map(bool, slots))

            while any(slots) or (queues[j] and free() > 0):
                full = [i for i, held in enumerate(slots) if held and held[1] == stage.columns + 1 and not is_last]
                empty = [i for i, held in enumerate(slots) if not held]
                queues[min(j + 1, len(stages) - 1)] += [slots[i][0] for i in full]
                for i in full:
                    slots[i] = None
                for i in full + empty:
                    if queues[j] and free() > 0:
                        slots[i] = queues[j].pop(0), at
                for _ in range(chunk):
                    steps[j] += 1
                    moved = [held and (held[0], min(held[1] + 1, stage.columns + 1)) for held in slots]
                    slots[:] = [held if held and held[1] < lengths[held[0]] else None for held in moved]
    return steps


@pytest.mark.parametrize(("slots", "stages"), slow_except([(5, 2)], LAYOUTS, several=True))
def test_the_work_is_that_of_a_simulation(slots, stages):
    """Slots take rows as documented: a simulation of the lengths alone has as many steps and reads as many columns."""
    for case in list(CASES.values())[:-1]:
        rollouts, computed = sampler(slots, stages)(*case)
        shapes = make_stages(slots, stages, T, ROWS)
        steps = simulate(np.asarray(rollouts.lengths).ravel().tolist(), shapes, T // 32)
        assert int(computed.tokens) == ROWS + sum(n * stage.slots for n, stage in zip(steps, shapes, strict=True))
        columns = sum(n * stage.slots * stage.columns for n, stage in zip(steps, shapes, strict=True))
        assert float(computed.columns) == columns


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40_000), st.integers(1, 2000))
def test_stages_need_no_more_memory_than_their_slots(slots, count, longest, rows):
    try:
        stages = make_stages(slots, count, longest, rows)
    except ConfigError as error:
        assert f"rollout.stages={count}" in str(error) and "\n" not in str(error)
        return
    assert cache_columns(stages) <= slots * longest
    assert len(stages) == count and stages[-1].columns == longest
    for before, now in itertools.pairwise(stages):
        assert now.columns / 2 <= before.columns < min(now.columns / 2 + 64, now.columns)
        assert before.slots >= now.slots and before.columns % 64 == 0
    assert all(1 <= stage.slots <= rows and stage.waiting <= rows for stage in stages)
    assert stages[0].waiting == 0 and all(stage.waiting for stage in stages[1:])


def test_the_number_of_stages_follows_the_bytes_that_are_read():
    """They pay for long completions in large caches, and not where weights are most of what a token reads."""
    assert make_stages(16, 1, 4096, 256) == [Stage(16, 4096, 0)]
    assert make_stages(16, 4, 4096, 256) == [
        Stage(8, 512, 0),
        Stage(4, 1024, 40),
        Stage(2, 2048, 20),
        Stage(1, 4096, 10),
    ]
    assert automatic_stages(32, 4096, 2048, 4e6) == 5
    assert automatic_stages(32, 1024, 2048, 4e6) == 3
    assert automatic_stages(32, 256, 2048, 4e6) == 1
    assert automatic_stages(32, 16_384, 28_672, 3e9) == 1
    assert automatic_stages(256, 16_384, 28_672, 3e9) > 1


@pytest.mark.slow
def test_stages_on_several_devices_change_no_row():
    """Each device moves rows from stage to stage among its own slots."""
    model, params, _ = tiny_policy()
    args = random_prompts(B, 9), jax.random.key(0)
    lengths = jnp.asarray(CASES["rows end at each boundary"][0])
    at_once, _ = sampler()(lengths)
    mesh = make_mesh(replace(Config(), {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, params_shardings(mesh, params, model.axes)), lengths
        sample = counting_sampler(ending(model), G, T, PAD, slots=12, stages=2)
        in_stages, _ = jax.jit(sample, compiler_options=AS_USERS_DO)(split, *args, settings())
    assert_equal(at_once, in_stages)


@pytest.mark.slow
def test_slots_on_eight_devices_change_no_row():
    model, params, _ = tiny_policy()
    lengths = jnp.asarray(CASES["rows end at each boundary"][0])
    at_once, _ = sampler()(lengths)
    mesh = make_mesh(replace(Config(), {"mesh.data": 4, "mesh.fsdp": 2}))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, params_shardings(mesh, params, model.axes)), lengths
        sample = counting_sampler(ending(model), G, T, PAD, slots=8)
        in_slots, _ = jax.jit(sample, compiler_options=AS_USERS_DO)(
            split, random_prompts(B, 9), jax.random.key(0), settings()
        )
    assert_equal(at_once, in_slots)


def test_too_little_memory_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.stages=4: slots=2 a device have no room .* set rollout.slots to"):
        make_stages(2, 4, 4096, 256)
    with pytest.raises(ConfigError, match=r"rollout.stages=6: rollout.max_new_tokens=300 .* choose 4"):
        make_stages(30, 6, 300, 256)
