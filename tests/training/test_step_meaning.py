"""What a step's numbers mean: verdicts and rewards, the KL, the batch that trains, and keys that never meet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from pspo_jax import advantages
from pspo_jax.arrays.groups import empty_groups
from pspo_jax.arrays.rows import LossInputs
from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.arrays.state import DROPOUT, EVALUATE, REPLAY, ROLLOUT, SELECT, purpose_key, run_key
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig
from pspo_jax.config.validation import validate
from pspo_jax.distributed.mesh import AXES, microbatch_size
from pspo_jax.losses.policy_loss import compute_loss, denominators
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.metrics import rollout_metrics
from pspo_jax.training.scoring import reference_weights
from pspo_jax.training.step import (
    behaviour_divergence,
    compute_advantages,
    init_state,
    make_collect,
    make_train_step,
    make_update,
)
from tests.helpers import random_prompts, tiny_config, tiny_policy

P, PAD, EOS, B, G = 9, 14, 13, 8, 4
NAN = np.nan


@functools.cache
def shared_model():
    """(model, params, sampler) of all tests."""
    model, params, _ = tiny_policy()
    return model, params, make_sampler(model, G, tiny_config().rollout.max_new_tokens, PAD)


def setup(**fields):
    config = tiny_config(**fields)
    model, params, sample = shared_model()
    algorithm, optimizer = build(config), optax.sgd(0.5)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, algorithm, config, 40, P, jax.random.key(0))
    rollouts = sample(params, random_prompts(B, P), jax.random.key(3), SamplingParams.of(config.rollout, [EOS]))
    return config, model, algorithm, optimizer, state, rollouts


def deviations(rewards, std):
    return (rewards - rewards.mean(1, keepdims=True)) / (std + 1e-4)


@pytest.fixture(scope="module")
def rollouts():
    return setup(algorithm__name="grpo")[5]


def test_groups_are_solved_by_their_verdicts_and_no_verdict_is_a_state_of_its_own(rollouts):
    right = np.array(
        [[1, 1, 1, 1], [0, 0, 0, 0], [NAN] * 4, [1, NAN, 1, 1], [0, NAN, NAN, NAN], [1, 0, 1, 0]] + [[NAN] * 4] * 2
    )
    shaped = np.where(np.isnan(right), NAN, 0.9)
    found = rollout_metrics(rollouts, jnp.asarray(shaped), jnp.asarray(right))
    for name, want in {"solved": 2, "unsolved": 2, "no_verdict": 3}.items():
        assert float(found[f"groups/{name}"]) == want / 8
    # Groups without a reward have no deviation that could be zero.
    assert float(found["frac_reward_zero_std"]) == 1 and float(found["reward"]) == pytest.approx(0.9)
    nothing = rollout_metrics(rollouts, jnp.full((B, G), NAN), jnp.full((B, G), NAN))
    assert np.isnan([float(nothing[name]) for name in ("reward", "reward_std", "frac_reward_zero_std")]).all()


@pytest.fixture(scope="module")
def penalised():
    """A step with the KL in the reward and truncated completions out of the loss."""
    made = setup(
        algorithm__name="mopps",
        loss__kl_coef=0.3,
        loss__kl_in="reward",
        loss__mask_truncated=True,
        replay__effective="advantages",
    )
    config, model, algorithm, optimizer, state, rollouts = made
    state = dataclasses.replace(state, reference=jax.tree.map(lambda x: x * 1.2, state.params))
    right = np.zeros((B, G), np.float32)
    right[0], right[1] = 1, [1, 0, 1, 0]
    # Every shaped reward is the same: only the KL tells completions apart.
    rewards = np.full((B, G), 0.8, np.float32)
    advantages, _, kl = jax.jit(lambda *args: compute_advantages(model, algorithm, config, *args))(
        state, rollouts, rewards
    )
    after, metrics = make_train_step(model, optimizer, algorithm, config)(state, rollouts, rewards, right)
    table = algorithm.selector.to_table(after.selector, jnp.int32(1))
    return rollouts, np.asarray(advantages), np.asarray(kl).reshape(B, G, -1), metrics, table


def test_verdicts_reach_the_selector_and_the_metrics(penalised):
    _, _, _, metrics, table = penalised
    success = np.asarray(table["success"])
    np.testing.assert_array_equal(success[:3], [1, 0.5, 0])
    assert float(metrics["groups/solved"]) == 1 / 8 and float(metrics["groups/unsolved"]) == 6 / 8
    assert float(metrics["reward"]) == pytest.approx(0.8)


def test_effective_groups_are_what_the_config_calls_so(penalised):
    assert float(penalised[3]["groups/effective"]) == B


def test_the_kl_in_the_reward_is_measured_and_reported(penalised):
    rollouts, _, kl, metrics, _ = penalised
    mask = np.asarray(rollouts.mask)
    assert float(metrics["kl"]) == pytest.approx(kl[mask].mean(), rel=1e-4) and kl[mask].mean() > 0


def test_completions_that_ended_do_not_pay_for_having_ended(penalised):
    """A truncated completion's own KL stands in the group's mean, as its reward does."""
    rollouts, advantages, kl, _, _ = penalised
    assert 0 < np.asarray(rollouts.ended).mean() < 1
    shaped = 0.8 - 0.3 * np.where(np.asarray(rollouts.mask), kl, 0).sum(-1)
    want = deviations(shaped, shaped.std(1, ddof=1, keepdims=True))
    np.testing.assert_allclose(advantages, want, rtol=1e-3, atol=1e-3)


def test_without_a_reference_there_is_no_kl_to_report_and_rewards_are_the_verdicts_by_default():
    config, model, algorithm, optimizer, state, rollouts = setup(algorithm__name="mopps")
    rewards = np.full((B, G), 2.0, np.float32)
    after, metrics = make_train_step(model, optimizer, algorithm, config)(state, rollouts, rewards)
    assert "kl" not in metrics
    assert float(metrics["groups/solved"]) == 1
    assert np.asarray(algorithm.selector.to_table(after.selector, jnp.int32(1))["success"])[:B].tolist() == [1] * B


@pytest.fixture(scope="module")
def sampled_dynamically():
    """One round of dynamic sampling with a truncated distribution and a scale of the batch, and its update."""
    made = setup(
        algorithm__name="dapo", advantage__scale="batch", rollout__top_p=0.7, rollout__prompts=B, loss__kl_coef=0.0
    )
    config, model, algorithm, optimizer, state, rollouts = made
    rewards = np.zeros((B, G), np.float32)
    rewards[:5, 0], rewards[:2, 1] = [1, 1, 3, 1, 1], 1
    state, collected = make_collect(model, algorithm, config)(state, rollouts, rewards)
    # The update donates the queue.
    waiting = jax.tree.map(np.array, state.queue.groups)
    _, metrics = make_update(model, optimizer, algorithm, config)(state, rollouts.temperature)
    return rollouts, rewards, waiting, collected, metrics


def test_dynamic_sampling_compares_with_the_distribution_that_was_drawn_from(sampled_dynamically):
    rollouts, _, _, _, metrics = sampled_dynamically
    effective = np.asarray(rollouts.mask)[:5]
    ratio = np.exp(np.asarray(rollouts.log_probs) - np.asarray(rollouts.sampling_log_probs))[:5]
    assert float(metrics["sampling/importance_sampling_ratio/mean"]) == pytest.approx(ratio[effective].mean(), rel=1e-3)
    assert ratio[effective].mean() < 0.99


def test_a_scale_of_the_batch_is_that_of_the_batch_that_trains(sampled_dynamically):
    """Ineffective groups of the round are not in it: their rewards would make the deviation smaller."""
    _, rewards, waiting, collected, metrics = sampled_dynamically
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(waiting.advantages)[:5], centred[:5], atol=1e-6)
    want = np.abs(deviations(rewards[:5], rewards[:5].std(ddof=1))).mean()
    assert float(metrics["advantages/abs_mean"]) == pytest.approx(want, rel=1e-4)
    assert "advantages/abs_mean" not in collected
    assert want != pytest.approx(np.abs(deviations(rewards, rewards.std(ddof=1)))[:5].mean(), rel=0.05)


@pytest.mark.parametrize("name", ["group", "rloo", "opo", "tracked_baseline"])
def test_a_scale_left_to_the_batch_is_the_scale_of_the_batch(name):
    """Where nothing is left out, dividing afterwards is dividing at once."""
    config = AdvantageConfig(name=name, scale="batch")
    forgetting = ForgettingConfig(mode="fixed")
    rewards = np.random.default_rng(0).random((6, G)).astype(np.float32)
    rewards[1, 2] = NAN
    lengths, ids = np.full((6, G), 3), np.arange(6)
    at_once, later = advantages.make(config, forgetting), advantages.make(config, forgetting, batch_differs=True)
    (want, _), (unscaled, _) = (jax.jit(x.estimate)(x.init(6), ids, rewards, lengths) for x in (at_once, later))
    assert at_once.over_batch is None and later.over_batch is not None
    np.testing.assert_allclose(later.over_batch(unscaled, rewards, np.ones(6, bool)), want, rtol=1e-5, atol=1e-6)


def of_policy(logits, actions, config, mu, old, reference):
    """The loss of one-token completions, one for each action, apart: [A]."""

    def one(action):
        rows = LossInputs(
            mask=jnp.ones((1, 1), bool),
            counted=jnp.ones(1, bool),
            advantages=jnp.zeros(1),
            loss_weight=jnp.ones(1),
            old_log_probs=old[action][None, None],
            behaviour_log_probs=mu[action][None, None],
            reference_log_probs=reference[action][None, None],
        )
        log_probs = jax.nn.log_softmax(logits)[action][None, None]
        return compute_loss(log_probs, jnp.zeros((1, 1)), rows, config, denominators(rows), 1)[0]

    return jax.vmap(one)(actions)


def log_softmax(logits):
    return np.float32(logits - np.log(np.exp(logits).sum()))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("off_policy", ["decoupled", "coupled"])
def test_the_unbiased_kl_of_replayed_tokens_has_the_gradient_of_the_kl(estimator, off_policy):
    """All tokens of a vocabulary of five, each as often as the older policy draws it, against the KL itself."""
    rng = np.random.default_rng(1)
    mu, pi, old, reference = (jnp.asarray(log_softmax(rng.normal(size=5))) for _ in range(4))
    fields = {"loss.kl_coef": 1.0, "loss.kl_estimator": estimator, "loss.importance_cap": 1e6}
    fields["loss.off_policy"] = off_policy
    config = resolve(replace(Config(), fields)).loss
    old = mu if off_policy == "coupled" else old

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def expected(logits, config):
        return (jnp.exp(mu) * of_policy(logits, jnp.arange(5), config, mu, old, reference)).sum()

    @jax.jit
    @jax.value_and_grad
    def kl(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - reference)).sum()

    value, gradient = kl(pi)
    found, found_gradient = expected(pi, config)
    assert float(found) == pytest.approx(float(value), rel=1e-4)
    np.testing.assert_allclose(found_gradient, gradient, atol=1e-5)
    biased = dataclasses.replace(config, kl_unbiased=False)
    assert np.abs(expected(pi, biased)[1] - gradient).max() > 1e-2


def test_stored_groups_that_the_devices_do_not_divide_are_ranked_by_their_kl():
    config, model, _, _, state, _ = setup(
        algorithm__name="popo", replay__order="kl", replay__capacity=5, loss__microbatch_rows=8
    )
    stored = empty_groups(5, G, P, config.rollout.max_new_tokens)

    def divergence(state):
        return behaviour_divergence(model, state, stored, jnp.float32(1), config)

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 8, 1, 1, 1), AXES)
    with jax.set_mesh(mesh):
        assert jax.eval_shape(divergence, state).shape == (5,)
        with pytest.raises(ConfigError, match=r"= 8: does not divide the 20 completions"):
            microbatch_size(20, 0)


def test_published_codes_estimator_has_a_slot_for_each_prompt_of_a_round():
    fields = {"algorithm.name": "pspo", "algorithm.variant": "published_code", "rollout.dynamic_sampling_rounds": 3}
    fields |= {"rollout.prompts": 100, "rollout.oversampling": 4.0}
    made = build(replace(Config(), fields)).estimator
    rewards = np.random.default_rng(0).integers(0, 2, (400, 4)).astype(np.float32)
    _, after = jax.jit(made.estimate)(made.init(1000), np.arange(400), rewards)
    assert int(after.visits.sum()) == 400 and after.visits[:400].tolist() == [1] * 400


def test_the_reference_of_adapters_is_the_policy_that_rl_begins_from():
    frozen, adapters = {"w": jnp.ones(3)}, {"a": jnp.full(2, 0.5)}
    found = {}
    for steps in (0, 5):
        config = tiny_config(loss__kl_coef=0.1, lora__rank=4, sft__steps=steps)
        algorithm = build(config)
        state = init_state(adapters, optax.sgd(1.0), algorithm, config, 40, P, jax.random.key(0), frozen)
        found[steps] = reference_weights(dataclasses.replace(state, params={"a": jnp.zeros(2)}))
    assert isinstance(found[0], SplitParams) and found[0].trained is None
    np.testing.assert_array_equal(found[5].trained["a"], adapters["a"])
    assert found[5].frozen is frozen


def test_keys_of_different_purposes_never_meet():
    """Held-out batches start at any row, and rows and draws are folded in as steps and places are."""
    seen = {}
    run = run_key(0)
    evaluation = jax.random.fold_in(run, EVALUATE)
    for number in range(40):
        for purpose in (SELECT, ROLLOUT, DROPOUT, REPLAY, EVALUATE):
            key = purpose_key(run, number, purpose)
            seen[tuple(np.asarray(jax.random.key_data(key)).tolist())] = (purpose, number)
    assert len(seen) == 200
    for start in range(8):
        for draw in range(5):
            key = jax.random.fold_in(jax.random.fold_in(evaluation, start), draw)
            assert tuple(np.asarray(jax.random.key_data(key)).tolist()) not in seen
    assert not np.array_equal(jax.random.key_data(run), jax.random.key_data(jax.random.key(0)))


def test_a_threshold_that_no_verdict_reaches_is_refused():
    fields = {"selection.success_threshold": 1.5}
    with pytest.raises(ConfigError, match=r"selection\.success_threshold=1\.5: .*selection.success=reward"):
        validate(replace(Config(), fields))
    validate(replace(Config(), fields | {"selection.success": "reward"}))


def test_exploration_is_rounded_over_a_whole_round():
    fields = {"selection.exploration": 0.1, "rollout.prompts": 4, "algorithm.name": "dapo"}
    with pytest.raises(ConfigError, match="less than half a prompt of the 4 that are rolled out at a time"):
        validate(replace(Config(), fields))
    validate(replace(Config(), fields | {"rollout.oversampling": 2.0}))
