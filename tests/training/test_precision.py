"""Types of numbers: a step and a cold start keep every array's type, whatever the weights and the products have."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.model import built_in, transformer
from pspo_jax.model.architecture import lora_of
from pspo_jax.model.block import embed
from pspo_jax.model.weights import init_weights, table
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.optimizer import adamw, in_float32
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.supervised import make_sft_steps
from tests.helpers import random_prompts, relative, tiny_config
from tests.runs.processes import finish, metrics, start

P, PAD, EOS = 9, 14, 13
DTYPES = ("float32", "bfloat16")


def made(param, compute, rank=0, optimizer=adamw, **fields):
    """(config, policy, optimizer, first state) of a tiny policy with these types, or with adapters on it."""
    config = tiny_config(
        model__param_dtype=param,
        model__compute_dtype=compute,
        model__qkv_bias=True,
        lora__rank=rank,
        optimizer__warmup=0,
        **fields,
    )
    a = dataclasses.replace(built_in(config.model, 16, (14, 15)), lora=lora_of(config.lora))
    model = transformer(a)
    frozen = init_weights(table(a), jax.random.key(2), param) if rank else None
    optimizer = optimizer(config.optimizer, 10)
    params = model.init(jax.random.key(1))
    state = init_state(params, optimizer, build(config), config, 40, P, jax.random.key(0), frozen)
    return config, model, optimizer, state


def rollouts_of(config, model, state, i=0):
    """A batch sampled from the state's policy."""
    sample = make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, PAD)
    settings = SamplingParams.of(config.rollout, [EOS])
    return sample(state.weights, random_prompts(config.rollout.prompts, P, seed=i), jax.random.key(i), settings)


def rewards_of(rollouts, i=0):
    return jnp.asarray(np.random.default_rng(i).integers(0, 2, rollouts.lengths.shape).astype(np.float32))


def types(tree):
    return jax.tree.map(lambda x: str(x.dtype), tree)


USUAL = (("float32", "bfloat16", 0, 0), ("bfloat16", "float32", 8, 0), ("bfloat16", "bfloat16", 8, 4))
CASES = [
    (*case, adamw) if case in USUAL else pytest.param(*case, adamw, marks=pytest.mark.slow)
    for case in itertools.product(DTYPES, DTYPES, (0, 8), (0, 4))
]
CASES += [("bfloat16", "bfloat16", 8, 0, lambda *_: optax.adam(1e-2))]


@pytest.fixture(scope="module")
def shapes():
    """Rollouts of the tiny config, as shapes."""
    config, model, _, state = made("float32", "float32")
    return jax.eval_shape(lambda: rollouts_of(config, model, state))


@pytest.mark.parametrize(("param", "compute", "rows", "rank", "optimizer"), CASES)
def test_a_step_keeps_every_type_and_optimizer_state_is_float32(shapes, param, compute, rows, rank, optimizer):
    """Traced alone: a loop whose carry changed its type would be refused there."""
    fields = {"num_iterations": 2, "minibatches": 2, "packing": rows > 0 and param == compute, "kl_coef": 0.1}
    fields = {f"loss__{name}": value for name, value in fields.items()}
    config, model, chosen = made(param, compute, rank, optimizer, loss__microbatch_rows=rows, **fields)[:3]
    state = jax.eval_shape(lambda: made(param, compute, rank, optimizer, **fields)[3])
    step = make_train_step(model, chosen, build(config), config)
    after, metrics = jax.eval_shape(step, state, shapes, jax.eval_shape(lambda: rewards_of(shapes)))
    assert types(after) == types(state)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32" if rank else param}
    assert {str(x.dtype) for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32"}


@pytest.mark.slow
def test_microbatches_change_nothing_in_bfloat16():
    """Gradients are the same to bfloat16's rounding, and the weights move."""
    moments = []
    for rows in (0, 8):
        config, model, optimizer, state = made("bfloat16", "bfloat16", loss__microbatch_rows=rows)
        before = jax.tree.map(np.asarray, state.params)
        rollouts = rollouts_of(config, model, state)
        state, metrics = make_train_step(model, optimizer, build(config), config)(state, rollouts, rewards_of(rollouts))
        moments.append(optax.tree.get(state.opt_state, "mu"))
        assert np.isfinite(float(metrics["loss"])) and relative(state.params, before) > 1e-4
    assert relative(*moments) < 0.02


@pytest.mark.slow
def test_a_skipped_update_leaves_bfloat16_weights_and_their_state_alone():
    config, model, optimizer, state = made("bfloat16", "bfloat16", loss__microbatch_rows=8)
    rollouts = rollouts_of(config, model, state)
    state = dataclasses.replace(state, params=state.params | {"final_norm": state.params["final_norm"] * jnp.nan})
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = make_train_step(model, optimizer, build(config), config)(state, rollouts, rewards_of(rollouts))
    assert int(metrics["skipped_updates"]) == 1
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == y.tobytes(), (state.params, state.opt_state), before)
    assert jax.tree.all(same)


@pytest.mark.slow
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_a_cold_start_learns_in_both_types(param):
    _, model, _, state = made(param, param)
    rng = np.random.default_rng(0)
    batch = {
        "prompts": jnp.asarray(rng.integers(0, 13, (4, 6))),
        "prompt_lengths": jnp.full(4, 6),
        "completions": jnp.asarray(rng.integers(0, 13, (4, 5))),
        "completion_lengths": jnp.full(4, 5),
    }
    optimizer = in_float32(optax.adam(2e-2))
    opt_state = optimizer.init(state.params)
    wanted = types((state.params, opt_state))
    steps = make_sft_steps(model, optimizer, 160)
    params, opt_state, losses = steps(
        state.params, opt_state, jax.tree.map(lambda x: jnp.repeat(x[None], 40, axis=0), batch)
    )
    assert types((params, opt_state)) == wanted
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_a_token_that_stands_often_gets_its_whole_gradient():
    """The embedding's gradient adds up in float32: in bfloat16 a sum of ones stops at 256."""
    config = tiny_config(model__param_dtype="bfloat16", model__compute_dtype="bfloat16")
    a = built_in(config.model, 16)
    table_ = jnp.ones((16, a.width), jnp.bfloat16)
    tokens = jnp.zeros((8, 100), jnp.int32)
    grad = jax.grad(lambda t: embed(a, t, tokens).astype(jnp.float32).sum())(table_)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad[0].astype(jnp.float32), 800)


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_to_the_bit(tmp_path, child_env):
    """A finished run loses its last checkpoint; the same command repeats those steps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fields = {"model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16", "sft.steps": 4, "run.steps": 4}
    fields |= {"loss.microbatch_rows": 8, "checkpoint.every": 2}
    fields = {name.replace(".", "__"): value for name, value in fields.items()}
    finish(start(child_env, whole, **fields))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    (cut / "summary.json").unlink()
    finish(start(child_env, cut, **fields))
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 5
