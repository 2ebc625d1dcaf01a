"""Advantages against those of other trainers, and every estimator's statistics against plain Python."""

import functools
import math
import statistics
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.advantages import ESTIMATORS, ers, group_advantages, opo
from pspo_jax.advantages.interface import group_statistics
from pspo_jax.config.presets import PRESETS
from pspo_jax.config.strategies import AdvantageConfig, ForgettingConfig

NAN = math.nan
FIXED = ForgettingConfig(mode="fixed")
MOVING = ForgettingConfig(mode="fixed", half_life=0.06, low=0.1, high=0.9)
CASES = ("mixed", "allzero_allone", "float", "onehot8", "nan_row", "single_valid")

PUBLISHED = {
    "trl1.16_group": AdvantageConfig("group", "group"),
    "trl1.16_batch": AdvantageConfig("group", "batch"),
    "trl1.16_none": AdvantageConfig("group", "none"),
    "verl0.9_normTrue": AdvantageConfig("group", "group", eps=1e-6),
    "verl0.9_normFalse": AdvantageConfig("group", "none"),
    "verl0.9_rloo": AdvantageConfig("rloo", "none"),
    "slime_1e-6": AdvantageConfig("group", "group", eps=1e-6),
    "oat_grpo_1e-8": AdvantageConfig("group", "group", eps=1e-8),
    "openrlhf_group_norm_1e-9": AdvantageConfig("group", "group", eps=1e-9),
    "open_instruct_standard_1e-8_ddof0": AdvantageConfig("group", "group", ddof=0, eps=1e-8),
    "nemo_looFalse_norm": AdvantageConfig("group", "group", eps=1e-6),
}
# The last group of "float" is .3, .3, .3, .3000001: its deviations and its std are one or two roundings of a float32,
# and a tiny eps blows their quotient up. NeMo's formula rounds that std to 0, and then it does not divide at all.
NOISE = {"slime_1e-6": 1e-4, "oat_grpo_1e-8": 0.03, "openrlhf_group_norm_1e-9": 0.03, "nemo_looFalse_norm": 0.06}


def as_rewards(case):
    values = [NAN if r is None else r for r in case["rewards"]]
    return jnp.asarray(values, jnp.float32).reshape(-1, case["G"])


def advantages(config, rewards, lengths=None):
    rewards = jnp.asarray(rewards, jnp.float32)
    ids = jnp.arange(rewards.shape[0])
    return np.asarray(ESTIMATORS[config.name](config, FIXED).estimate((), ids, rewards, lengths)[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", PUBLISHED)
def test_matches_other_trainers(golden, setting, case):
    values = golden["advantages"][case]
    if setting not in values:
        assert case in ("nan_row", "single_valid")  # only TRL has missing verdicts
        return
    rewards = as_rewards(values)
    got = advantages(PUBLISHED[setting], rewards)
    tolerance = np.full(rewards.shape, 1e-6)
    if case == "float":
        tolerance[-1] = NOISE.get(setting, 1e-6)
    assert (np.abs(got - np.reshape(values[setting], rewards.shape)) <= tolerance).all(), got


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", ["trl1.16_std_group", "trl1.16_std_batch", "trl1.16_std_none", "nemo_looFalse_std"])
def test_standard_deviations_match_other_trainers(golden, setting, case):
    values = golden["advantages"][case]
    rewards = as_rewards(values)
    groups = rewards.reshape(1, -1) if setting.endswith("batch") else rewards
    got = np.broadcast_to(np.sqrt(group_statistics(groups, 1).variance)[:, None], groups.shape).ravel()
    for value, want in zip(got, values.get(setting, ()), strict=setting in values):
        assert want is None or value == pytest.approx(want, abs=1e-6)


def test_every_name_has_an_estimator():
    assert set(ESTIMATORS) == {preset["advantage.name"] for preset in PRESETS.values()}


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="median"):
        group_advantages(jnp.ones((1, 2)), "median")  # type: ignore[arg-type]


def judged(rewards):
    return [r for r in rewards if not math.isnan(r)]


def plain_variance(rewards, ddof):
    values = judged(rewards)
    return sum((r - statistics.fmean(values)) ** 2 for r in values) / max(len(values) - ddof, 1)


def plain_divisor(config, groups, rewards):
    match config.scale:
        case "group":
            return math.sqrt(plain_variance(rewards, config.ddof)) + config.eps
        case "batch":
            return math.sqrt(plain_variance([r for g in groups for r in g], config.ddof)) + config.eps
    return 1.0


def plain_rloo(rewards, lengths, i):
    return statistics.fmean(judged(rewards[:i] + rewards[i + 1 :]))


def plain_opo(rewards, lengths, i):
    known = [(r, n) for r, n in zip(rewards, lengths, strict=True) if not math.isnan(r)]
    return sum(r * n for r, n in known) / sum(n for _, n in known)


VERDICTS = st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0, NAN]), min_size=4, max_size=4)
SCALES = st.sampled_from(["group", "batch", "none"])
LENGTHS = st.lists(st.integers(1, 90), min_size=4, max_size=4)


@pytest.mark.parametrize(("name", "baseline"), [("rloo", plain_rloo), ("opo", plain_opo)])
@given(data=st.data())
def test_baseline_of_a_group_equals_a_plain_loop(name, baseline, data):
    config = AdvantageConfig(name, data.draw(SCALES), ddof=data.draw(st.integers(0, 1)), eps=0.05)
    groups = data.draw(st.lists(VERDICTS, min_size=2, max_size=2))
    lengths = data.draw(st.lists(LENGTHS, min_size=2, max_size=2))
    want = []
    for rewards, tokens in zip(groups, lengths, strict=True):
        alone = len(judged(rewards)) < 2
        by = plain_divisor(config, groups, rewards)
        want.append(
            [0.0 if alone or math.isnan(r) else (r - baseline(rewards, tokens, i)) / by for i, r in enumerate(rewards)]
        )
    np.testing.assert_allclose(advantages(config, groups, jnp.asarray(lengths)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["group", "rloo", "opo"])
def test_a_groups_only_verdict_is_worth_nothing(name):
    got = advantages(
        AdvantageConfig(name, "none"), [[NAN, 1, NAN], [NAN] * 3, [NAN, 1, 0]], jnp.ones((3, 3), jnp.int32)
    )
    assert np.count_nonzero(got[:2]) == 0 and got[2, 0] == 0 and (got[2, 1:] != 0).all()


def test_opo_takes_a_completion_without_tokens_for_one_token():
    config = AdvantageConfig("opo", "none")
    rewards = [[1.0, 0, 0, 1]]
    got = [advantages(config, rewards, jnp.array([[n, 3, 2, 5]])) for n in (0, 1)]
    np.testing.assert_array_equal(*got)


def test_opo_needs_lengths():
    with pytest.raises(ValueError, match=r"lengths=None: .*pass them"):
        opo(AdvantageConfig(scale="none"), FIXED).estimate((), jnp.array([0]), jnp.ones((1, 2)))


@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6))
def test_advantages_of_a_group_are_centred(rewards):
    # eps = 1: equal rewards can differ from their mean by a rounding, which a small eps would blow up.
    assert abs(advantages(AdvantageConfig("group", "group", eps=1.0), [rewards]).sum()) < 2e-5


def test_statistics_of_an_empty_group_are_finite():
    stats = group_statistics(jnp.full((1, 4), jnp.nan), ddof=1)
    assert np.isfinite([float(x[0]) for x in stats]).all()


class PlainErs:
    """ERS as its formulas read, one prompt at a time; a batch reads its history before it writes any."""

    def __init__(self, config, forgetting=FIXED):
        self.config, self.forgetting, self.history, self.visits = config, forgetting, {}, Counter()

    def alpha(self, prompt, moved):
        f = self.forgetting
        match self.config.alpha_mode:
            case "count":
                return 1 / (self.visits[prompt] + 1)
            case "policy_drift":
                return 1 - min(max(2 ** (-moved / f.half_life), f.low), f.high)
        return self.config.alpha

    def visit(self, prompt, rewards, policy_drift):
        mu, s2 = statistics.fmean(judged(rewards)), plain_variance(rewards, self.config.ddof)
        mode = self.config.stat_mode
        m, spread = mu, math.sqrt(s2) if mode == "linear_std" else s2
        if prompt in self.history:
            m_old, old, when = self.history[prompt]
            a = self.alpha(prompt, policy_drift - when)
            m = m_old + a * (mu - m_old)
            if mode == "published_head":
                old = old**2
            spread = (1 - a) * old + a * spread
            if mode != "linear_std":
                spread += a * (1 - a) * (mu - m_old) ** 2
        scale = math.sqrt(spread) if mode == "variance" else spread
        got = [0.0 if math.isnan(r) else (r - m) / (scale + self.config.eps) for r in rewards]
        return got, (m, spread, policy_drift)

    def estimate(self, ids, groups, policy_drift):
        out, news = [], {}
        for prompt, rewards in zip(ids, groups, strict=True):
            if len(judged(rewards)) < 2:
                out.append([0.0] * len(rewards))
                continue
            got, news[prompt] = self.visit(prompt, rewards, policy_drift)
            out.append(got)
        usable = [i for i, rewards in zip(ids, groups, strict=True) if len(judged(rewards)) > 1]
        self.history |= news
        self.visits.update(usable)
        return out


def batches(ids, verdicts):
    """Steps of three prompts out of four: their ids, their rewards, and how far the policy moves."""
    groups = st.lists(verdicts, min_size=3, max_size=3)
    return st.lists(st.tuples(ids, groups, st.sampled_from([0.0, 0.02, 0.1, 0.4])), min_size=1, max_size=6)


@functools.cache
def compiled(config):
    advantage = ers(config, MOVING)
    return advantage, jax.jit(advantage.estimate)


def assert_equals_plain_python(config, steps):
    (advantage, estimate), plain, policy_drift = compiled(config), PlainErs(config, MOVING), 0.0
    state = advantage.init(4)
    for ids, groups, moves in steps:
        args = jnp.asarray(ids), jnp.asarray(groups, jnp.float32), None, jnp.float32(policy_drift)
        got, state = estimate(state, *args)
        np.testing.assert_allclose(got, plain.estimate(ids, groups, policy_drift), rtol=1e-4, atol=2e-5)
        policy_drift += moves
    assert np.asarray(state.visits)[:4].tolist() == [plain.visits[i] for i in range(4)]
    for i, (m, spread, when) in plain.history.items():
        assert float(state.mean[i]) == pytest.approx(m, abs=1e-5)
        assert float(state.spread[i]) == pytest.approx(spread, rel=1e-4, abs=1e-5)
        assert state.policy_drift is None or float(state.policy_drift[i]) == pytest.approx(when, abs=1e-5)


STAT_MODES = ("variance", "linear_std", "published_head")
ALPHAS = [("fixed", 0.1), ("fixed", 0.99), ("fixed", 1.0), ("count", 0.99), ("policy_drift", 0.99)]
DISTINCT = st.permutations(range(4)).map(lambda order: order[:3])
REPEATED = st.lists(st.integers(0, 1), min_size=3, max_size=3)
COMPLETE = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4)


@pytest.mark.parametrize("stat_mode", STAT_MODES)
@pytest.mark.parametrize(("alpha_mode", "alpha"), ALPHAS)
@given(batches(DISTINCT, VERDICTS))
def test_ers_equals_plain_python(alpha_mode, alpha, stat_mode, steps):
    # A large eps, so that the rounding of a mean is not divided by next to nothing.
    assert_equals_plain_python(AdvantageConfig("ers", None, 1, 0.05, alpha, alpha_mode, stat_mode), steps)


@pytest.mark.parametrize("alpha_mode", ["fixed", "count", "policy_drift"])
@given(batches(REPEATED, COMPLETE))
def test_ers_of_repeated_prompts_reads_the_old_history_and_keeps_the_last(alpha_mode, steps):
    assert_equals_plain_python(AdvantageConfig("ers", None, 0, 0.05, 0.3, alpha_mode), steps)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_ers_of_repeated_prompts_keeps_the_last_that_is_usable(order):
    groups = [[0.0, 1, 1, 0], [0.0, 0, 0, 1], [NAN, NAN, NAN, 1]]
    steps = [([2, 2, 2], [groups[i] for i in order], 0.0), ([2, 0, 1], [[1.0, 1, 1, 0]] * 3, 0.0)]
    assert_equals_plain_python(AdvantageConfig("ers", None, 1, 0.05, 0.5), steps)


def histories(groups, **settings):
    """ERS state of prompt 0 after these groups of complete verdicts."""
    advantage = ers(AdvantageConfig(eps=1e-9, ddof=0, **settings), FIXED)
    state = advantage.init(1)
    for rewards in groups:
        _, state = advantage.estimate(state, jnp.array([0]), jnp.asarray([rewards], jnp.float32))
    return advantage, state


GROUPS = st.lists(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@given(GROUPS, st.floats(0.05, 0.95))
def test_variance_is_that_of_the_exponentially_weighted_mixture(groups, alpha):
    """v = E[x^2] - E[x]^2 over all groups, the k-th of n with weight alpha (1 - alpha)^(n - k)."""
    _, state = histories(groups, alpha=alpha)
    x = np.array(groups, np.float64)
    weight = np.array([(alpha if k else 1) * (1 - alpha) ** (len(x) - 1 - k) for k in range(len(x))])
    assert weight.sum() == pytest.approx(1)
    mean, square = weight @ x.mean(1), weight @ (x**2).mean(1)
    assert float(state.mean[0]) == pytest.approx(mean, abs=1e-5)
    assert float(state.spread[0]) == pytest.approx(square - mean**2, abs=1e-4)


@given(GROUPS)
def test_counted_visits_average_all_groups_alike(groups):
    _, state = histories(groups, alpha_mode="count")
    assert float(state.mean[0]) == pytest.approx(np.mean(groups), abs=1e-5)
    assert float(state.spread[0]) == pytest.approx(np.var(groups), abs=1e-4)


@pytest.mark.parametrize(("moves", "alpha"), [(0.0, 0.1), (0.06, 0.5), (0.03, 1 - 2**-0.5), (9.0, 0.9)])
def test_history_counts_less_the_further_the_policy_moved(moves, alpha):
    advantage = ers(AdvantageConfig(alpha_mode="policy_drift"), MOVING)
    state = advantage.init(1)
    for rewards, policy_drift in ([0.0, 0, 0, 1], 5.0), ([NAN, NAN, 1, NAN], 5.01), ([1.0, 1, 1, 1], 5.0 + moves):
        _, state = advantage.estimate(state, jnp.array([0]), jnp.array([rewards]), None, policy_drift)
    assert float(state.mean[0]) == pytest.approx(0.25 + alpha * 0.75, abs=1e-5)


@pytest.mark.parametrize(("alpha", "want"), [(0.99, 0.071), (0.5, 0.577)])
def test_zero_variance_group_keeps_a_signal(alpha, want):
    """Old mean .5 and sd .5, new group all right: A = (1 - m) / sqrt(v)."""
    advantage, state = histories([[0.0, 1, 0, 1]], alpha=alpha)
    got, _ = advantage.estimate(state, jnp.array([0]), jnp.ones((1, 4)))
    np.testing.assert_allclose(got[0], want, atol=1e-3)


def test_first_visit_is_grpo_and_history_belongs_to_the_prompt():
    advantage = ers(AdvantageConfig(alpha=0.3), FIXED)
    state = advantage.init(4)
    _, state = advantage.estimate(state, jnp.array([3]), jnp.array([[0.0, 0, 0, 1]]))
    rewards = jnp.array([[1.0, 0, 1, 1]])
    fresh, after = advantage.estimate(state, jnp.array([1]), rewards)
    np.testing.assert_allclose(fresh, group_advantages(rewards), atol=1e-5)
    assert float(after.mean[3]) == 0.25
    assert np.asarray(after.visits)[:4].tolist() == [0, 1, 0, 1]
    again, _ = advantage.estimate(after, jnp.array([3]), rewards)
    assert np.abs(np.asarray(again - fresh)).max() > 0.1


def test_missing_verdicts_teach_nothing():
    advantage = ers(AdvantageConfig(alpha=0.5), FIXED)
    state = advantage.init(2)
    got, after = advantage.estimate(state, jnp.array([0, 1]), jnp.array([[NAN, NAN, NAN, 1], [NAN, 1, 0, 1]]))
    assert np.asarray(got[0]).tolist() == [0, 0, 0, 0]
    assert float(got[1, 0]) == 0
    assert np.asarray(after.visits)[:2].tolist() == [0, 1]
    assert float(after.mean[1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("alpha_mode", ["fixed", "policy_drift"])
def test_history_follows_its_prompt_to_changed_data(alpha_mode):
    advantage = ers(AdvantageConfig(alpha=0.5, alpha_mode=alpha_mode), MOVING)
    state = advantage.init(3)
    first, rewards = jnp.array([[0.0, 0, 0, 1], [1.0, 1, 0, 1]]), jnp.array([[1.0, 0, 1, 1]] * 3)
    _, state = advantage.estimate(state, jnp.array([0, 2]), first, None, 0.1)
    want, _ = advantage.estimate(state, jnp.array([2, 1, 0]), rewards, None, 0.2)
    places = np.full(300, -1)
    places[[7, 290]] = 2, 0
    moved = advantage.follow(state, advantage.init(300), jnp.asarray(places))
    got, _ = advantage.estimate(moved, jnp.array([7, 8, 290]), rewards, None, 0.2)
    np.testing.assert_array_equal(got, want)
    assert np.flatnonzero(moved.visits).tolist() == [7, 290]
