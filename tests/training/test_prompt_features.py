"""Features of prompts: hidden states computed directly, on any mesh; runs that resume, and that follow their data."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pspo_jax as pj
from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.config.defaults import replace
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.model import from_logits, transformer
from pspo_jax.model.architecture import lora_of
from pspo_jax.system.progress import Progress
from pspo_jax.training import prompt_features as tested
from pspo_jax.training import resume, setup
from pspo_jax.training.setup import place_state, prepare
from tests.checkpoint.records import saved
from tests.distributed.processes import finish_all, launch
from tests.helpers import random_prompts, tiny_config, tiny_policy
from tests.runs.processes import finish, metrics, params, start
from tests.training.test_train_function import small

PREDICTED = {"algorithm__name": "posterior_mixed", "selection__predictor": "hidden_states"}
COMPOSED = {"algorithm__name": "learnability_replay"}


def dataset(n, width, vocab=13):
    return jax.device_get(random_prompts(n, width, vocab))


def standardised(values):
    return (values - values.mean(0)) / values.std(0)


def directly(hidden, prompts):
    """Mean and last hidden state of each prompt, which is computed by itself without padding."""
    out, hidden = [], jax.jit(hidden)
    for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True):
        states = np.asarray(hidden(tokens[None, :length]), np.float64)[0]
        out.append(np.concatenate([states.mean(0), states[-1]]))
    return np.array(out)


def test_features_are_the_hidden_states_computed_directly_on_one_device_and_on_eight():
    model, params, _ = tiny_policy()
    prompts = dataset(20, 5)
    wanted = standardised(directly(lambda tokens: model.hidden(params, tokens), prompts))
    assert tested.feature_width(model, params) == wanted.shape[1] == 32
    found = tested.prompt_features(model, params, prompts.tokens, prompts.lengths, 16, seed=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    mesh = make_mesh(replace(tiny_config(), {"rollout.prompts": 16, "mesh.fsdp": 2, "mesh.context": 2}))
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, params_shardings(mesh, params, model.axes))
        spread = tested.prompt_features(model, placed, prompts.tokens, prompts.lengths, 16, seed=0, mesh=mesh)
    np.testing.assert_allclose(spread, found, atol=1e-4)


def test_wide_states_of_an_own_model_are_projected(monkeypatch):
    vocab = 40
    embedding = jax.random.normal(jax.random.key(0), (vocab, vocab))
    model = from_logits(lambda params, tokens: jnp.cumsum(params[tokens], axis=1), lambda key: embedding, vocab)
    prompts = dataset(30, 6, vocab)
    assert tested.feature_width(model, jax.eval_shape(lambda: embedding)) == 64
    matrix = np.random.default_rng(7).standard_normal((2 * vocab, 64)) / np.sqrt(2 * vocab)
    summaries = directly(lambda tokens: model.hidden(embedding, tokens), prompts)
    found = tested.prompt_features(model, embedding, prompts.tokens, prompts.lengths, 8, seed=7)
    np.testing.assert_allclose(found, standardised(standardised(summaries) @ matrix), atol=1e-3)
    # Prompts by which the summaries are standardised may be fewer than there are.
    monkeypatch.setattr(tested, "SAMPLE", 10)
    rows = np.linspace(0, 29, 10).astype(int)
    scaled = (summaries - summaries[rows].mean(0)) / summaries[rows].std(0)
    found = tested.prompt_features(model, embedding, prompts.tokens, prompts.lengths, 8, seed=7)
    np.testing.assert_allclose(found, standardised(scaled @ matrix), atol=1e-3)


def test_states_that_are_equal_or_not_finite_give_finite_features():
    def apply(params, tokens):
        return jnp.stack([jnp.ones(tokens.shape), jnp.where(tokens > 6, jnp.inf, 1.0 * tokens)], axis=-1)

    model, prompts = from_logits(apply, lambda key: jnp.zeros(1), 2), dataset(12, 4)
    found = tested.prompt_features(model, jnp.zeros(1), prompts.tokens, prompts.lengths, 5, seed=0)
    assert np.isfinite(found).all() and found.shape == (12, 4)
    assert not found[:, 0].any() and found[:, 1].any()


def test_adapters_over_a_frozen_base():
    config = tiny_config(lora__rank=2)
    _, base, architecture = tiny_policy()
    model = transformer(dataclasses.replace(architecture, lora=lora_of(config.lora)))
    adapters = jax.tree.map(lambda x: x + 0.5, model.init(jax.random.key(0)))
    weights, prompts = SplitParams(base, adapters), dataset(6, 5)
    assert tested.feature_width(model, jax.eval_shape(lambda: weights)) == 32
    found = tested.prompt_features(model, weights, prompts.tokens, prompts.lengths, 4, seed=0)
    wanted = standardised(directly(lambda tokens: model.hidden(weights, tokens), prompts))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.slow
def test_a_run_that_was_stopped_carries_on_to_the_bit(tmp_path):
    fields = COMPOSED | {"run__fingerprint": True, "run__steps": 4, "checkpoint__every": 1, "log__selection_every": 1}
    pj.train(small(tmp_path / "whole", **fields))
    halves = small(tmp_path / "halves", **fields)
    assert not pj.train(halves, callbacks=[lambda step, metrics: step == 2]).finished
    result = pj.train(halves)
    assert result.finished
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    assert len(lines[0]) == 5
    for whole, half in zip(*lines, strict=True):
        same = [name for name in whole if name.startswith(("crc/", "selection/", "eval/"))]
        assert {name: whole[name] for name in same} == {name: half[name] for name in same}
    assert all(0 <= line["selection/predictor_error"] <= 1 for line in lines[0][1:])
    assert np.abs(result.state.selector.shared.precision).max() > 0


@pytest.mark.slow
def test_a_checkpoint_has_the_features_and_changed_data_those_of_the_resumed_weights(tmp_path, monkeypatch):
    before = prepare(tiny_config(**PREDICTED, run__dir=str(tmp_path)))
    other = tiny_config(**PREDICTED, run__dir=str(tmp_path), task__train_prompts=56)
    after = prepare(replace(other, {"task.allow_change": True}))
    features = before.abstract.selector.per_prompt.features
    assert features.shape == (128, 32) and features.dtype == jnp.float32  # What a plan counts.
    with jax.set_mesh(before.mesh):
        weights = jax.jit(before.model.init)(jax.random.key(5))
        state = place_state(before, jax.tree.map(jnp.copy, weights))
        belief, regression = state.selector.per_prompt, state.selector.shared
        marks = jnp.arange(128.0)
        belief = belief._replace(own=belief.own._replace(successes=marks))
        regression = regression._replace(precision=jnp.ones_like(regression.precision))
        selector = state.selector._replace(per_prompt=belief, shared=regression)
        state = state.replace(selector=jax.device_put(selector, before.shardings.selector))
        resume.save_content(before, tmp_path)
        with saved(before, state, tmp_path) as checkpoints:
            with monkeypatch.context() as patch:
                patch.setattr(setup, "prompt_features", None)  # Nothing is computed for data that is the same.
                same = resume.restore(before, tmp_path, checkpoints, Progress(False)).state.selector
            found = resume.restore(after, tmp_path, checkpoints, Progress(False)).state.selector
    jax.tree.map(np.testing.assert_array_equal, same, jax.device_get(state.selector))
    old = dict(zip(before.task.train.content().tolist(), range(40), strict=True))
    wanted = [old.get(content, 0) for content in after.task.train.content().tolist()]
    assert sum(w > 0 for w in wanted) > 0
    np.testing.assert_array_equal(found.per_prompt.own.successes[:56], wanted)
    computed = standardised(directly(lambda tokens: before.model.hidden(weights, tokens), after.task.train))
    computed = np.clip(computed, -5, 5) / 32**0.5
    np.testing.assert_allclose(found.per_prompt.features[:56], computed, atol=1e-3)
    assert not np.asarray(found.shared.precision).any()


def test_long_prompts_of_a_text_task_need_no_logits():
    """A model whose logits cannot be computed has features."""
    model, params, _ = tiny_policy()
    broken, prompts = model._replace(logits=None), dataset(9, 300)
    found = tested.prompt_features(broken, params, prompts.tokens, prompts.lengths, 4, seed=0)
    assert found.shape == (9, 32) and np.isfinite(found).all()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, child_env):
    fields = COMPOSED | {"run__steps": 3}
    finish(start(child_env, tmp_path / "one", **fields))
    finish_all(tmp_path / "two", launch(child_env, tmp_path / "two", 2, 1, mesh__data=2, **fields))
    one, two = (params(tmp_path / name)["selector"]["per_prompt"]["features"] for name in ("one", "two"))
    assert np.abs(one[:40]).max() > 0
    np.testing.assert_allclose(one, two, atol=1e-4)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.get("crc/prompt_ids") == b.get("crc/prompt_ids")
        if a["step"]:
            np.testing.assert_allclose(a["selection/predictor_error"], b["selection/predictor_error"], atol=1e-4)
