"""Rollouts: equal to the trainer's forward, independent of layout, and compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.model import from_logits
from pspo_jax.rollout import SamplingParams, counting_sampler, make_sampler, sampler
from tests.helpers import random_prompts, slow_except, tiny_config, tiny_policy

EOS, PAD, T = 13, 14, 12


def settings(temperature=1.0, top_p=1.0, top_k=0, stop=(EOS,), limit=T):
    """Settings with three stop ids, the last of which may be repeated: for each number there is another program."""
    return SamplingParams(
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.int32(top_k),
        jnp.asarray([*stop, *[stop[-1]] * (3 - len(stop))], jnp.int32),
        jnp.int32(limit),
    )


@functools.cache
def sampler_of(group_size):
    """(params, sampler) of the tiny policy, decoded at once: tests of one group size share its programs."""
    model, params, _ = tiny_policy()
    return params, make_sampler(model, group_size, T, PAD)


def trainer_log_probs(model, params, rollouts):
    @jax.jit
    def log_probs_of(params, rollouts):
        b, g = rollouts.lengths.shape
        p = rollouts.prompts
        return completion_log_probs(
            model,
            params,
            jnp.repeat(p.tokens, g, axis=0),
            jnp.repeat(p.lengths, g, axis=0),
            rollouts.tokens.reshape(b * g, -1),
            rollouts.temperature,
        )[0].reshape(rollouts.tokens.shape)

    return log_probs_of(params, rollouts)


SHAPES = [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}, {"kv_heads": 1}]


@pytest.mark.parametrize("shape", slow_except([{"kv_heads": 1}], SHAPES))
@pytest.mark.parametrize("temperature", slow_except([0.6], [1.0, 0.6]))
def test_sampler_and_trainer_agree(shape, temperature):
    model, params, _ = tiny_policy(**shape)
    if "qkv_bias" in shape:
        params["layers"] |= {k: v + 0.3 for k, v in params["layers"].items() if "bias" in k}
    sample = make_sampler(model, 4, T, PAD)
    rollouts = sample(params, random_prompts(6, 9), jax.random.key(0), settings(temperature, top_p=0.95))
    want = trainer_log_probs(model, params, rollouts)
    gap = jnp.where(rollouts.mask, jnp.abs(rollouts.log_probs - want), 0).max()
    assert float(gap) <= 1e-4
    assert bool(jnp.all(rollouts.sampling_log_probs >= rollouts.log_probs - 1e-5))


def test_forbidden_ids_have_no_share_on_either_side():
    model = tiny_policy()[0]
    params, sample = sampler_of(16)
    rollouts = sample(params, random_prompts(8, 9), jax.random.key(0), settings())
    drawn = np.asarray(rollouts.tokens)[np.asarray(rollouts.mask)]
    assert not np.isin(drawn, [14, 15]).any()
    logits = model.logits(params, jnp.ones((3, 16)))
    assert float(jax.nn.softmax(logits)[:, 14:].max()) == 0


def test_ends_are_as_documented():
    params, sample = sampler_of(16)
    rollouts = sample(params, random_prompts(8, 9), jax.random.key(3), settings())
    tokens, mask, lengths = map(np.asarray, (rollouts.tokens, rollouts.mask, rollouts.lengths))
    ended = np.asarray(rollouts.ended)
    assert ended.any() and not ended.all()
    for row, m, n, e in zip(tokens.reshape(-1, T), mask.reshape(-1, T), lengths.ravel(), ended.ravel(), strict=True):
        assert m.tolist() == [i < n for i in range(T)]
        assert (row[n - 1] == EOS) == e
        assert EOS not in row[: n - 1]
        assert (row[n:] == PAD).all()
        assert e or n == T


def test_several_stop_ids_and_a_traced_limit():
    params, sample = sampler_of(16)
    rollouts = sample(params, random_prompts(8, 9), jax.random.key(3), settings(stop=(1, 2, 3), limit=5))
    assert int(rollouts.lengths.max()) <= 5
    last = np.take_along_axis(np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)[..., None] - 1, 2)[..., 0]
    np.testing.assert_array_equal(np.isin(last, [1, 2, 3]), np.asarray(rollouts.ended))


def test_changing_settings_or_lengths_does_not_recompile():
    params, sample = sampler_of(4)
    variants = [
        settings(0.7),
        settings(top_p=0.5),
        settings(top_k=3),
        settings(stop=(4,)),
        settings(limit=3),
        settings(temperature=0.0),
    ]
    batches = [random_prompts(6, 9, seed=seed) for seed in range(len(variants))]
    keys = [jax.random.key(i) for i in range(len(variants))]
    sample(params, random_prompts(6, 9, seed=99), jax.random.key(99), settings())
    with jax.no_tracing(True):
        for prompts, key, variant in zip(batches, keys, variants, strict=True):
            sample(params, prompts, key, variant)


def test_rows_do_not_depend_on_the_rest_of_the_batch():
    """Row keys come from the row's number: the first prompts of a larger batch give the same tokens."""
    params, sample = sampler_of(4)
    whole = random_prompts(6, 9)
    part = jax.tree.map(lambda x: x[:2], whole)
    a = sample(params, whole, jax.random.key(5), settings())
    b = sample(params, part, jax.random.key(5), settings())
    np.testing.assert_array_equal(a.tokens[:2], b.tokens)


def test_first_token_frequencies_through_the_whole_sampler():
    from scipy import stats

    model, params, _ = tiny_policy()
    n = 4096
    rollouts = make_sampler(model, n, 1, PAD)(params, random_prompts(1, 5), jax.random.key(1), settings(limit=1))
    hidden = model.hidden(params, rollouts.prompts.tokens)[0, int(rollouts.prompts.lengths[0]) - 1]
    p = np.asarray(jax.nn.softmax(model.logits(params, hidden)), np.float64)
    counts = np.bincount(np.asarray(rollouts.tokens).ravel(), minlength=16)
    assert stats.chisquare(counts[:14], n * p[:14] / p[:14].sum()).pvalue > 1e-3


def test_a_model_of_logits_samples_the_same_tokens():
    """The cacheless adapter around the same network draws the same tokens as the cached decoder."""
    model, params, a = tiny_policy()
    plain = from_logits(
        lambda p, tokens: model.logits(p, model.hidden(p, tokens)), model.init, a.vocab_size, a.forbidden
    )
    prompts, key = random_prompts(6, 9), jax.random.key(2)
    want = sampler_of(4)[1](params, prompts, key, settings())
    got = make_sampler(plain, 4, T, PAD)(params, prompts, key, settings())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_gap_is_small():
    model, params, _ = tiny_policy(tiny_config(), compute_dtype="bfloat16")
    rollouts = make_sampler(model, 4, T, PAD)(params, random_prompts(6, 9), jax.random.key(0), settings())
    gap = jnp.abs(rollouts.log_probs - trainer_log_probs(model, params, rollouts))
    assert float(jnp.where(rollouts.mask, gap, 0).max()) <= 0.1


@pytest.mark.parametrize("shape", slow_except([{}], [{}, {"kv_heads": 1, "qkv_bias": True}]))
@pytest.mark.parametrize("slots", slow_except([5], [1, 5, 23]))
def test_slots_change_no_row(shape, slots):
    """Rows that take turns in fewer slots equal rows that are all decoded at once."""
    model, params, _ = tiny_policy(**shape)
    args = params, random_prompts(6, 9), jax.random.key(0), settings(0.8, top_p=0.95, stop=(EOS, 3, 5), limit=10)
    at_once = (make_sampler(model, 4, T, PAD) if shape else sampler_of(4)[1])(*args)
    in_turns = make_sampler(model, 4, T, PAD, slots)(*args)
    lengths = np.asarray(at_once.lengths)
    assert lengths.min() < 4 and lengths.max() == 10
    for name in ("tokens", "lengths", "ended", "mask"):
        np.testing.assert_array_equal(getattr(at_once, name), getattr(in_turns, name), name)
    for name in ("log_probs", "sampling_log_probs"):
        np.testing.assert_allclose(getattr(at_once, name), getattr(in_turns, name), atol=1e-5, err_msg=name)


def test_a_cache_that_grows_changes_no_row(monkeypatch):
    model, params, _ = tiny_policy()
    args = params, random_prompts(6, 9), jax.random.key(0), settings(0.8, stop=(EOS, 3), limit=11)
    at_once = make_sampler(model._replace(resize=None), 4, T, PAD)(*args)
    assert (
        sampler.cache_sizes(T) == [T]
        and sampler.cache_sizes(1024) == [256, 512, 1024]
        and sampler.cache_sizes(300) == [150, 300]
    )
    monkeypatch.setattr(sampler, "SMALLEST_CACHE_TOKENS", 2)
    assert sampler.cache_sizes(T) == [3, 6, T]
    grown = make_sampler(model, 4, T, PAD)(*args)
    lengths = np.asarray(at_once.lengths)
    assert lengths.min() < 3 and lengths.max() > 6
    np.testing.assert_array_equal(at_once.tokens, grown.tokens)
    np.testing.assert_allclose(at_once.log_probs, grown.log_probs, atol=1e-5)


@pytest.mark.parametrize(("chunk", "limit"), slow_except([(5, 7)], [(4, T), (5, 7), (16, 1), (5, T)], several=True))
def test_chunks_of_tokens_change_no_row(chunk, limit, monkeypatch):
    """This holds whether or not chunks divide the longest completion, the limit and the sizes of the cache."""
    model, params, _ = tiny_policy()
    args = params, random_prompts(6, 9), jax.random.key(0), settings(0.8, stop=(EOS, 3, PAD), limit=limit)
    one_by_one = sampler_of(4)[1](*args)
    monkeypatch.setattr(sampler, "SMALLEST_CACHE_TOKENS", 2)
    assert sampler.cache_sizes(32, 4) == [8, 16, 32] and sampler.cache_sizes(30, 4) == [4, 12, 30]
    in_chunks = make_sampler(model, 4, T, PAD, chunk=chunk)(*args)
    for name in ("tokens", "mask", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(one_by_one, name), getattr(in_chunks, name), name)
    for name in ("log_probs", "sampling_log_probs"):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(in_chunks, name), atol=1e-5, err_msg=name)


def test_a_gpu_tests_once_a_chunk():
    assert [sampler.tokens_per_test("gpu", t) for t in (8, 64, 512, 16_384)] == [1, 4, 32, 32]
    assert sampler.tokens_per_test("cpu", 512) == sampler.tokens_per_test("tpu", 512) == 1


def test_slots_on_eight_devices_change_no_row():
    """Each device refills its own slots, from its own rows."""
    model, params, _ = tiny_policy()
    args = random_prompts(8, 9), jax.random.key(0), settings(0.8, stop=(EOS, 3, 5), limit=10)
    at_once = sampler_of(4)[1](params, *args)
    mesh = make_mesh(replace(Config(), {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, params_shardings(mesh, params, model.axes))
        in_turns = make_sampler(model, 4, T, PAD, slots=8)(split, *args)
        with pytest.raises(ValueError, match=r"rollout.slots=6: must be a multiple of the 4 devices"):
            make_sampler(model, 4, T, PAD, slots=6)(split, *args)
    np.testing.assert_array_equal(at_once.tokens, in_turns.tokens)
    np.testing.assert_array_equal(at_once.ended, in_turns.ended)
    np.testing.assert_allclose(at_once.log_probs, in_turns.log_probs, atol=1e-5)


def test_useful_tokens_are_counted():
    """Slots compute less than a batch that waits for its longest row."""
    model, params, _ = tiny_policy()
    args = params, random_prompts(6, 9), jax.random.key(0), settings(0.8, stop=(EOS, 3, 5), limit=10)
    (rows, all_at_once), (_, in_turns) = (jax.jit(counting_sampler(model, 4, T, PAD, s))(*args) for s in (None, 2))
    assert int(all_at_once.tokens) == rows.lengths.size * int(rows.lengths.max())
    assert int(rows.lengths.sum()) <= int(in_turns.tokens) < int(all_at_once.tokens)
    assert float(all_at_once.columns) == rows.lengths.size * (int(rows.lengths.max()) - 1) * T
    with pytest.raises(ValueError, match=r"rollout.slots: this model has no `slots`"):
        make_sampler(model._replace(slots=None), 4, T, PAD, slots=2)(*args)
