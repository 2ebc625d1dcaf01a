"""Properties of the compiled sampler that hold on every machine."""

import re

import jax
import jax.numpy as jnp
import pytest

from pspo_jax.rollout import SamplingParams, make_sampler, sampler
from tests.helpers import random_prompts, tiny_policy

SETTINGS = SamplingParams(jnp.float32(1.0), jnp.float32(1.0), jnp.int32(0), jnp.asarray([13], jnp.int32), jnp.int32(17))


def loop_bodies(text):
    """Text, by name, of the computations that a compiled program runs in loops, and of those that they call."""
    found = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    wanted, bodies = set(re.findall(r"body=%?([\w.\-]+)", text)), {}
    while wanted:
        name = wanted.pop()
        if name in found and name not in bodies:
            bodies[name] = found[name]
            wanted |= set(re.findall(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+)", found[name]))
    return bodies


@pytest.mark.parametrize(
    ("longest", "slots", "stages", "shapes"),
    [
        pytest.param(17, None, 1, ["5,3,2,17,4"], marks=pytest.mark.slow),
        pytest.param(17, 7, 1, ["7,2,17,4"], marks=pytest.mark.slow),
        # The slots of both stages, and the rows that wait between them.
        (128, 12, 2, ["4,2,64,4", "2,2,128,4", "15,2,64,4"]),
    ],
)
def test_no_cache_is_copied_in_a_loop(longest, slots, stages, shapes, monkeypatch):
    """A copy of the cache for each token would double the bytes that decoding reads.

    Where stages begin and rows move between them, no more is copied than those rows.
    """
    monkeypatch.setattr(sampler, "SMALLEST_CACHE_TOKENS", 4)
    model, params, _ = tiny_policy(kv_heads=2, head_dim=4)
    sample = make_sampler(model, 3, longest, 14, slots, 1, stages)
    text = sample.lower(params, random_prompts(5, 9), jax.random.key(0), SETTINGS).compile().as_text()
    bodies = loop_bodies(text)
    for shape in shapes:
        held = [line for body in bodies.values() for line in body.splitlines() if f"f32[{shape}]" in line]
        # The cache is there, under this shape.
        assert any("dynamic-update-slice" in line or "scatter" in line for line in held)
        # A stage begins with a copy of a constant, which is how the compiler writes zeros.
        copies = [line for line in held if re.search(rf"= f32\[{shape}\]\S* copy\((?!%\w*broadcast)", line)]
        assert not copies, copies
