"""Adapters: against PEFT, what trains and what does not, the reference without a copy, dropout."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.split_params import SplitParams, merge_params
from pspo_jax.commands.export import rounding
from pspo_jax.config.defaults import replace as replace_fields
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.validation import validate
from pspo_jax.model import built_in
from pspo_jax.model.architecture import Lora, lora_of
from pspo_jax.model.huggingface.save import merged_tensors, write_adapter
from pspo_jax.model.transformer import transformer
from pspo_jax.model.weights import lora_table
from pspo_jax.rollout.sampler import make_sampler
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.training.algorithm import build
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.supervised import make_sft_steps
from tests.helpers import random_prompts, relative, slow_except, tiny_config
from tests.model.checkpoints import torch_logits, write_checkpoint
from tests.model.test_pretrained import load

TOKENS = np.random.default_rng(0).integers(3, 97, (3, 12))


def adapted(folder, family="qwen2", targets="q,k,v,o,gate,up,down", rank=4, dropout=0.0, seed=1, **fields):
    """(torch model, source, model, base, random adapters) of a new checkpoint."""
    torch_model = write_checkpoint(folder, family, **fields)
    _, base, source = load(folder)
    # Weights on a mesh would have the step compiled twice: for the first state, and for what it returns.
    base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), base)
    config = tiny_config(lora__rank=rank, lora__alpha=6.0, lora__targets=targets, lora__dropout=dropout)
    a = dataclasses.replace(source.architecture, lora=lora_of(config.lora))
    model = transformer(a)

    @jax.jit
    def random_adapters():
        keys = iter(jax.random.split(jax.random.key(seed + 1), 20))
        start = model.init(jax.random.key(seed))
        return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), start)

    return torch_model, source._replace(architecture=a), model, base, random_adapters()


def logits(model, params, tokens=TOKENS):
    return np.asarray(model.logits(params, model.hidden(params, jnp.asarray(tokens))))


@pytest.mark.parametrize("family", slow_except(["qwen2"], ["qwen2", "llama", "gemma3_text"]))
@pytest.mark.parametrize("targets", ["q,k,v,o,gate,up,down", "q_proj,down_proj"])
def test_merge_and_logits_are_pefts(tmp_path, family, targets):
    peft = pytest.importorskip("peft", reason="peft is a test dependency; install '.[test]'")
    extra = {"head_dim": 8, "layer_types": ["full_attention"] * 2} if family == "gemma3_text" else {}
    torch_model, source, model, base, adapters = adapted(tmp_path / "base", family, targets, **extra)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", source.architecture, adapters, str(tmp_path / "base"))
    other = peft.PeftModel.from_pretrained(torch_model, tmp_path / "adapter").eval()

    ours = logits(model, SplitParams(base, adapters))
    assert np.abs(ours - torch_logits(other, TOKENS)).max() <= 1e-4
    assert np.abs(ours - logits(model, SplitParams(base, None))).max() > 0.1

    merged = dict(merged_tensors(source.architecture, source, adapters, lambda name: np.float32))
    wanted = other.merge_and_unload().state_dict()
    assert set(merged) <= set(wanted)
    for name, value in merged.items():
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=1e-6)


def test_new_adapters_change_nothing_and_are_float32(tmp_path):
    _, source, model, base, _ = adapted(tmp_path)
    base16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    fresh = model.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(logits(model, SplitParams(base16, fresh)), logits(model, SplitParams(base16, None)))
    names = set(lora_table(source.architecture)["layers"])
    assert names == {f"{n}_lora_{x}" for n in ("q", "k", "v", "o", "gate", "up", "down") for x in "ab"}


def programs(model, config):
    """(optimizer, sampler, step), which runs of one model and config share."""
    optimizer = optax.adam(1e-2)
    sample = make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, 0)
    return optimizer, sample, make_train_step(model, optimizer, build(config), config)


def train_once(model, base, adapters, config, steps=2, compiled=None):
    """(first state, last state, metrics, rollouts) of steps with random rewards."""
    optimizer, sample, step = compiled or programs(model, config)
    state = init_state(
        jax.tree.map(jnp.copy, adapters),
        optimizer,
        build(config),
        config,
        8,
        6,
        jax.random.key(0),
        jax.tree.map(jnp.copy, base),
    )
    first = jax.tree.map(jnp.copy, state)
    settings = SamplingParams.of(config.rollout, [2])
    for i in range(steps):
        rollouts = sample(state.weights, random_prompts(8, 6), jax.random.key(i), settings)
        rewards = np.random.default_rng(i).integers(0, 2, rollouts.lengths.shape).astype(np.float32)
        state, metrics = step(state, rollouts, jnp.asarray(rewards))
    return first, state, metrics, rollouts


def test_only_adapters_train_and_the_reference_is_the_base(tmp_path):
    _, _, model, base, adapters = adapted(tmp_path)
    config = tiny_config(loss__kl_coef=0.04, lora__rank=4)
    compiled = programs(model, config)
    first, last, metrics, _ = train_once(model, base, adapters, config, compiled=compiled)
    assert first.reference is None and last.reference is None
    jax.tree.map(np.testing.assert_array_equal, first.frozen, last.frozen)
    assert relative(last.params, first.params) > 1e-3
    moments = [x.shape for x in jax.tree.leaves(last.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(last.params)])
    assert float(metrics["kl"]) > 0  # the adapters are random from the start, so they are not the base
    assert float(metrics["sampling/sampling_logp_difference/max"]) <= 1e-4
    assert not hasattr(last.to_save(), "frozen")

    zero = model.init(jax.random.key(3))
    _, _, at_zero, _ = train_once(model, base, zero, config, steps=1, compiled=compiled)
    assert float(at_zero["kl"]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_dropout_acts_in_the_gradient_alone(tmp_path):
    _, _, model, base, adapters = adapted(tmp_path, dropout=0.5)
    with_dropout = logits(model, SplitParams(base, adapters, jax.random.key(0)))
    assert np.abs(with_dropout - logits(model, merge_params(adapters, base))).max() > 0.1
    again = logits(model, SplitParams(base, adapters, jax.random.key(0)))
    np.testing.assert_array_equal(with_dropout, again)
    config = tiny_config(lora__rank=4, lora__dropout=0.5, loss__microbatch_rows=8)
    _, _, metrics, _ = train_once(model, base, adapters, config, steps=1)
    assert float(metrics["sampling/sampling_logp_difference/mean"]) > 1e-3
    dry = replace_fields(config, {"lora.dropout": 0.0})
    _, _, metrics, _ = train_once(model, base, adapters, dry, steps=1)
    assert float(metrics["sampling/sampling_logp_difference/max"]) <= 1e-4


def test_dropout_keeps_the_mean(tmp_path):
    """Inverted dropout: averaged over many keys, an adapter's output is that without dropout."""
    _, _, model, base, adapters = adapted(tmp_path, targets="down", dropout=0.3, num_hidden_layers=1)
    # The final norm is not linear: small adapters make it nearly so.
    small = jax.tree.map(lambda x: x * 0.1, adapters)
    one = jax.jit(lambda key: model.hidden(SplitParams(base, small, key), jnp.asarray(TOKENS)))
    mean = np.mean([np.asarray(one(jax.random.key(i))) for i in range(300)], axis=0)
    exact = np.asarray(model.hidden(SplitParams(base, small), jnp.asarray(TOKENS)))
    nothing = np.asarray(model.hidden(SplitParams(base, None), jnp.asarray(TOKENS)))
    assert np.abs(mean - exact).mean() < 0.15 * np.abs(nothing - exact).mean()


def test_supervised_steps_train_adapters_alone(tmp_path):
    _, _, model, base, _ = adapted(tmp_path)
    before = jax.tree.map(np.asarray, base)
    optimizer = optax.adam(1e-2)
    adapters = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "prompts": jnp.asarray(rng.integers(3, 97, (1, 4, 6))),
        "prompt_lengths": jnp.full((1, 4), 6),
        "completions": jnp.asarray(rng.integers(3, 97, (1, 4, 5))),
        "completion_lengths": jnp.full((1, 4), 5),
    }
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 60, axis=0), batch)
    steps = make_sft_steps(model, optimizer, 160)
    _, _, losses = steps(adapters, optimizer.init(adapters), repeated, base)
    assert float(losses[-1]) < 0.5 * float(losses[0])
    jax.tree.map(np.testing.assert_array_equal, before, base)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora.targets": "qproj"}, "lora.targets='qproj': qproj is not a projection; choose among q, k, v"),
        ({"lora.targets": " , "}, "lora.targets"),
        ({"lora.rank": 8}, "lora.rank=8: adapters need a checkpoint"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        validate(replace_fields(tiny_config(), fields))


def test_merging_into_fewer_bits_is_said():
    a = dataclasses.replace(built_in(tiny_config().model, 16), lora=Lora(2, 4.0, 0.0, ("q", "down")))
    assert rounding(a, lambda _: np.dtype("float32")) is None
    line = rounding(a, lambda name: jnp.dtype("bfloat16" if "q_proj" in name else "float32"))
    assert "merged into bfloat16" in line and "--dtype float32" in line and "--adapter-only" in line
    # The base's other tensors keep their type whatever happens.
    assert rounding(a, lambda name: jnp.dtype("bfloat16" if "up_proj" in name else "float32")) is None


def test_peft_settings_are_written(tmp_path):
    _, source, _, _, adapters = adapted(tmp_path / "base", targets="v,q")
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", source.architecture, adapters, "org/base")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["lora_alpha"] == 6.0 and saved["base_model_name_or_path"] == "org/base"
    assert saved["target_modules"] == ["q_proj", "v_proj"]
