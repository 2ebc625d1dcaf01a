"""The step with completions of other prompts beside its batch: what they add to the loss, and that layouts agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.state import REPLAY, purpose_key
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.schema import Config
from pspo_jax.losses.log_probs import completion_log_probs
from pspo_jax.runs.accounting import RunAccounting
from pspo_jax.training.splitting import split_minibatches
from tests.helpers import relative
from tests.training.test_replay_step import B, G, advantages_of, mixed, setup, stepper

EXTRA = 6
CAP = 1.05


def prepared(**fields):
    return setup(algorithm__name="aper", replay__extra=EXTRA, loss__importance_cap=CAP, **fields)


def second_step(**fields):
    """A run before its second step: the setup, the state, and the second batch with its rewards."""
    made = prepared(**fields)
    state, _ = stepper(made)(made[4], made[5](made[4].params, 0), mixed(0))
    rewards = mixed(1)
    rewards[2], rewards[5] = 0, 1
    return made, state, (made[5](state.params, 1), rewards)


def padded_rows(batches):
    """Rows (prompts, lengths, tokens, mask, log mu, advantages), one for each completion, in NumPy.

    Args:
      batches: list of (rollouts or groups [B, G, T], advantages [B, G]).
    """
    parts = []
    for batch, advantages in batches:
        size = advantages.shape[1]
        p = [np.repeat(x, size, axis=0) for x in (batch.prompts.tokens, batch.prompts.lengths)]
        rows = [np.asarray(x).reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask, batch.log_probs)]
        parts.append((*p, *rows, np.ravel(advantages)))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def naive_loss(made, params, old_params, rows):
    """Token mean of w min(r A, clip(r) A) over padded rows."""
    loss = made[0].loss
    prompts, lengths, tokens, mask, behaviour, advantages = rows
    now, old = (completion_log_probs(made[1], p, prompts, lengths, tokens)[0] for p in (params, old_params))
    w = jnp.minimum(jnp.exp(old - behaviour), CAP)
    r, a = jnp.exp(now - old), advantages[:, None]
    value = jax.lax.stop_gradient(w) * jnp.minimum(r * a, jnp.clip(r, 1 - loss.clip_low, 1 + loss.clip_high) * a)
    return -jnp.where(mask, value, 0).sum() / mask.sum()


def naive_gradient(made, params, rows):
    return jax.jit(jax.grad(lambda new, old: naive_loss(made, new, old, rows)))(params, params)


def added_to(made, state):
    """What the replay adds to the step after `state`, drawn once more; no batch is needed, since draws come first."""
    key, batch = purpose_key(state.key, state.step, REPLAY), jax.tree.map(lambda x: x[:1], state.replay.groups)
    return jax.jit(made[2].replay.add_rollouts)(state.replay, batch, state.step, key)[0]


def test_the_step_is_that_of_the_batch_and_the_drawn_rows():
    """The gradient of one loss over fresh and replayed completions, with stored advantages and weights pi_old / mu."""
    made, state, (second, rewards) = second_step()
    added = jax.device_get(added_to(made, state))
    stored = np.asarray(state.replay.groups.advantages)[np.asarray(state.replay.groups.counted), 0]
    np.testing.assert_allclose(np.sort(stored), np.sort(advantages_of(mixed(0)).ravel()), rtol=1e-5)
    assert added.counted.all() and set(added.step.tolist()) == {0}
    assert len(set(added.prompts.ids.tolist())) > 1 and not set(added.prompts.ids) & set(second.prompts.ids.tolist())
    fresh = jax.device_get(second)
    grads = naive_gradient(
        made, state.params, padded_rows([(fresh, advantages_of(rewards)), (added, added.advantages)])
    )
    moved = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), state.params, grads)
    after, metrics = stepper(made)(state, second, rewards)
    assert relative(after.params, moved) < 1e-5
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-3)
    assert float(metrics["replay/completions"]) == EXTRA and float(metrics["replay/age_mean"]) == 1
    assert float(metrics["replay/share"]) == pytest.approx(EXTRA / (B * G + EXTRA))
    assert float(metrics["groups/in_batch"]) == B
    assert float(metrics["replay/stored"]) == B * G + (B - 2) * G
    assert 0 < float(metrics["replay/ess"]) < 1 and float(metrics["replay/weight_max"]) > CAP
    # Fresh rows alone say whether sampler and trainer agree.
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-4


def test_places_for_which_nothing_is_stored_are_in_no_mean():
    """At the first step the update is that of the batch alone."""
    made = prepared()
    rollouts = made[5](made[4].params, 0)
    grads = naive_gradient(made, made[4].params, padded_rows([(jax.device_get(rollouts), advantages_of(mixed(0)))]))
    moved = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), made[4].params, grads)
    state, metrics = stepper(made)(made[4], rollouts, mixed(0))
    assert relative(state.params, moved) < 1e-5
    assert float(metrics["replay/completions"]) == 0 and float(metrics["replay/ess"]) == 1


def test_minibatches_split_whole_groups_and_the_rows_beside_them():
    rows = jnp.arange(B * G + EXTRA)
    first, second = split_minibatches(rows, None, 2, G, EXTRA)[0].tolist()
    groups = np.arange(B * G).reshape(B, G)
    assert first == [*groups[::2].ravel(), 32, 34, 36] and second == [*groups[1::2].ravel(), 33, 35, 37]


def assert_alike(found):
    (a, metrics_a), *others = found
    for b, metrics_b in others:
        assert relative(b.params, a.params) < 2e-6
        jax.tree.map(np.testing.assert_array_equal, a.replay.groups.tokens, b.replay.groups.tokens)
        for key in metrics_a.keys() - {"update/useful_tokens", "update/entropy", "update/completions"}:
            np.testing.assert_allclose(metrics_a[key], metrics_b[key], rtol=2e-3, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_packed_rows_give_what_padded_ones_do():
    made, state, batch = second_step(loss__packing=True)
    plain, before, same = second_step()
    assert_alike([stepper(plain)(before, *same), stepper(made)(state, *batch)])


@pytest.mark.slow
def test_packed_minibatches_give_what_padded_ones_do():
    """Two minibatches of 19 rows, with and without shared prompts; the learning rate follows the sample size."""
    found = []
    for fields in ({}, {"loss__packing": True}, {"loss__packing": True, "loss__share_prompts": False}):
        made, state, batch = second_step(loss__minibatches=2, loss__ess_scaling="sqrt", **fields)
        found.append(stepper(made)(state, *batch))
    assert float(found[0][1]["update/rate_factor"]) < 1
    assert_alike(found)


@pytest.mark.slow
def test_eight_devices_do_what_one_does():
    prepared()  # the shared weights are made on one device
    found = []
    for devices in (1, 8):
        mesh = jax.make_mesh((devices, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
            made = setup(algorithm__name="aper", replay__extra=8, loss__microbatch_rows=8)
            state = jax.device_put(made[4], whole)
            for i in range(2):
                rollouts, rewards = made[5](state.params, i), mixed(i)
                places = jax.tree.map(lambda x, n=rows, w=whole: n if x.ndim else w, rollouts)
                rollouts = jax.device_put(rollouts, places)
                state, metrics = stepper(made)(state, rollouts, jax.device_put(rewards, rows))
            found.append((jax.device_get(state), jax.device_get(metrics)))
    assert float(found[0][1]["replay/completions"]) == 8
    assert_alike(found)


@pytest.mark.slow
def test_a_saved_buffer_goes_on_to_the_bit(tmp_path):
    made, state, (second, rewards) = second_step()
    kept = state.to_save()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), kept)
    with Checkpoints(tmp_path, Config().checkpoint) as checkpoints:
        checkpoints.save(1, kept, {"step": 1, "totals": RunAccounting().save()})
        checkpoints.wait()
        restored = checkpoints.restore(abstract, print, lambda metadata: None)
    assert restored is not None
    expected, _ = stepper(made)(state, second, rewards)
    found, metrics = stepper(made)(restored[0].joined(None), second, rewards)
    assert float(metrics["replay/completions"]) == EXTRA
    for part in ("params", "opt_state", "replay", "selector"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(expected, part))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"loss__num_iterations": 2, "loss__minibatches": 2, "loss__kl_coef": 0.1},
        {"loss__off_policy": "coupled"},
        {"loss__off_policy": "ignored"},
        {"loss__old_log_probs": "trainer", "loss__top_entropy": 0.5},
        {"loss__name": "gspo", "loss__mask_truncated": True},
        {"advantage__name": "ers", "selection__name": "pps"},
        {"advantage__scale": "batch"},
    ],
)
def test_other_settings_replay_too(fields):
    """Microbatches change nothing, whatever else is set."""
    found = []
    for rows in (0, 2):
        made, state, batch = second_step(loss__microbatch_rows=rows, **fields)
        found.append(stepper(made)(state, *batch))
    assert float(found[0][1]["replay/completions"]) == EXTRA
    assert_alike(found)


@pytest.mark.slow
def test_advantages_are_stored_as_they_trained():
    """Those divided by a scale of the batch are divided once, when they train for the first time."""
    made = setup(algorithm__name="aper", advantage__scale="batch", replay__extra=EXTRA)
    rewards = mixed(0)
    state, _ = stepper(made)(made[4], made[5](made[4].params, 0), rewards)
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / (rewards.std(ddof=1) + 1e-4)
    stored = np.asarray(state.replay.groups.advantages)[np.asarray(state.replay.groups.counted), 0]
    np.testing.assert_allclose(np.sort(stored), np.sort(want[want != 0]), rtol=1e-3)
    added = added_to(made, state)
    assert set(np.asarray(added.advantages)[:, 0].tolist()) <= set(stored.tolist())
