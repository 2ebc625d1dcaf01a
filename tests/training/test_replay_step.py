"""The step with groups that an older policy sampled: what is replayed, how it is weighed, and rounds of sampling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.groups import groups_of
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.scoring import rows_of, score, score_some
from pspo_jax.training.step import init_state, make_collect, make_train_step, make_update
from tests import xla
from tests.helpers import random_prompts, relative, slow_except, tiny_config, tiny_policy
from tests.selection.helpers import compiled_whole

P, PAD, EOS, B, G = 9, 14, 13, 8, 4


SGD, ADAMW = optax.sgd(0.5), optax.adamw(1e-2)


@functools.cache
def shared_model():
    """(model, params, sampler): tests of one config share its programs."""
    config = tiny_config()
    model, params, _ = tiny_policy(config)
    return model, params, make_sampler(model, G, config.rollout.max_new_tokens, PAD)


algorithm_of = functools.cache(build)


@functools.cache
def step_of(optimizer, config):
    return make_train_step(shared_model()[0], optimizer, algorithm_of(config), config)


def setup(optimizer=SGD, **fields):
    config = tiny_config(**fields)
    model, params, sample = shared_model()
    algorithm = algorithm_of(config)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, algorithm, config, 40, P, jax.random.key(0))
    settings = SamplingParams.of(config.rollout, [EOS])

    def draw(params, i):
        """Rollouts of prompts 8 i to 8 i + 7."""
        prompts = random_prompts(B, P, seed=i)
        prompts = dataclasses.replace(prompts, ids=(prompts.ids + B * i) % 40)
        return sample(params, prompts, jax.random.key(i), settings)

    return config, model, algorithm, optimizer, state, draw


def stepper(made):
    return step_of(made[3], made[0])


def mixed(seed):
    """Rewards of which every group has two kinds."""
    rng = np.random.default_rng(seed)
    rewards = (rng.random((B, G)) < 0.5).astype(np.float32)
    rewards[:, 0], rewards[:, 1] = 0, 1
    return rewards


@pytest.mark.parametrize(
    ("name", "other"),
    [
        pytest.param("pspo", "popo", marks=pytest.mark.slow),
        pytest.param("pspo", "filter", marks=pytest.mark.slow),
        pytest.param("grpo", "popo", marks=pytest.mark.slow),
        pytest.param("grpo", "filter", marks=pytest.mark.slow),
    ],
)
def test_while_every_group_is_effective_replay_changes_no_bit(name, other):
    """POPO, the filter and plain runs: the same parameters, three steps of two iterations long."""
    found = []
    for replay in ("none", other):
        made = setup(ADAMW, algorithm__name=name, replay__name=replay, loss__num_iterations=2)
        step = jax.jit(stepper(made), donate_argnums=0, compiler_options=xla.AS_USERS_DO)
        state = made[4]
        for i in range(3):
            state, metrics = step(state, made[5](state.params, i), mixed(i))
        found.append((state.params, metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, *found)


@functools.cache
def params_after_replay(off_policy):
    made, state, _, (second, rewards) = replayed(loss__off_policy=off_policy)
    return stepper(made)(state, second, rewards)[0].params


def replayed(**fields):
    """A run whose second batch has two ineffective groups, in slots 2 and 5.

    Returns the setup, the state before the second step, both batches with their rewards, and the first step's params.
    """
    made = setup(algorithm__name="popo", **fields)
    step, state, draw = stepper(made), made[4], made[5]
    first, first_rewards = draw(state.params, 0), mixed(0)
    # Of the largest variance, hence the newest: group 6, then 1.
    first_rewards[:, :] = 0
    first_rewards[:, 0] = 1
    first_rewards[6], first_rewards[1] = [0, 0, 3, 3], [0, 0, 2, 2]
    state, _ = step(state, first, first_rewards)
    second, rewards = draw(state.params, 1), mixed(1)
    rewards[2], rewards[5] = 0, 1
    return made, state, (first, first_rewards), (second, rewards)


def advantages_of(rewards):
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)


@functools.cache
def row_gradient(cap):
    """A function of one row: sum over its tokens of w min(r A, clip(r) A), and its gradient in the first params."""
    model, loss = shared_model()[0], tiny_config().loss

    def value_of(params, old_params, prompt, prompt_length, tokens, length, behaviour, advantage):
        args = prompt[None], prompt_length[None], tokens[None]
        now, old = (completion_log_probs(model, p, *args)[0][0] for p in (params, old_params))
        w = jnp.minimum(jnp.exp(old - behaviour), cap)
        r = jnp.exp(now - old)
        clipped = jnp.clip(r, 1 - loss.clip_low, 1 + loss.clip_high)
        value = jax.lax.stop_gradient(w) * jnp.minimum(r * advantage, clipped * advantage)
        return jnp.where(jnp.arange(value.shape[0]) < length, value, 0).sum()

    return jax.jit(jax.grad(value_of))


def naive_gradient(params, groups, cap):
    """Of the token mean of -w min(r A, clip(r) A), row by row; groups are (rollouts, index, advantages) of a batch."""
    total, tokens = jax.tree.map(np.zeros_like, params), 0
    for rollouts, b, advantages in groups:
        prompts, drawn, lengths, behaviour = jax.device_get(
            (rollouts.prompts, rollouts.tokens, rollouts.lengths, rollouts.log_probs)
        )
        for g in range(G):
            row = prompts.tokens[b], prompts.lengths[b], drawn[b, g], lengths[b, g], behaviour[b, g], advantages[g]
            total = jax.tree.map(lambda t, x: t - np.asarray(x), total, row_gradient(cap)(params, params, *row))
            tokens += int(lengths[b, g])
    return jax.tree.map(lambda x: x / tokens, total)


def test_a_replayed_step_is_the_naive_one():
    """The two groups come back with their own advantages, weighed by pi_old / mu, and clipped around pi_old."""
    made, state, (first, first_rewards), (second, rewards) = replayed(loss__importance_cap=1.05)
    params = jax.tree.map(jnp.copy, state.params)
    old, new = advantages_of(first_rewards), advantages_of(rewards)
    batch = [(second, b, new[b]) for b in range(B)]
    batch[2], batch[5] = (first, 6, old[6]), (first, 1, old[1])
    grads = naive_gradient(params, batch, 1.05)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    state, metrics = stepper(made)(state, second, rewards)
    assert relative(state.params, expected) < 1e-5
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-3)
    assert float(metrics["replay/share"]) == 0.25 == float(metrics["replay/age_1"])
    assert float(metrics["groups/in_batch"]) == 8 and float(metrics["replay/age_mean"]) == 1
    assert float(metrics["replay/capped"]) > 0 and 0 < float(metrics["replay/ess"]) < 1
    assert float(metrics["replay/weight_max"]) > 1.05
    # Fresh rows alone say whether sampler and trainer agree.
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-4


@pytest.mark.parametrize("mode", slow_except([], ["coupled", "ignored"]))
def test_ablations_act(mode):
    assert relative(params_after_replay("decoupled"), params_after_replay(mode)) > 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="popo", marks=pytest.mark.slow),
        pytest.param({"replay__order": "kl"}, id="kl", marks=pytest.mark.slow),
        pytest.param({"loss__name": "gspo"}, id="gspo", marks=pytest.mark.slow),
    ],
)
def test_microbatches_change_nothing(fields):
    found = []
    for rows in (0, 4):
        made, state, _, (second, rewards) = replayed(
            loss__microbatch_rows=rows, loss__minibatches=2, loss__top_entropy=0.5, **fields
        )
        found.append(stepper(made)(state, second, rewards))
    (a, metrics_a), (b, metrics_b) = found
    assert relative(a.params, b.params) < 1e-6
    for key in metrics_a:
        np.testing.assert_allclose(metrics_a[key], metrics_b[key], rtol=2e-3, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_eight_devices_do_what_one_does():
    found = []
    for devices in (1, 8):
        mesh = jax.make_mesh((devices, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
            made, state, _, (second, rewards) = replayed(loss__microbatch_rows=8)
            state = jax.device_put(state, whole)
            second = jax.tree.map(lambda x, at=rows, all=whole: jax.device_put(x, at if x.ndim else all), second)
            found.append(stepper(made)(state, second, jax.device_put(rewards, rows)))
    (a, metrics_a), (b, metrics_b) = found
    assert relative(b.params, a.params) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, a.replay.groups.tokens, b.replay.groups.tokens)
    for key in metrics_a:
        np.testing.assert_allclose(metrics_a[key], metrics_b[key], rtol=2e-3, atol=1e-5, err_msg=key)


def test_slots_for_which_nothing_is_stored_are_in_no_mean():
    """At the first step the buffer is empty: the update is that of the effective groups alone."""
    made = setup(algorithm__name="popo")
    rollouts, rewards = made[5](made[4].params, 0), mixed(0)
    rewards[3], rewards[4] = 0, 1
    params = jax.tree.map(jnp.copy, made[4].params)
    batch = [(rollouts, b, advantages_of(rewards)[b]) for b in range(B) if b not in (3, 4)]
    grads = naive_gradient(params, batch, 2.0)
    state, metrics = stepper(made)(made[4], rollouts, rewards)
    assert relative(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)) < 1e-5
    assert float(metrics["groups/in_batch"]) == 6 and float(metrics["replay/share"]) == 0
    assert float(metrics["replay/ess"]) == 1


def test_a_batch_without_effective_groups_moves_nothing():
    made = setup(algorithm__name="popo")
    before = jax.tree.map(np.asarray, made[4].params)
    state, metrics = stepper(made)(made[4], made[5](made[4].params, 0), np.zeros((B, G), np.float32))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    # No token was computed, so none was compared with the sampler's.
    unknown = {name for name, value in metrics.items() if not np.isfinite(float(value))}
    assert unknown == {name for name in metrics if name.startswith("sampling/")}


def test_only_the_wanted_rows_are_scored():
    config, model, _, _, state, draw = setup(loss__microbatch_rows=8)
    rollouts = draw(state.params, 0)
    rows = rows_of(
        groups_of(rollouts, jnp.asarray(mixed(0)), jnp.asarray(mixed(0)), jnp.int32(0)), jnp.int32(0), config
    )
    other = jax.tree.map(lambda x: x * 1.3, state.params)
    one = jnp.float32(1.0)
    everything = jax.jit(lambda params, rows: score(model, params, rows, one, config)[0])(other, rows)
    scored = jax.jit(lambda params, rows, wanted: score_some(model, params, rows, wanted, one, config))
    for wanted in ([], [0], [31, 2, 3, 17], range(B * G)):
        want = np.isin(np.arange(B * G), wanted)
        found = scored(other, rows, want)
        expected = np.where(want[:, None], everything, rows.old_log_probs)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found)[~want], np.asarray(rows.old_log_probs)[~want])


def test_nothing_is_traced_after_the_second_step_with_replay():
    made, state, _, _ = replayed()
    step, draw = stepper(made), made[5]
    batches = [draw(state.params, i) for i in range(4)]
    many = [mixed(i) for i in range(4)]
    many[2][:5], many[3][:] = 0, 1
    for i in range(2):
        state, _ = step(state, batches[i], many[i])
    with jax.no_tracing(True):
        for i in (2, 3):
            state, metrics = step(state, batches[i], many[i])
    assert float(metrics["replay/share"]) > 0.5


def rounds_of(made):
    config, model, algorithm, optimizer, state, draw = made
    return make_collect(model, algorithm, config), make_update(model, optimizer, algorithm, config), state, draw


def test_rounds_fill_a_batch_and_what_is_left_over_waits():
    made = setup(algorithm__name="dapo", optimizer=ADAMW)
    collect, update, state, draw = rounds_of(made)
    waiting, drawn = [], []
    for i, dull in enumerate((5, 3, 2)):
        rollouts, rewards = draw(state.params, i), mixed(i)
        rewards[:dull] = 0
        drawn += rollouts.prompts.ids[dull:].tolist()
        state, metrics = collect(state, rollouts, rewards)
        waiting.append(int(metrics["groups/waiting"]))
        assert int(state.step) == 0
    assert waiting == [3, 8, 14]
    state, metrics = update(state, jnp.float32(1))
    assert int(state.step) == 1 and float(metrics["groups/in_batch"]) == 8 and float(metrics["replay/share"]) == 0
    assert int(state.queue.held) == 6
    assert state.queue.groups.prompts.ids[:6].tolist() == drawn[8:]
    # What waited is of an older policy now, and is weighed so.
    state, metrics = update(state, jnp.float32(1))
    assert float(metrics["replay/share"]) == 0.75 and float(metrics["groups/in_batch"]) == 6
    assert float(metrics["replay/ess"]) < 1 and int(state.queue.held) == 0


def test_one_full_round_is_the_plain_step():
    """Collect and update on groups that are all effective: the parameters, selector and estimator of the step."""
    plain, cut = (setup(ADAMW, algorithm__name="pspo", rollout__dynamic_sampling_rounds=n) for n in (1, 3))
    rollouts, rewards = plain[5](plain[4].params, 0), mixed(0)
    expected, _ = stepper(plain)(plain[4], rollouts, rewards)
    collect, update, state, _ = rounds_of(cut)
    state, _ = collect(state, rollouts, rewards)
    state, _ = update(state, rollouts.temperature)
    assert relative(state.params, expected.params) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, state.advantage, expected.advantage)
    jax.tree.map(np.testing.assert_array_equal, state.selector.per_prompt, expected.selector.per_prompt)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("uniform", "pps", "mopps", "greso")]


@pytest.mark.parametrize("name", ["prioritized_replay", *SLOW])
def test_a_prompt_is_not_rolled_out_twice_in_a_step(name):
    """A step's draws are disjoint, and a prompt rests only as long as the cooldown says."""
    config = tiny_config(algorithm__name="dapo", selection__name=name, rollout__dynamic_sampling_rounds=3)
    selector = compiled_whole(build(config).selector)
    nothing = RolloutOutcome(*[jnp.zeros((B, G))] * 3)
    state, everyone = selector.init(40), set()
    for step in range(4):
        seen = []
        for number in range(3):
            key = jax.random.fold_in(jax.random.key(step), number)
            ids, _, state = selector.select(state, key, jnp.int32(step), B)
            state = selector.observe(state, ids, nothing, jnp.int32(step))
            seen += ids.tolist()
        # 40 prompts, 24 of which rest from the step before: 16 are new, and then the oldest return.
        assert len(set(seen)) >= 16
        assert step > 0 or len(set(seen)) == 24
        everyone |= set(seen)
    assert everyone == set(range(40))


def test_kl_in_the_reward_is_taken_before_the_advantages():
    made = setup(algorithm__name="grpo", loss__kl_coef=0.3, loss__kl_in="reward", advantage__scale="none")
    rollouts, rewards = made[5](made[4].params, 0), mixed(0)
    state = dataclasses.replace(made[4], reference=jax.tree.map(lambda x: x * 1.2, made[4].params))
    flat = jax.tree.map(lambda x: x.reshape(B * G, -1), (rollouts.tokens, rollouts.mask, rollouts.log_probs))
    prompts, lengths = (jnp.repeat(x, G, axis=0) for x in (rollouts.prompts.tokens, rollouts.prompts.lengths))
    score_rows = jax.jit(lambda *args: completion_log_probs(made[1], *args)[0])
    reference = score_rows(state.reference, prompts, lengths, flat[0])
    ratio = reference - flat[2]
    of_tokens = jnp.where(flat[1], jnp.exp(ratio) - ratio - 1, 0)
    kl = np.asarray(of_tokens.sum(1)).reshape(B, G)
    shaped = rewards - 0.3 * kl
    _, metrics = stepper(made)(state, rollouts, rewards)
    expected = np.abs(shaped - shaped.mean(1, keepdims=True)).mean()
    assert float(metrics["advantages/abs_mean"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(float(of_tokens.sum() / flat[1].sum()), rel=1e-4)
    assert float(metrics["reward"]) == pytest.approx(rewards.mean())


def test_truncated_completions_can_be_left_out():
    made = setup(algorithm__name="grpo", loss__mask_truncated=True)
    rollouts = made[5](made[4].params, 0)
    groups = groups_of(rollouts, jnp.asarray(mixed(0)), jnp.asarray(mixed(0)), jnp.int32(0))
    rows = rows_of(groups, jnp.int32(0), made[0])
    ended = np.asarray(rollouts.ended).reshape(-1)
    assert 0 < ended.sum() < B * G
    assert np.asarray(rows.mask).any(axis=1).tolist() == ended.tolist()
