"""Attention kernels: right where they can be run here, and found out where they are wrong."""

import dataclasses
import re
import sys
from functools import partial
from importlib.machinery import PathFinder

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.distributed.mesh import AXES
from pspo_jax.model import built_in, transformer
from pspo_jax.model.attention.kernels import candidates, run_kernel
from pspo_jax.model.attention.probe import difference, with_kernels
from pspo_jax.model.attention.xla import attend
from pspo_jax.model.interface import Packed
from tests.helpers import slow_except

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
interpreted = partial(run_kernel, interpret=True)


class Refuses:
    """A finder of modules, for `sys.meta_path`, by which a module and all below it cannot be imported."""

    def __init__(self, refused):
        self.refused = refused

    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(self.refused + "."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refuse(monkeypatch, module):
    for name in [name for name in sys.modules if (name + ".").startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuses(module), *sys.meta_path])


@pytest.fixture(autouse=True)
def without_tokamax(monkeypatch):
    """The tests here are of an environment without this package; test_tokamax.py has those with it."""
    refuse(monkeypatch, "tokamax")


def shape(heads=4, kv_heads=2, head_dim=16, **fields):
    a = built_in(ModelConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim), 32)
    return dataclasses.replace(a, **({"compute_dtype": "bfloat16"} | fields))


def test_a_folder_of_a_packages_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "tokamax").mkdir()
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "tokamax_triton" not in candidates()


@pytest.mark.parametrize("packed", slow_except([True], [False, True]))
@pytest.mark.parametrize("name", ["splash", "triton"])
def test_kernels_equal_attention_by_xla(name, packed):
    assert difference(name, shape(), 200, packed, interpreted) is None


def test_splash_with_a_head_for_each_key_and_whole_tiles():
    assert difference("splash", shape(heads=2), 256, False, interpreted) is None


def test_the_probe_finds_a_kernel_that_ignores_segments():
    def ignores(name, q, k, v, scale, segments):
        return attend(q, k, v, scale)

    assert difference("any", shape(), 64, False, ignores) is None
    assert "is wrong by" in difference("any", shape(), 64, True, ignores)


def test_the_probe_finds_a_wrong_gradient():
    def constant_keys(name, q, k, v, scale, segments):
        return attend(q, jax.lax.stop_gradient(k), v, scale, packed=Packed(segments, segments))

    assert difference("any", shape(), 64, True, constant_keys).endswith("in dk")


def test_the_probe_finds_what_raises_and_what_is_not_a_number():
    def raises(name, q, k, v, scale, segments):
        raise NotImplementedError("no such device\nmore")

    def nan(name, q, k, v, scale, segments):
        return attend(q, k, v, scale) * jnp.nan

    assert difference("any", shape(), 64, False, raises) == "raised NotImplementedError: no such device"
    assert "is wrong by inf" in difference("any", shape(), 64, False, nan)


def test_cudnn_is_dropped_where_there_is_none():
    assert difference("cudnn", shape(), 64, False).startswith("raised ")


@pytest.mark.parametrize(
    ("platform", "fields", "found"),
    [
        ("cpu", {}, ("xla", "xla")),
        ("tpu", {}, ("splash", "splash")),
        ("gpu", {}, ("cudnn", "triton")),
        ("tpu", {"windows": (None, 64)}, ("xla", "xla")),
        ("tpu", {"compute_dtype": "float32"}, ("xla", "xla")),
        ("gpu", {"head_dim": 96}, ("xla", "xla")),
    ],
)
def test_what_auto_takes_on_a_machine_that_is_not_there(platform, fields, found):
    said = []
    a = with_kernels(shape(**fields), "auto", platform, 2048, ONE, probe=False, say=said.append)
    assert (a.attention, a.packed_attention) == found
    assert len(said) == (0 if platform == "cpu" else 1 + (fields != {}) * (3 if platform == "gpu" else 2))


def test_kernels_or_shared_prompts_in_packed_rows():
    """The kernels that are there know no shared prompt; a config that wants them gets XLA's attention."""
    for share, name in ((None, "splash"), (False, "splash"), (True, "xla")):
        a = with_kernels(shape(), "auto", "tpu", 2048, ONE, probe=False, say=lambda _: None, share_prompts=share)
        assert (a.attention, a.packed_attention) == ("splash", name)
        assert transformer(a).shares == (name == "xla")


def test_auto_leaves_short_rows_and_rows_along_context_to_xla():
    for places, mesh in ((256, ONE), (2048, ONE | {"context": 2})):
        a = with_kernels(shape(), "auto", "tpu", places, mesh, probe=False, say=lambda _: None)
        assert a.attention == "xla"


def test_a_kernel_that_does_not_run_here_is_dropped_by_auto_with_a_line_each():
    said = []
    a = with_kernels(shape(), "auto", "gpu", 512, ONE, probe=True, say=said.append)
    assert (a.attention, a.packed_attention) == ("xla", "xla")
    assert [line.split(" dropped: it raised ")[0] for line in said[:-1]] == [
        "attention: cudnn",
        "attention: triton",
        "attention: triton for packed rows",
    ]
    assert said[-1] == "attention: xla, packed rows xla"


def test_a_named_kernel_that_cannot_serve_is_one_clear_line():
    with pytest.raises(ConfigError, match=r'model.attention=splash: is for tpu, not for cpu; use "auto" or "xla"'):
        with_kernels(shape(), "splash", "cpu", 64, ONE, probe=True, say=print)


@pytest.mark.parametrize("name", ["tokamax_mosaic", "tokamax_triton"])
def test_naming_a_kernel_of_tokamax_without_the_package_names_the_extra(name):
    line = f"model.attention={name}: needs the package tokamax; pip install 'pspo-jax[tokamax]' (Python 3.12 or newer)"
    with pytest.raises(ConfigError, match=re.escape(line)):
        with_kernels(shape(), name, "gpu", 64, ONE, probe=False, say=print)


def test_triton_is_dropped_with_its_successor_where_jax_has_lost_it(monkeypatch):
    refuse(monkeypatch, "jax.experimental.pallas.ops.gpu")
    reason = (
        f"needs jax.experimental.pallas.ops.gpu.attention, which jax {jax.__version__} does not have; its successor on "
        "GPUs: pip install 'pspo-jax[tokamax]' (Python 3.12 or newer)"
    )
    said = []
    a = with_kernels(shape(), "auto", "gpu", 2048, ONE, probe=False, say=said.append)
    assert (a.attention, a.packed_attention) == ("cudnn", "xla")
    assert said[0] == f"attention: triton for packed rows dropped: it {reason}"
    with pytest.raises(ConfigError) as raised:
        with_kernels(shape(), "triton", "gpu", 64, ONE, probe=True, say=print)
    assert str(raised.value) == f'model.attention=triton: {reason}; use "auto" or "xla"'


def test_each_device_computes_its_own_rows_and_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (4, 128, n, 16)).astype(jnp.bfloat16) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    segments = jnp.arange(128) // jnp.asarray([[50], [60], [70], [128]])
    whole = attend(q, k, v, 0.25, packed=Packed(segments, segments))
    mesh = jax.make_mesh((1, 2, 2, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda *x: interpreted("splash", *x))(q, k, v, 0.25, segments)
    assert split.sharding.shard_shape(split.shape) == (1, 128, 2, 16)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (split, whole)), atol=0.03)
