"""Attention by tokamax: the call of its kernels, by its own XLA implementation, and their code for a GPU.

It needs Python 3.12, so that most environments lack it. Pallas's interpreter does not take the backward pass of its
kernels for GPUs, which are compiled here only as far as a machine without a GPU can.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

from pspo_jax.config.schema import ModelConfig
from pspo_jax.model import built_in
from pspo_jax.model.attention.kernels import KERNELS, by_tokamax
from pspo_jax.model.attention.probe import difference, with_kernels

tokamax = pytest.importorskip("tokamax", reason="the extra tokamax, for Python 3.12, is not installed")


def shape():
    a = built_in(ModelConfig(heads=4, kv_heads=2, head_dim=64), 32)
    return dataclasses.replace(a, compute_dtype="bfloat16")


@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_equal_attention_by_xla(packed):
    def run(name, q, k, v, scale, segments):
        return by_tokamax("xla")(q, k, v, segments, scale, False)

    assert difference("any", shape(), 200, packed, run) is None


@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward_pass_become_code_for_a_gpu_that_is_not_there(packed):
    """Only by Triton: the Mosaic kernel asks the first device of the machine which GPU it is for."""
    rows, length = 2, 512
    q, k, v = (jax.ShapeDtypeStruct((rows, length, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32) if packed else None

    def both(q, k, v, segments):
        out, back = jax.vjp(lambda *x: KERNELS["tokamax_triton"].run(*x, segments, 0.125, False), q, k, v)
        return out, back(out)

    kind = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": None, "platform": "gpu"}
    names = inspect.signature(jax.sharding.AbstractDevice).parameters
    gpu = jax.sharding.AbstractDevice(**{name: value for name, value in kind.items() if name in names})
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)
    with tokamax.config.cross_compile(True), jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(both).trace(q, k, v, segments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "pallas_flash_attention_fwd" in text and "pallas_flash_attention_vjp" in text


def test_auto_tries_it_before_triton_and_drops_it_where_it_does_not_run():
    one, said = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, []
    a = with_kernels(shape(), "auto", "gpu", 2048, one, probe=False, say=said.append)
    assert (a.attention, a.packed_attention) == ("cudnn", "tokamax_mosaic")
    a = with_kernels(shape(), "auto", "gpu", 512, one, probe=True, say=said.append)
    assert (a.attention, a.packed_attention) == ("xla", "xla")
    dropped = [line.split(" dropped: it raised ")[0].removeprefix("attention: ") for line in said[1:-1]]
    names = ["tokamax_mosaic", "tokamax_triton", "triton"]
    assert dropped == ["cudnn", *names, *(f"{name} for packed rows" for name in names)]
