"""Losses, gradients and metrics against TRL 1.16's and verl's own numbers, however rows are cut up and spread."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.strategies import Aggregation, LossConfig
from pspo_jax.losses import LossInputs
from pspo_jax.losses.policy_loss import aggregate, combine, denominators
from pspo_jax.losses.ratios import kl_estimate, top_entropy
from tests.helpers import slow_except
from tests.losses.golden import (
    TRL_LOSSES,
    close,
    config_of,
    evaluate,
    inputs_of,
    padded,
    part,
    replaced,
    scaled,
)

CASES = (
    [f"{kind}{variant}" for kind in TRL_LOSSES for variant in ("", "_onpolicy", "_kl_bias", "_kl_nobias")]
    + [f"{kind}_gspo" for kind in ("grpo", "dapo", "bnpo", "dr_grpo")]
    + ["dapo_cliphigher", "dapo_delta", "dr_grpo_maxlen100", "dapo_ga4_spg8", "grpo_ga4", "dapo_tis_token"]
    + ["dapo_top_entropy20", "dapo_opm0.05"]
)
NAMES = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/low_mean": "low",
    "clip_ratio/high_mean": "high",
    "clip_ratio/low_min": "low_min",
    "clip_ratio/high_max": "high_max",
    "cispo_clip_ratio": "high",
    "vespo/phi_seq_mean": "gamma",
}


def prepared(golden, name):
    """A case's log-probs, entropies, inputs, settings, denominators and length constant."""
    case = golden["trl_losses"]["cases"][name]
    config = config_of(case["kw"])
    log_probs, entropy, inputs = inputs_of(golden, case)
    if config.top_entropy < 1:
        chosen = top_entropy(entropy, inputs.mask, config.top_entropy)
        inputs = dataclasses.replace(inputs, top_entropy=chosen)
    return case, log_probs, entropy, inputs, config, scaled(denominators(inputs), case["kw"])


def check(case, loss, grad, metrics):
    close(loss, case["loss"])
    close(grad, case["grad"])
    for name, value in case["metrics"].items():
        if name == "clip_ratio/region_mean":
            close(metrics.low + metrics.high, value)
        else:
            close(getattr(metrics, NAMES[name]), value)


def test_no_case_is_left_out(golden):
    assert sorted(CASES) == sorted(golden["trl_losses"]["cases"])


@pytest.mark.parametrize("name", CASES)
def test_matches_trl(golden, name):
    case, log_probs, entropy, inputs, config, total = prepared(golden, name)
    check(case, *evaluate(log_probs, entropy, inputs, config, total, case["kw"].get("maxlen", 6)))


@pytest.mark.parametrize("cuts", slow_except([(1, 3)], [(2,), (1, 3), (1, 2, 3)]), ids=["two", "three", "four"])
@pytest.mark.parametrize("name", CASES)
def test_matches_trl_in_microbatches(golden, name, cuts):
    """The last row is fully masked: a microbatch of it alone is nothing but padding."""
    case, log_probs, entropy, inputs, config, total = prepared(golden, name)
    bounds = [0, *cuts, 4]
    shares = [
        evaluate(*part((log_probs, entropy, inputs), a, b), config, total, case["kw"].get("maxlen", 6))
        for a, b in itertools.pairwise(bounds)
    ]
    metrics = shares[0][2]
    for share in shares[1:]:
        metrics = combine(metrics, share[2])
    check(case, sum(s[0] for s in shares), np.concatenate([s[1] for s in shares]), metrics)


@pytest.mark.parametrize("name", slow_except(CASES[::6], CASES))
def test_matches_trl_on_eight_devices(golden, name):
    """With four more rows that are in no batch, one row a device: denominators and extremes are global."""
    case, log_probs, entropy, inputs, config, total = prepared(golden, name)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    spread = jax.device_put(padded((log_probs, entropy, inputs), 8), sharding)
    length = case["kw"].get("maxlen", 6)
    whole = scaled(jax.jit(denominators)(spread[2]), case["kw"])
    np.testing.assert_array_equal(np.array(whole), np.array(total))
    loss, grad, metrics = jax.jit(lambda x: evaluate(*x, config, whole, length))(spread)
    check(case, loss, np.asarray(grad)[:4], metrics)
    assert not np.asarray(grad)[4:].any()


AGGREGATIONS: dict[str, tuple[Aggregation, bool, int]] = {
    "token-mean": ("dapo", True, 6),
    "token-sum": ("token_sum", True, 6),
    "seq-mean-token-sum": ("luspo", False, 6),
    "seq-mean-token-sum-norm": ("dr_grpo", False, 6),
    "seq-mean-token-mean": ("grpo", False, 6),
    "seq-mean-token-mean_gbs4": ("grpo", True, 6),
    "seq-mean-token-sum-norm_f100_gbs4": ("dr_grpo", True, 100),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_matches_verls_aggregations(golden, name):
    """verl does not count fully masked rows, unless it is told the global batch size."""
    kind, counts, length = AGGREGATIONS[name]
    case = golden["trl_losses"]["cases"]["grpo"]
    _, _, inputs = inputs_of(golden, case)
    total = denominators(inputs, count_masked=counts)
    matrix = jnp.asarray(golden["verl"]["loss_mat"], jnp.float32)
    close(aggregate(matrix, inputs.mask, kind, total, length), golden["verl"]["agg"][name])


def test_every_verl_aggregation_is_tried(golden):
    assert set(AGGREGATIONS) == set(golden["verl"]["agg"])


@pytest.mark.parametrize("name", ["default", "cliphigher", "dualclip10"])
@pytest.mark.parametrize("ratio", ["vanilla", "gspo"])
def test_matches_verls_policy_losses(golden, ratio, name):
    """verl's GSPO is GSPO-token, averaged over the rows that have a token."""
    case = golden["verl"]["policy"][f"compute_policy_loss_{ratio}_{name}"]
    high = 0.28 if name == "cliphigher" else 0.2
    dual = 10.0 if name == "dualclip10" else 3.0
    kind = {"vanilla": ("token", "dapo"), "gspo": ("sequence_token", "grpo")}[ratio]
    config = LossConfig(
        surrogate="clip", ratio=kind[0], aggregation=kind[1], clip_low=0.2, clip_high=high, dual_clip=dual
    )
    log_probs, entropy, inputs = inputs_of(golden, golden["trl_losses"]["cases"]["grpo"])
    loss, _, metrics = evaluate(log_probs, entropy, inputs, config, denominators(inputs, count_masked=False))
    close(loss, case["loss"])
    close(metrics.low + metrics.high, case["actor/pg_clipfrac"])


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k1+", "k3+"])
def test_matches_verls_kl_estimators(golden, name):
    """By design k3 is not cut: verl cuts the log-ratio to 20 and the value to 10, which also stops the gradient, and
    TRL does neither. The two values where verl does are left out here."""
    kl = golden["verl"]["kl"]
    log_probs, reference = (jnp.asarray(kl[key], jnp.float32) for key in ("logp", "ref"))
    values = kl_estimate(log_probs, reference, name)
    grad = jax.grad(lambda x: kl_estimate(x, reference, name).sum())(log_probs)
    plain = name.removesuffix("+")
    ours = [i for i in range(5) if plain != "k3" or kl["k3"][i] < 10]
    assert len(ours) == (3 if plain == "k3" else 5)
    close(values[jnp.array(ours)], np.array(kl[plain])[ours])
    close(grad[jnp.array(ours)], np.array(golden["verl"]["kl_grad"][name])[ours])


def test_tokens_of_one_batch_weigh_the_same_in_every_minibatch(golden):
    """dapo divides by the batch's tokens per minibatch, bnpo by the minibatch's own."""
    _, _, inputs = inputs_of(golden, golden["trl_losses"]["cases"]["dapo"])
    first, second = part(inputs, 0, 2), part(inputs, 2, 4)
    totals = [denominators(inputs, half, minibatches=2) for half in (first, second)]
    assert [float(t.tokens) for t in totals] == [6.5, 6.5] and [float(t.minibatch_tokens) for t in totals] == [9, 4]
    assert [float(t.rows) for t in totals] == [2, 2]


def test_importance_weight_of_the_selector_scales_the_surrogate_and_not_the_kl(golden):
    case = golden["trl_losses"]["cases"]["dapo_kl_nobias"]
    log_probs, entropy, inputs = inputs_of(golden, case)
    config = config_of(case["kw"])
    weight = jnp.array([1.0, 0.5, 0.25, 1.0])
    total = denominators(inputs)
    weighted = dataclasses.replace(inputs, loss_weight=weight)
    bare = replaced(config, kl_coef=0.0)
    kl = evaluate(log_probs, entropy, inputs, config, total)[1] - evaluate(log_probs, entropy, inputs, bare, total)[1]
    surrogate = evaluate(log_probs, entropy, inputs, bare, total)[1]
    close(evaluate(log_probs, entropy, weighted, config, total)[1], weight[:, None] * surrogate + kl, 1e-6)


def test_entropy_bonus_is_a_mean_over_the_tokens_that_it_acts_on(golden):
    log_probs, _, inputs = inputs_of(golden, golden["trl_losses"]["cases"]["grpo"])
    entropy = jnp.asarray(golden["trl_losses"]["inputs"]["entropies"], jnp.float32)
    config = config_of({"loss_type": "grpo"})
    for chosen in (None, top_entropy(entropy, inputs.mask, 0.5)):
        inputs = dataclasses.replace(inputs, top_entropy=chosen)
        total = denominators(inputs)
        acted = np.asarray(inputs.mask if chosen is None else chosen)
        with_bonus = evaluate(log_probs, entropy, inputs, replaced(config, entropy_coef=0.3), total)[0]
        without = evaluate(log_probs, entropy, inputs, config, total)[0]
        close(without - with_bonus, 0.3 * np.asarray(entropy)[acted].mean())


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 2**31 - 1))
def test_top_entropy_is_numpys_quantile(tokens, share, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(48, bool)
    mask[rng.permutation(48)[:tokens]] = True
    entropy = rng.integers(0, 6, 48).astype(np.float32)
    found = top_entropy(jnp.asarray(entropy.reshape(6, 8)), jnp.asarray(mask.reshape(6, 8)), share)
    threshold = np.quantile(entropy[mask], 1 - share)
    sure = np.abs(entropy - threshold) > 2e-5
    expected = mask & (entropy >= threshold)
    np.testing.assert_array_equal(np.asarray(found).reshape(-1)[sure], expected[sure])


@given(
    st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "token_sum"]),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.integers(0, 2**31 - 1),
)
def test_shares_of_microbatches_add_up(kind, lengths, seed):
    """The sum over any split is the whole loss, fully masked rows included, and it is finite."""
    rng = np.random.default_rng(seed)
    mask = jnp.arange(5) < jnp.asarray(lengths)[:, None]
    losses = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    counted = jnp.asarray(rng.random(4) < 0.8)
    inputs = LossInputs(
        mask=mask & counted[:, None],
        counted=counted,
        advantages=losses[:, 0],
        loss_weight=losses[:, 0],
        old_log_probs=losses,
        behaviour_log_probs=losses,
    )
    total = denominators(inputs)
    whole = aggregate(losses, inputs.mask, kind, total, 5)
    parts = sum(aggregate(losses[i : i + 1], inputs.mask[i : i + 1], kind, total, 5) for i in range(4))
    assert np.isfinite(whole)
    assert float(whole) == pytest.approx(float(parts), abs=1e-5)


def test_unknown_aggregation_is_named(golden):
    _, _, inputs = inputs_of(golden, golden["trl_losses"]["cases"]["grpo"])
    with pytest.raises(ValueError, match="mean_of_means"):
        aggregate(jnp.ones((4, 6)), inputs.mask, "mean_of_means", denominators(inputs), 1)
