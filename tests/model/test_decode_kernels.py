"""Attention of new tokens in two parts: the merge, its use in decoding, and the check of a kernel at the start.

The parts are computed by `jax.nn.dot_product_attention` on CPU in float32, in the place of cuDNN, which is not here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, ModelConfig
from pspo_jax.distributed.jax_internals import cudnn_attention
from pspo_jax.distributed.mesh import AXES, make_mesh
from pspo_jax.model import built_in, transformer
from pspo_jax.model.attention import decode
from pspo_jax.model.attention.decode import attend_by_parts
from pspo_jax.model.attention.probe import decode_difference, with_decode_kernel
from pspo_jax.model.attention.xla import Prefix, Suffix, attend_shared_prefix

B, G, K, M, P, T, WIDTH = 2, 3, 2, 2, 5, 7, 4
SCALE = 0.7


def by_xla(q, k, v, lengths, scale):
    """A part by `jax.nn.dot_product_attention`, whose log-sum-exp has the type of the queries, float32 here."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out, log_sum = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="xla", return_residual=True
    )
    return out.swapaxes(1, 2), log_sum.swapaxes(1, 2)


in_parts = jax.jit(lambda q, prefix, suffix: attend_by_parts(by_xla, q, prefix, suffix, SCALE))


def made(seed, b=B):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(b, G, K * M, WIDTH), *[(b, K, P, WIDTH)] * 2, *[(b, G, K, T, WIDTH)] * 2]
    return [3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, own_k, own_v, lengths, drawn):
    """Softmax over all live keys of a row, prompt and completion one behind the other, in NumPy's float64."""
    q, k, v, own_k, own_v = (np.asarray(x, np.float64) for x in (q, k, v, own_k, own_v))
    out = np.zeros_like(q)
    for b, g, head in np.ndindex(q.shape[:3]):
        keys = np.concatenate([k[b, head // M, : lengths[b]], own_k[b, g, head // M, : drawn[b]]])
        values = np.concatenate([v[b, head // M, : lengths[b]], own_v[b, g, head // M, : drawn[b]]])
        scores = keys @ q[b, g, head] * SCALE
        weights = np.exp(scores - scores.max())
        out[b, g, head] = weights @ values / weights.sum()
    return out


rows = st.tuples(st.integers(0, P), st.integers(0, T)).filter(any)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.tuples(rows, rows))
def test_parts_merge_to_the_softmax_of_all_live_keys(seed, sizes):
    lengths, drawn = np.asarray(sizes).T
    q, k, v, own_k, own_v = made(seed)
    found = in_parts(q, Prefix(k, v, jnp.asarray(lengths)), Suffix(own_k, own_v, jnp.asarray(drawn - 1)))
    np.testing.assert_allclose(found, plain(q, k, v, own_k, own_v, lengths, drawn), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("t", [0, 4, T - 1, T + 3, [1, T - 1]])
def test_parts_equal_decoding_by_xla(t):
    q, k, v, own_k, own_v = made(1)
    prefix, suffix = Prefix(k, v, jnp.asarray([1, P])), Suffix(own_k, own_v, jnp.asarray(t))
    found, expected = in_parts(q, prefix, suffix), attend_shared_prefix(q, prefix, suffix, SCALE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_part_without_keys_has_no_weight_even_if_its_kernel_returns_nan():
    def nan_if_empty(q, k, v, lengths, scale):
        out, log_sum = by_xla(q, k, v, lengths, scale)
        empty = (lengths == 0)[:, None, None]
        return jnp.where(empty[..., None], jnp.nan, out), jnp.where(empty, jnp.nan, log_sum)

    q, k, v, own_k, own_v = made(2)
    prefix, suffix = Prefix(k, v, jnp.asarray([0, P])), Suffix(own_k, own_v, jnp.asarray([3, -1]))
    found = jax.jit(lambda *x: attend_by_parts(nan_if_empty, *x, SCALE))(q, prefix, suffix)
    np.testing.assert_allclose(found, plain(q, k, v, own_k, own_v, [0, P], [4, 0]), rtol=2e-5, atol=2e-5)


def test_each_device_computes_its_own_rows_and_heads():
    q, k, v, own_k, own_v = made(3, b=4)
    prefix, suffix = Prefix(k, v, jnp.asarray([1, 2, 3, P])), Suffix(own_k, own_v, jnp.asarray([0, 2, 4, T - 1]))
    whole = in_parts(q, prefix, suffix)
    mesh = jax.make_mesh((1, 2, 1, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda *x: attend_by_parts(by_xla, *x, SCALE))(q, prefix, suffix)
    assert split.sharding.shard_shape(split.shape) == (1, G, K * M // 2, WIDTH)
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


def architecture(**fields):
    a = built_in(ModelConfig(layers=1, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24), 16)
    return dataclasses.replace(a, **fields)


def test_decoding_of_groups_and_of_slots_uses_the_kernel_that_the_architecture_names(monkeypatch):
    calls = []

    def counted(q, k, v, lengths, scale):
        calls.append(k.shape[2])
        return by_xla(q, k, v, lengths, scale)

    monkeypatch.setitem(decode.PART_KERNELS, "counted", counted)
    params = transformer(architecture()).init(jax.random.key(0))
    prompts, lengths = jnp.ones((2, P), jnp.int32), jnp.asarray([2, P])
    found = {}
    for name in ("xla", "counted"):
        model = transformer(architecture(decode_attention=name))

        def first_tokens(params, model=model):
            """Logits after the first token, by the decoder of groups, and by that of slots in its second slot."""
            of_groups = model.decoder(params, prompts, lengths, G, T)
            groups, _ = of_groups.step(of_groups.cache, jnp.full((2, G), 3), jnp.asarray(0))
            of_slots = model.slots(params, prompts, lengths, 1)
            cache = of_slots.load(of_slots.slots(2, T), jnp.asarray([1]), jnp.asarray([1]), None, jnp.asarray([0]))
            slots, _ = of_slots.step(cache, jnp.full((1, 2), 3), jnp.zeros((1, 2), jnp.int32))
            return groups, slots[:, 1]

        found[name] = jax.jit(first_tokens)(params)
        assert calls == ([] if name == "xla" else [P, T] * 2)
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_check_finds_a_kernel_that_is_right_wrong_or_raises():
    def ignores_lengths(q, k, v, lengths, scale):
        return by_xla(q, k, v, jnp.full_like(lengths, k.shape[2]), scale)

    def other_base(q, k, v, lengths, scale):
        out, log_sum = by_xla(q, k, v, lengths, scale)
        return out, log_sum / jnp.log(2)

    assert decode_difference(by_xla, architecture(), G, P, T) is None
    for wrong in (ignores_lengths, other_base):
        assert "is wrong by" in decode_difference(wrong, architecture(), G, P, T)
    half = architecture(compute_dtype="bfloat16")
    assert decode_difference(cudnn_attention, half, G, P, T) == "raised RuntimeError: cuDNN is not detected."


def test_a_kernel_that_cannot_serve_is_one_clear_line():
    config = resolve(replace(Config(), {"model.decode_attention": "cudnn"}))
    mesh = make_mesh(config, architecture(), jax.devices()[:1])
    for probe in (False, True):
        with pytest.raises(ConfigError, match=r'cudnn: is for gpu, not for cpu; use "auto" or "xla"'):
            with_decode_kernel(architecture(), config, mesh, P, probe, say=print)


def test_auto_and_xla_take_no_kernel_on_a_cpu_and_say_nothing():
    mesh, said = make_mesh(resolve(Config()), architecture(), jax.devices()[:1]), []
    for name in ("auto", "xla"):
        config = resolve(replace(Config(), {"model.decode_attention": name}))
        for probe in (False, True):
            assert with_decode_kernel(architecture(), config, mesh, P, probe, said.append) == architecture()
    assert not said
