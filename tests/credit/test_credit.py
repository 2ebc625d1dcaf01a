"""Advantages against TRL's own, ERS against plain Python, and the identities behind it."""

import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config import CreditConfig
from pspo_jax.credit import ers, group, group_advantages
from pspo_jax.credit.base import group_statistics

CASES = ("mixed", "allzero_allone", "float", "onehot8", "nan_row", "single_valid")


def as_rewards(case):
    values = [math.nan if r is None else r for r in case["rewards"]]
    return jnp.asarray(values, jnp.float32).reshape(-1, case["G"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_matches_trl(golden, case, scale):
    values = golden["advantages"][case]
    got = group_advantages(as_rewards(values), scale)
    np.testing.assert_allclose(np.ravel(got), values[f"trl1.16_{scale}"], atol=1e-6)


def test_matches_verl(golden):
    values = golden["advantages"]["mixed"]
    got = group_advantages(as_rewards(values), "group", eps=1e-6)
    np.testing.assert_allclose(np.ravel(got), values["verl0.9_normTrue"], atol=1e-6)


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="median"):
        group_advantages(jnp.ones((1, 2)), "median")  # type: ignore[arg-type]


class PlainErs:
    """ERS as its formulas read, one prompt at a time."""

    def __init__(self, alpha, eps=1e-4):
        self.alpha, self.eps, self.history = alpha, eps, {}

    def estimate(self, prompt, rewards):
        mu, s2 = statistics.fmean(rewards), statistics.variance(rewards)
        if prompt in self.history:
            m_old, v_old = self.history[prompt]
            m = m_old + self.alpha * (mu - m_old)
            v = (1 - self.alpha) * v_old + self.alpha * s2
            v += self.alpha * (1 - self.alpha) * (mu - m_old) ** 2
        else:
            m, v = mu, s2
        self.history[prompt] = (m, v)
        return [(r - m) / (math.sqrt(v) + self.eps) for r in rewards]


@given(
    st.sampled_from([0.1, 0.5, 0.99, 1.0]),
    st.lists(
        st.tuples(st.permutations(range(5)), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8)),
        min_size=1,
        max_size=6,
    ),
)
def test_ers_equals_plain_python(alpha, visits):
    credit, plain = ers(CreditConfig(alpha=alpha)), PlainErs(alpha)
    state = credit.init(5)
    for order, rewards in visits:
        ids = np.array(order[:2])
        groups = np.array(rewards, np.float32).reshape(2, 4)
        got, state = credit.estimate(state, jnp.asarray(ids), jnp.asarray(groups))
        want = [plain.estimate(int(i), g.tolist()) for i, g in zip(ids, groups, strict=True)]
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)
    for i, (m, v) in plain.history.items():
        assert float(state.mean[i]) == pytest.approx(m, abs=1e-5)
        assert float(state.spread[i]) == pytest.approx(v, abs=1e-5)


@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.floats(0.05, 0.95))
def test_variance_is_that_of_the_mixture(rewards, alpha):
    """v after the second visit = E[x^2] - E[x]^2 of old and new group mixed (1 - alpha : alpha)."""
    credit = ers(CreditConfig(alpha=alpha, ddof=0))
    first, second = np.array([[0.0, 1, 1, 0]], np.float32), np.array([rewards], np.float32)
    state = credit.init(1)
    for g in (first, second):
        _, state = credit.estimate(state, jnp.array([0]), jnp.asarray(g))
    mean = (1 - alpha) * first.mean() + alpha * second.mean()
    square = (1 - alpha) * (first**2).mean() + alpha * (second**2).mean()
    assert float(state.spread[0]) == pytest.approx(square - mean**2, abs=1e-4)


@pytest.mark.parametrize(("alpha", "advantage"), [(0.99, 0.071), (0.5, 0.577)])
def test_zero_variance_group_keeps_a_signal(alpha, advantage):
    """Old mean .5 and sd .5, new group all right: A = (1 - m) / sqrt(v)."""
    credit = ers(CreditConfig(alpha=alpha, eps=1e-9, ddof=0))
    state = credit.init(1)
    _, state = credit.estimate(state, jnp.array([0]), jnp.array([[0.0, 1, 0, 1]]))
    got, _ = credit.estimate(state, jnp.array([0]), jnp.ones((1, 4)))
    np.testing.assert_allclose(got[0], advantage, atol=1e-3)


def test_first_visit_is_grpo_and_history_belongs_to_the_prompt():
    credit = ers(CreditConfig(alpha=0.3))
    state = credit.init(4)
    _, state = credit.estimate(state, jnp.array([3]), jnp.array([[0.0, 0, 0, 1]]))
    rewards = jnp.array([[1.0, 0, 1, 1]])
    fresh, after = credit.estimate(state, jnp.array([1]), rewards)
    np.testing.assert_allclose(fresh, group_advantages(rewards), atol=1e-5)
    assert float(after.mean[3]) == 0.25
    assert np.asarray(after.visits).tolist() == [0, 1, 0, 1]
    again, _ = credit.estimate(after, jnp.array([3]), rewards)
    assert np.abs(np.asarray(again - fresh)).max() > 0.1


def test_missing_verdicts_teach_nothing():
    credit = ers(CreditConfig(alpha=0.5))
    state = credit.init(2)
    nan = math.nan
    got, after = credit.estimate(state, jnp.array([0, 1]), jnp.array([[nan, nan, nan, 1], [nan, 1, 0, 1]]))
    assert np.asarray(got[0]).tolist() == [0, 0, 0, 0]
    assert float(got[1, 0]) == 0
    assert np.asarray(after.visits).tolist() == [0, 1]
    assert float(after.mean[1]) == pytest.approx(2 / 3)


def test_modes_differ_from_the_second_visit_on():
    out = {}
    for mode in ("variance", "linear_std", "released_head"):
        credit = ers(CreditConfig(alpha=0.5, stat_mode=mode))
        state = credit.init(1)
        _, state = credit.estimate(state, jnp.array([0]), jnp.array([[0.0, 0, 0, 1]]))
        _, state = credit.estimate(state, jnp.array([0]), jnp.array([[0.0, 1, 0, 1]]))
        out[mode] = float(state.spread[0])
    s1, s2 = 0.25, 1 / 3
    assert out["variance"] == pytest.approx(0.5 * s1 + 0.5 * s2 + 0.25 * 0.25**2, abs=1e-5)
    assert out["linear_std"] == pytest.approx(0.5 * s1**0.5 + 0.5 * s2**0.5, abs=1e-5)
    assert out["released_head"] == pytest.approx(0.5 * s1**2 + 0.5 * s2 + 0.25 * 0.25**2, abs=1e-5)


@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6))
def test_advantages_of_a_group_are_centred(rewards):
    got = group(CreditConfig(scale="group")).estimate((), jnp.array([0]), jnp.asarray([rewards], jnp.float32))[0]
    assert abs(float(got.sum())) < 1e-2


def test_statistics_of_an_empty_group_are_finite():
    stats = group_statistics(jnp.full((1, 4), jnp.nan), ddof=1)
    assert np.isfinite([float(x[0]) for x in stats]).all()
