"""Loss, gradient and clip metrics against TRL 1.16's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config import ObjectiveConfig
from pspo_jax.objective.losses import denominators, loss_metrics, policy_loss, token_losses

KINDS = ("grpo", "bnpo", "dr_grpo", "dapo")


def evaluate(inputs, config, *, old=True, reference=False, max_length=6):
    x = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
    mask = x["mask"] > 0

    def loss_fn(log_probs):
        before = x["old"] if old else jax.lax.stop_gradient(log_probs)
        tokens = token_losses(log_probs, before, x["adv"], config, reference_log_probs=x["ref"] if reference else None)
        total = denominators(mask)
        loss = policy_loss(tokens.loss, mask, config.aggregation, total, max_length)
        return loss, loss_metrics(loss, tokens, x["entropies"], mask, total)

    (loss, metrics), grad = jax.value_and_grad(loss_fn, has_aux=True)(x["logps"])
    return loss, grad, metrics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["", "_onpolicy", "_kl_bias", "_kl_nobias"])
def test_matches_trl(golden, kind, variant):
    case = golden["trl_losses"]["cases"][kind + variant]
    kl = variant.startswith("_kl")
    config = ObjectiveConfig(
        aggregation=kind,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.04 if kl else 0.0,
        kl_unbiased=variant == "_kl_bias",
    )
    loss, grad, metrics = evaluate(golden["trl_losses"]["inputs"], config, old=variant != "_onpolicy", reference=kl)
    assert loss == pytest.approx(case["loss"], abs=1e-5)
    np.testing.assert_allclose(grad, case["grad"], atol=1e-5)
    expected = case["metrics"]
    assert metrics.low == pytest.approx(expected["clip_ratio/low_mean"], abs=1e-5)
    assert metrics.low_min == pytest.approx(expected["clip_ratio/low_min"], abs=1e-5)
    assert metrics.high == pytest.approx(expected["clip_ratio/high_mean"], abs=1e-5)
    assert metrics.high_max == pytest.approx(expected["clip_ratio/high_max"], abs=1e-5)
    assert metrics.low + metrics.high == pytest.approx(expected["clip_ratio/region_mean"], abs=1e-5)
    if kl:
        assert metrics.kl == pytest.approx(expected["kl"], abs=1e-5)


def test_clip_higher_and_length_constant(golden):
    inputs, cases = golden["trl_losses"]["inputs"], golden["trl_losses"]["cases"]
    higher = ObjectiveConfig(aggregation="dapo", clip_low=0.2, clip_high=0.28)
    assert evaluate(inputs, higher)[0] == pytest.approx(cases["dapo_cliphigher"]["loss"], abs=1e-5)
    constant = ObjectiveConfig(aggregation="dr_grpo", clip_low=0.2, clip_high=0.2)
    loss = evaluate(inputs, constant, max_length=100)[0]
    assert loss == pytest.approx(cases["dr_grpo_maxlen100"]["loss"], abs=1e-5)


def test_importance_weight_scales_the_surrogate_and_not_the_kl(golden):
    x = {k: jnp.asarray(v, jnp.float32) for k, v in golden["trl_losses"]["inputs"].items()}
    config = ObjectiveConfig(kl_coef=0.5)
    weight = jnp.array([1.0, 0.5, 0.25, 1.0])
    with_kl = token_losses(x["logps"], x["old"], x["adv"], config, weight, x["ref"])
    without = token_losses(x["logps"], x["old"], x["adv"], config)
    np.testing.assert_allclose(with_kl.loss, weight[:, None] * without.loss + 0.5 * with_kl.kl, rtol=1e-5, atol=1e-6)


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.integers(0, 2**31 - 1),
)
def test_shares_of_microbatches_add_up(kind, lengths, seed):
    """The sum over any split is the whole loss, fully masked rows included, and it is finite."""
    rng = np.random.default_rng(seed)
    mask = jnp.arange(5) < jnp.asarray(lengths)[:, None]
    losses = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    total = denominators(mask)
    whole = policy_loss(losses, mask, kind, total, 5)
    parts = sum(policy_loss(losses[i : i + 1], mask[i : i + 1], kind, total, 5) for i in range(4))
    assert np.isfinite(whole)
    assert float(whole) == pytest.approx(float(parts), abs=1e-5)


def test_unknown_aggregation_is_named():
    total = denominators(jnp.ones((1, 1), bool))
    with pytest.raises(ValueError, match="mean_of_means"):
        policy_loss(jnp.ones((1, 1)), jnp.ones((1, 1), bool), "mean_of_means", total, 1)
