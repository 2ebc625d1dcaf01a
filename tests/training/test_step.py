"""The training step: against a naive version, invariant to how it is cut up, guarded, compiled once, donated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.model.interface import MASKED
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.step import init_state, make_train_step
from tests.helpers import random_prompts, relative, slow_except, tiny_config, tiny_policy

P, PAD, EOS = 9, 14, 13


SGD, ADAMW = optax.sgd(0.5), optax.adamw(1e-3)


@functools.cache
def shared_model():
    """(model, params, sampler): tests of one config share its programs."""
    config = tiny_config()
    model, params, _ = tiny_policy(config)
    return model, params, make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, PAD)


@functools.cache
def step_of(optimizer, config):
    """(algorithm, train step) of a config."""
    algorithm = build(config)
    return algorithm, make_train_step(shared_model()[0], optimizer, algorithm, config)


def setup(optimizer=SGD, **fields):
    config = tiny_config(**fields)
    model, params, sample = shared_model()
    algorithm, step = step_of(optimizer, config)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, algorithm, config, 40, P, jax.random.key(0))
    settings = SamplingParams.of(config.rollout, [EOS])
    return (
        config,
        model,
        state,
        step,
        lambda params, i: sample(
            params, random_prompts(config.rollout.prompts, P, seed=i), jax.random.key(i), settings
        ),
    )


def rewards_of(rollouts):
    """Varied and cheap: the share of even tokens."""
    even = (rollouts.tokens % 2 == 0) & rollouts.mask
    return even.sum(-1) / rollouts.lengths


def naive_gradient(model, params, rollouts, rewards, config):
    """Gradient of GRPO's token-mean clipped surrogate, row by row and from whole logits, on-policy."""
    t_max = rollouts.tokens.shape[-1]

    def log_probs_of(params, prompt, n, completion):
        """Of one row, without padding between: whole logits."""
        row = jnp.zeros(P + t_max, jnp.int32).at[:P].set(prompt)
        row = jax.lax.dynamic_update_slice(row, completion, (n,))
        logits = model.logits(params, model.hidden(params, row[None]))[0] / config.rollout.temperature
        every = jnp.take_along_axis(jax.nn.log_softmax(logits)[:-1], row[1:, None], axis=1)[:, 0]
        return jax.lax.dynamic_slice(every, (n - 1,), (t_max,))

    @jax.jit
    @jax.grad
    def gradient_of_row(params, prompt, n, completion, t, advantage):
        log_probs = log_probs_of(params, prompt, n, completion)
        ratio = jnp.exp(log_probs - jax.lax.stop_gradient(log_probs))
        return -jnp.where(jnp.arange(t_max) < t, ratio * advantage, 0).sum()

    total, count = jax.tree.map(np.zeros_like, params), 0
    prompts, tokens, lengths, rewards = jax.device_get((rollouts.prompts, rollouts.tokens, rollouts.lengths, rewards))
    for b in range(rewards.shape[0]):
        r = rewards[b].astype(np.float64)
        advantages = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
        for g in range(rewards.shape[1]):
            row = prompts.tokens[b], prompts.lengths[b], tokens[b, g], lengths[b, g], advantages[g]
            total = jax.tree.map(lambda a, x: a + np.asarray(x), total, gradient_of_row(params, *row))
            count += int(lengths[b, g])
    return jax.tree.map(lambda x: x / count, total)


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
def test_one_step_equals_a_naive_one(temperature):
    config, model, state, step, sample = setup(algorithm__name="grpo", rollout__temperature=temperature)
    params = jax.tree.map(jnp.copy, state.params)
    rollouts = sample(params, 0)
    rewards = rewards_of(rollouts)
    grads = naive_gradient(model, params, rollouts, rewards, config)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    state, metrics = step(state, rollouts, rewards)
    assert relative(state.params, want) < 1e-5
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-3)
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-4
    assert float(metrics["reward"]) == pytest.approx(float(rewards.mean()), rel=1e-5)


@pytest.mark.parametrize("name", slow_except(["pspo"], ["dr_grpo", "pspo"]))
def test_microbatches_change_nothing(name):
    results = []
    for rows in (0, 4):
        _, _, state, step, sample = setup(algorithm__name=name, loss__microbatch_rows=rows, loss__kl_coef=0.1)
        rollouts = sample(state.params, 0)
        results.append(step(state, rollouts, rewards_of(rollouts)))
    (a, metrics_a), (b, metrics_b) = results
    assert relative(a.params, b.params) < 1e-6
    for key in metrics_a:
        np.testing.assert_allclose(metrics_a[key], metrics_b[key], rtol=2e-3, atol=1e-5, err_msg=key)


def test_iterations_and_minibatches():
    fields = {"loss__num_iterations": 2, "loss__minibatches": 4, "algorithm__name": "grpo"}
    _, _, state, step, sample = setup(optimizer=optax.sgd(5.0), **fields)
    rollouts = sample(state.params, 0)
    state, metrics = step(state, rollouts, rewards_of(rollouts))
    assert int(state.updates) == 8
    assert float(metrics["clip_ratio/region_mean"]) > 0
    # The gap to the sampler is measured before the first update, so it stays at rounding.
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-4


def test_old_log_probs_of_trainer_and_sampler_agree():
    out = []
    for source in ("sampler", "trainer"):
        _, _, state, step, sample = setup(loss__old_log_probs=source, loss__num_iterations=2, loss__microbatch_rows=8)
        rollouts = sample(state.params, 0)
        out.append(step(state, rollouts, rewards_of(rollouts))[0].params)
    assert relative(*out) < 1e-5


def test_reference_policy_is_held_only_for_a_kl_term():
    assert setup()[2].reference is None
    _, _, state, step, sample = setup(algorithm__name="pspo", loss__microbatch_rows=0, loss__kl_coef=0.1)
    start = jax.tree.map(np.asarray, state.reference)
    for i in range(3):
        rollouts = sample(state.params, i)
        state, metrics = step(state, rollouts, rewards_of(rollouts))
        assert (float(metrics["kl"]) > 1e-7) == (i > 0)
    jax.tree.map(np.testing.assert_array_equal, state.reference, start)


def test_update_that_is_not_finite_is_skipped_and_counted():
    _, _, state, step, sample = setup(optimizer=ADAMW)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    rollouts = sample(state.params, 0)
    rewards = rewards_of(rollouts)
    bad = dataclasses.replace(rollouts, log_probs=rollouts.log_probs.at[0, 0, 0].set(jnp.nan))
    for expected in (1, 2):
        state, metrics = step(state, bad, rewards)
        assert int(state.skipped) == expected == int(metrics["skipped_updates"])
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert int(state.updates) == 0 and int(state.step) == 2
    state, _ = step(state, rollouts, rewards)
    assert int(state.skipped) == 0 and int(state.updates) == 1
    assert relative(state.params, before[0]) > 0


def test_no_verdicts_at_all_leave_the_policy_alone():
    _, _, state, step, sample = setup(algorithm__name="pspo")
    before = jax.tree.map(np.asarray, state.params)
    rollouts = sample(state.params, 0)
    state, metrics = step(state, rollouts, np.full((8, 4), np.nan, np.float32))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert float(metrics["rewards/no_verdict"]) == 1
    # There is nothing to take a mean of: no reward is not a reward of 0.
    unknown = {name for name, value in metrics.items() if not np.isfinite(float(value))}
    assert unknown == {"reward", "reward_std", "frac_reward_zero_std"}


@pytest.mark.parametrize("huge", [np.inf, -np.inf, 1e38])
def test_absurd_rewards_never_reach_the_per_prompt_state(huge):
    """One such number in a group counts as no verdict; priorities and statistics stay finite."""
    _, _, state, step, sample = setup(algorithm__name="pspo")
    rollouts = sample(state.params, 0)
    clean = np.array(rewards_of(rollouts), np.float32)
    dirty, missing = clean.copy(), clean.copy()
    dirty[1, 2], missing[1, 2] = huge, np.nan
    copy = jax.tree.map(jnp.copy, state)
    after, _ = step(state, rollouts, dirty)
    expected, _ = step(copy, rollouts, missing)
    assert relative(after.params, expected.params) == 0
    for a, b in zip(
        jax.tree.leaves((after.selector, after.advantage)),
        jax.tree.leaves((expected.selector, expected.advantage)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(after.selector.per_prompt).all()
    assert np.isfinite(after.selector.score).all()


def test_nothing_is_traced_after_the_second_step_and_state_is_donated():
    _, _, state, step, sample = setup(optimizer=ADAMW)
    batches = [sample(state.params, i) for i in range(4)]
    rewards = [rewards_of(r) for r in batches]
    state, _ = step(state, batches[0], rewards[0])
    state, _ = step(state, batches[1], rewards[1])
    old = jax.tree.leaves(state.params)[0]
    with jax.no_tracing(True):
        state, _ = step(state, batches[2], rewards[2])
        state, _ = step(state, batches[3], rewards[3])
    assert old.is_deleted()


def test_all_of_the_state_is_donated():
    """Alias bytes cover params and optimizer state: nothing of them is held twice."""
    _, _, state, step, sample = setup(optimizer=ADAMW)
    rollouts = sample(state.params, 0)
    memory = step.lower(state, rollouts, rewards_of(rollouts)).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert memory.alias_size_in_bytes >= held


def test_state_moves_with_the_step():
    """Selector and estimator learn inside the step: the prompts seen get new priorities and a history."""
    _, _, state, step, sample = setup(algorithm__name="pspo")
    rollouts = sample(state.params, 0)
    state, _ = step(state, rollouts, rewards_of(rollouts))
    assert np.asarray(state.advantage.visits)[:8].tolist() == [1] * 8
    assert (np.asarray(state.selector.per_prompt)[:8] != 1).all()
    assert (np.asarray(state.selector.per_prompt)[8:] == 1).all()


def test_masked_logits_carry_no_gradient():
    model, params, _ = tiny_policy()

    def total(p):
        return jax.nn.logsumexp(model.logits(p, jnp.ones((2, 16))), axis=-1).sum()

    head = jax.jit(jax.grad(total))(params)["head"]
    assert np.abs(np.asarray(head[:, 14:])).max() == 0
    assert float(model.logits(params, jnp.ones((1, 16)))[0, 15]) == pytest.approx(MASKED)
