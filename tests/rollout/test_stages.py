"""Rollouts in slots and stages: equal to the static batch to the bit, and in no more memory than was asked for."""

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
from pspo_jax.rollout import SamplingParams, counting_sampler, make_sampler
from pspo_jax.rollout.stages import Stage, automatic_stages, cache_columns, make_stages
from tests.helpers import random_prompts, slow_except, tiny_policy
from tests.xla import AS_USERS_DO

EOS, PAD, T, G, B = 13, 14, 32, 4, 8
ROWS = B * G
FIELDS = ("tokens", "mask", "lengths", "ended", "log_probs", "sampling_log_probs")


def settings(top_p=1.0, stop=(EOS,), limit=T):
    stop = jnp.asarray([*stop, *[-1] * (13 - len(stop))], jnp.int32)
    return SamplingParams(jnp.float32(0.8), jnp.float32(top_p), jnp.int32(0), stop, jnp.int32(limit))


@functools.cache
def sampler(slots=None, stages=1):
    model, params, _ = tiny_policy()
    sample = jax.jit(counting_sampler(model, G, T, PAD, slots, 1, stages), compiler_options=AS_USERS_DO)
    prompts = random_prompts(B, 9)
    return lambda *args: sample(params, prompts, jax.random.key(0), settings(*args))


CASES = {
    "some end in each stage": (1.0, (EOS,)),
    "top-p": (0.9, (EOS,)),
    "none ends early": (1.0, ()),
    "most end in the first token": (1.0, tuple(range(11))),
    "all end in the first stage": (1.0, tuple(range(7))),
}
LAYOUTS = [(8, 3), (1, 1), (3, 1), (31, 1), (5, 2), (12, 2), (4, 3), (16, 4), (31, 4)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("slots", "stages"), slow_except([(8, 3)], LAYOUTS, several=True))
def test_stages_change_no_bit(slots, stages, case):
    """Whatever the memory and the number of stages are, tokens and log-probs are those of the static batch."""
    want, _ = sampler()(*CASES[case])
    got, _ = sampler(slots, stages)(*CASES[case])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(want, name), getattr(got, name), name)


def test_rows_end_where_stages_do():
    """The cases above have rows that end in the first token, at each stage's last token, and one token later."""
    columns = [stage.columns for stage in make_stages(8, 3, T, ROWS)]
    found = {int(n) for case in CASES.values() for n in np.asarray(sampler()(*case)[0].lengths).ravel()}
    assert {1, T} <= found and all({n, n + 1} & found for n in columns[:-1])
    for limit in (columns[0], columns[0] + 1, columns[0] + 2, 1):
        want, got = (one(1.0, (EOS,), limit)[0] for one in (sampler(), sampler(8, 3)))
        assert int(got.lengths.max()) == limit
        np.testing.assert_array_equal(want.log_probs, got.log_probs)


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
                for i, held in enumerate(slots):
                    if held and held[1] == stage.columns + 1 and not is_last:
                        queues[j + 1].append(held[0])
                        slots[i] = None
                for i in range(stage.slots):
                    if slots[i] is None and queues[j] and free() > 0:
                        slots[i] = queues[j].pop(0), at
                for _ in range(chunk):
                    steps[j] += 1
                    moved = [held and (held[0], min(held[1] + 1, stage.columns + 1)) for held in slots]
                    slots[:] = [held if held and held[1] < lengths[held[0]] else None for held in moved]
    return steps


@pytest.mark.parametrize(("slots", "stages"), slow_except([(8, 3)], LAYOUTS, several=True))
def test_the_work_is_that_of_a_simulation(slots, stages):
    """Slots take rows as documented: a simulation of the lengths alone has as many steps and reads as many columns."""
    for case in CASES.values():
        rollouts, computed = sampler(slots, stages)(*case)
        shapes = make_stages(slots, stages, T, ROWS)
        steps = simulate(np.asarray(rollouts.lengths).ravel().tolist(), shapes, 1)
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
    assert all(a.columns == -(-b.columns // 2) and a.slots >= b.slots for a, b in itertools.pairwise(stages))
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


def test_stages_on_eight_devices_change_no_bit():
    """Each device moves rows from stage to stage among its own slots."""
    model, params, _ = tiny_policy()
    args = random_prompts(B, 9), jax.random.key(0), settings()
    at_once = make_sampler(model, G, T, PAD)(params, *args)
    mesh = make_mesh(replace(Config(), {"mesh.data": 2, "mesh.fsdp": 4}))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, params_shardings(mesh, params, model.axes))
        in_stages = make_sampler(model, G, T, PAD, slots=16, stages=2)(split, *args)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(at_once, name), getattr(in_stages, name), name)


def test_too_little_memory_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.stages=4: slots=2 a device have no room .* set rollout.slots to"):
        make_stages(2, 4, 4096, 256)
    with pytest.raises(ConfigError, match=r"rollout.stages=6: T=31 tokens are too few"):
        make_stages(30, 6, 31, 256)
