"""What FSDP must be in the compiled step: weights gathered a layer at a time, state that falls as 1/fsdp."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.planning.memory import bytes_per_device
from pspo_jax.planning.roofline import traffic
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.compile import lower_programs
from pspo_jax.training.setup import prepare
from tests.distributed.hlo import collectives
from tests.helpers import TINY, random_prompts, slow_except, tiny_config

LAYERS, WIDTH, MLP = 6, 64, 192


def setup_on(fsdp, tensor=1, **fields):  # mesh (1, fsdp, 1, tensor) unless fields say otherwise
    wide = {
        "model.layers": LAYERS,
        "model.width": WIDTH,
        "model.heads": 8,
        "model.kv_heads": 8,
        "model.head_dim": 8,
    }
    named = {k.replace(".", "__"): v for k, v in (TINY | wide | {"model.mlp_width": MLP}).items()}
    named |= {"mesh__data": 1, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "model__scan_unroll": 1}
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


MESHES = [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 4, 1), (2, 2, 2)]


@pytest.mark.parametrize("mesh", slow_except([(2, 2, 2)], [(1, 8, 1), (2, 4, 1), (2, 2, 2)]), ids=str)
def test_what_the_step_sends_is_what_arithmetic_says(mesh, capfd):
    """Gathers to 5 %: each weight once for the forward and once for the backward pass. The CPU's compiler has no
    reduce-scatter: its gradients are all-reduced whole, over all devices that hold rows."""
    data, fsdp, tensor = mesh
    # With an entropy bonus no completion is left out, and the program's text has the number of microbatches.
    setup = setup_on(fsdp, tensor, mesh__data=data, loss__microbatch_rows=16, loss__entropy_coef=0.01)
    with jax.set_mesh(setup.mesh):
        text = lower_programs(setup)["step"].compile().as_text()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    want, found = traffic(setup), collectives(text)

    gathered = sum(c.sent() for c in found if c.kind == "all-gather" and c.group == fsdp)
    assert gathered == pytest.approx(want.gathered, rel=0.05)
    if tensor == 1:  # else its reductions of activations are among them
        rows, weights = data * fsdp, sum(x.size for x in jax.tree.leaves(setup.abstract.params))
        all_reduced = 2 * 2 * 4 * weights * (rows - 1) / rows  # two microbatches
        assert sum(c.sent() for c in found if c.kind == "all-reduce") == pytest.approx(all_reduced, rel=0.05)
        assert want.reduced <= all_reduced


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_split_weights_decode_the_same(mesh):
    """Tokens are the gathered weights' own; no MLP, embedding or head is ever whole."""
    data, fsdp, tensor = mesh
    found, texts = {}, {}
    for weights in ("gathered", "split"):
        setup = setup_on(fsdp, tensor, mesh__data=data, rollout__weights=weights)
        params = jax.device_put(setup.model.init(jax.random.key(0)), setup.shardings.params)
        sample = make_sampler(setup.model, 4, 12, 14)
        args = params, random_prompts(8, 16), jax.random.key(1), SamplingParams.of(setup.config.rollout, (13,))
        with jax.set_mesh(setup.mesh):
            texts[weights] = sample.lower(*args).compile().as_text()
            found[weights] = sample(*args)
    np.testing.assert_array_equal(found["gathered"].tokens, found["split"].tokens)
    np.testing.assert_allclose(found["gathered"].log_probs, found["split"].log_probs, atol=1e-5)

    def whole(text):
        return sum(MLP // tensor in shape and WIDTH in shape for shape in gathers(text))

    # Prefill gathers a layer at a time, in its scan's body; decoding gathers every layer's.
    assert whole(texts["split"]) == 3
    assert whole(texts["gathered"]) == 3 + 3 * LAYERS


def test_split_weights_must_divide():
    with pytest.raises(ConfigError, match=r"rollout.weights=split.*=8: does not divide model.mlp_width=180; 6 would"):
        setup_on(8, model__mlp_width=180, rollout__weights="split")
