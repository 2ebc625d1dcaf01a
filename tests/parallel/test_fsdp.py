"""What FSDP must be in the compiled step: weights gathered a layer at a time, state that falls as 1/fsdp."""

import re

import jax
import jax.numpy as jnp
import pytest

from pspo_jax.plan import bytes_per_device
from pspo_jax.programs import lower_programs
from pspo_jax.setup import prepare
from tests.helpers import TINY, tiny_config

LAYERS, WIDTH, MLP = 6, 64, 192


def setup_on(fsdp, tensor=1, **fields):
    wide = {
        "policy.layers": LAYERS,
        "policy.width": WIDTH,
        "policy.heads": 8,
        "policy.kv_heads": 8,
        "policy.head_dim": 8,
    }
    named = {k.replace(".", "__"): v for k, v in (TINY | wide | {"policy.mlp_width": MLP}).items()}
    named |= {"mesh__data": 1, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "policy__scan_unroll": 1}
    return prepare(tiny_config(**(named | fields)))


@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_parameters_and_optimizer_state_fall_as_one_over_fsdp(fsdp):
    one, many = setup_on(1).abstract, setup_on(fsdp).abstract
    for part in ("params", "opt_state"):
        whole, share = (bytes_per_device(getattr(s, part)) for s in (one, many))
        # Norms and counters are not split.
        small = sum(4 * x.size for x in jax.tree.leaves(getattr(one, part)) if x.size <= LAYERS * WIDTH)
        assert share <= (whole - small) / fsdp + small + 1
        assert share < whole / fsdp * 1.25


def gathers(text):
    """Shapes that all-gathers produce."""
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\][^=]*? all-gather\(", text)]


def test_the_step_gathers_a_layer_and_scatters_gradients():
    setup = setup_on(8)
    with jax.set_mesh(setup.mesh):
        compiled = lower_programs(setup)["step"].compile()
    text = compiled.as_text()
    shapes = gathers(text)
    assert any(MLP in shape for shape in shapes), shapes
    # The stacked weights of all layers are never whole on a device.
    whole = [s for s in shapes if s[0] == LAYERS and jnp.prod(jnp.array(s)) >= LAYERS * WIDTH * WIDTH]
    assert not whole, whole
    assert "reduce-scatter" in text or "all-reduce" in text
