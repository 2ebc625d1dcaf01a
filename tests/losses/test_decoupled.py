"""The decoupled loss of groups that an older policy sampled, against torch's autograd and plain formulas."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.presets import LOSSES
from pspo_jax.config.strategies import LossConfig
from pspo_jax.losses import LossInputs, denominators
from tests.helpers import slow_except
from tests.losses.golden import close, evaluate, replaced

R, T = 6, 7


def settings(**fields) -> LossConfig:
    preset = {name.removeprefix("loss."): value for name, value in LOSSES["dapo"].items()}
    return LossConfig(**preset | fields)


def drawn(seed: int, stale: float = 0.5):
    """(log_probs, inputs): some rows are of an older policy, some tokens masked, one row empty, one in no batch."""
    rng = np.random.default_rng(seed)
    old = -rng.gamma(1.0, 1.0, (R, T))
    log_probs = old + rng.normal(0, 0.3, (R, T))
    older = rng.random(R) < stale
    behaviour = np.where(older[:, None], old + rng.normal(0, 0.6, (R, T)), old)
    lengths = rng.integers(1, T + 1, R)
    lengths[0] = 0
    counted = np.arange(R) != 1
    mask = (np.arange(T) < lengths[:, None]) & counted[:, None]
    inputs = LossInputs(
        mask=jnp.asarray(mask),
        counted=jnp.asarray(counted),
        advantages=jnp.asarray(rng.normal(size=R), jnp.float32),
        loss_weight=jnp.asarray(rng.uniform(0.2, 1, R), jnp.float32),
        old_log_probs=jnp.asarray(old, jnp.float32),
        behaviour_log_probs=jnp.asarray(behaviour, jnp.float32),
    )
    return jnp.asarray(log_probs, jnp.float32), inputs


def torchs(log_probs, inputs, config):
    """J = mean over tokens of v w min(r A, clip(r) A), w = pi_old / mu cut or masked; its negative and gradient."""
    x = torch.tensor(np.asarray(log_probs), dtype=torch.float64, requires_grad=True)
    a = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    t = {k: torch.tensor(np.asarray(v)) for k, v in a.items() if v is not None}
    mask = t["mask"].double()
    old, mu = t["old_log_probs"].double(), t["behaviour_log_probs"].double()
    if config.off_policy == "coupled":
        old = mu
    gap = (old - mu) * mask
    if config.importance.startswith("sequence"):
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    w = gap.exp()
    cap = config.importance_cap
    w = torch.where(w > cap, torch.zeros_like(w), w) if config.importance.endswith("mask") else w.clamp(max=cap)
    if config.off_policy != "decoupled":
        w = torch.ones_like(w)
    advantage = t["advantages"].double()[:, None]
    r = (x - old).exp()
    s = torch.minimum(r * advantage, r.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
    if config.dual_clip:
        s = torch.where(advantage < 0, torch.maximum(s, config.dual_clip * advantage), s)
    loss = -(t["loss_weight"].double()[:, None] * w * s * mask).sum() / mask.sum()
    loss.backward()
    return loss.item(), x.grad.numpy()


@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(["decoupled", "coupled", "ignored"]),
    st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.sampled_from([0.0, 1.5]),
)
def test_loss_and_gradient_are_torchs(seed, off_policy, importance, dual):
    log_probs, inputs = drawn(seed)
    config = settings(off_policy=off_policy, importance=importance, dual_clip=dual)
    expected = torchs(log_probs, inputs, config)
    if off_policy == "coupled":
        inputs = dataclasses.replace(inputs, old_log_probs=inputs.behaviour_log_probs)
    loss, grad, _ = evaluate(log_probs, jnp.zeros((R, T)), inputs, config, denominators(inputs))
    close(loss, expected[0])
    close(grad, expected[1])


@pytest.mark.parametrize("loss", slow_except(("cispo", "dapo", "gspo", "vespo"), sorted(LOSSES)))
def test_with_behaviour_the_old_policy_all_three_are_one(loss):
    """mu = pi_old: the decoupled loss is the coupled one, to the bit, for every loss."""
    log_probs, inputs = drawn(3, stale=0)
    preset = {name.removeprefix("loss."): value for name, value in LOSSES[loss].items()}
    config = LossConfig(**preset)
    found = [
        evaluate(log_probs, jnp.zeros((R, T)), inputs, replaced(config, off_policy=mode), denominators(inputs))[:2]
        for mode in ("decoupled", "coupled", "ignored")
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0][0], other[0])
        np.testing.assert_array_equal(found[0][1], other[1])


@pytest.mark.parametrize("loss", slow_except(("cispo", "dapo", "gspo", "vespo"), sorted(LOSSES)))
def test_rows_that_are_in_no_batch_change_nothing(loss):
    """Whatever stands in them, infinities included."""
    log_probs, inputs = drawn(5)
    preset = {name.removeprefix("loss."): value for name, value in LOSSES[loss].items()}
    config = LossConfig(**preset, entropy_coef=0.01)
    entropy = jnp.ones((R, T))
    keep = np.array([0, *range(2, R)])
    few = LossInputs(
        **{f.name: None if (x := getattr(inputs, f.name)) is None else x[keep] for f in dataclasses.fields(LossInputs)}
    )
    without = evaluate(log_probs[keep], entropy[keep], few, config, denominators(few))
    garbage = dataclasses.replace(
        inputs,
        advantages=inputs.advantages.at[1].set(1e9),
        old_log_probs=inputs.old_log_probs.at[1].set(-1e4),
        behaviour_log_probs=inputs.behaviour_log_probs.at[1].set(-1e4),
    )
    found = evaluate(log_probs.at[1].set(50.0), entropy, garbage, config, denominators(garbage))
    close(found[0], without[0], 1e-6)
    close(np.asarray(found[1])[keep], without[1], 1e-6)
    assert not np.asarray(found[1])[1].any()
    for ours, theirs in zip(found[2], without[2], strict=True):
        close(ours, theirs, 1e-6)


def test_gspo_token_has_the_sequences_value_and_each_tokens_gradient():
    """With one advantage a row, both forms of GSPO have the same loss and the same gradient."""
    log_probs, inputs = drawn(8, stale=0)
    found = [
        evaluate(
            log_probs,
            jnp.zeros((R, T)),
            inputs,
            settings(ratio=ratio, aggregation="grpo", clip_low=0.05, clip_high=0.05),
            denominators(inputs),
        )
        for ratio in ("sequence", "sequence_token")
    ]
    close(found[0][0], found[1][0], 1e-6)
    close(found[0][1], found[1][1], 1e-6)
