"""Selectors by belief: beliefs equal those in plain floats, rankings are exact, frequencies fit, rewards act."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection import SelectorContext, selector
from pspo_jax.selection.engine.stats import age_key
from tests.helpers import slow_except
from tests.selection.test_prioritized_replay import GROUP, SEED, STEPS, batches, random_rewards

FIXED = ForgettingConfig(mode="fixed", discount=1.0)


def made(name, batch, forgetting=FIXED, group=GROUP, seed=SEED, **fields):
    return selector(SelectionConfig(name=name, **fields), forgetting, SelectorContext(batch, group, STEPS, seed))


def outcome(rewards, policy_drift=0.0):
    zeros = np.zeros(rewards.shape, np.float32)
    return RolloutOutcome(rewards.astype(np.float32), zeros, zeros, policy_drift)


class Plain:
    """Beliefs in plain floats; at each step, beliefs that are not visited move toward the population."""

    def __init__(self, n, forgetting, toward_prior):
        f = self.forgetting = forgetting
        self.toward_prior = toward_prior
        self.stored = [(f.prior_successes, f.prior_failures)] * n
        self.moved, self.keep, self.seen = [0.0] * n, [1.0] * n, [False] * n

    def prior(self):
        f = self.forgetting
        a0, b0 = f.prior_successes, f.prior_failures
        if not f.shrinkage:
            return a0, b0
        means = [a / (a + b) for (a, b), seen in zip(self.stored, self.seen, strict=True) if seen]
        share = (sum(means) + a0) / (len(means) + a0 + b0)
        return (a0 + b0) * share, (a0 + b0) * (1 - share)

    def now(self):
        prior = self.prior()
        return [
            tuple(p + keep * (x - p) for p, x in zip(prior, stored, strict=True)) if seen else prior
            for stored, keep, seen in zip(self.stored, self.keep, self.seen, strict=True)
        ]

    def step(self, ids, rewards, policy_drift):
        f, prior, now = self.forgetting, self.prior() if self.toward_prior else (0.0, 0.0), self.now()
        self.keep = [keep * (1 - f.shrinkage) for keep in self.keep]
        for row in set(ids):
            values = [min(max(x, 0), 1) for i, group in zip(ids, rewards, strict=True) if i == row for x in group]
            values = [x for x in values if x == x]
            self.stored[row], self.keep[row], self.seen[row] = now[row], 1.0, True
            if values:
                rho = f.discount
                if f.mode == "policy_drift":
                    rho = min(max(2 ** (-(policy_drift - self.moved[row]) / f.half_life), f.low), f.high)
                counts = sum(values), len(values) - sum(values)
                self.stored[row] = tuple(p + rho * (x - p) + c for p, x, c in zip(prior, now[row], counts, strict=True))
                self.moved[row] = policy_drift


def p_mixed(a, b, group):
    right = all_wrong = 1.0
    for i in range(group):
        right *= (a + i) / (a + b + i)
        all_wrong *= (b + i) / (a + b + i)
    return 1 - right - all_wrong


SCORES = {
    "mopps": lambda a, b: 1 - 2 * abs(a / (a + b) - 0.5),
    "posterior_mixed": lambda a, b: p_mixed(a, b, GROUP),
    "spo": lambda a, b: (a * b) ** 0.5 / (a + b) + 0.05,
}


@pytest.mark.parametrize(
    ("name", "forgetting"),
    [
        ("mopps", ForgettingConfig(mode="fixed", discount=0.9)),
        ("mopps", ForgettingConfig(mode="policy_drift", shrinkage=0.03, prior_failures=3.0)),
        ("posterior_mixed", ForgettingConfig(mode="fixed", discount=0.7, shrinkage=0.1)),
        ("spo", ForgettingConfig(mode="policy_drift")),
        ("spo", ForgettingConfig(mode="fixed", discount=0.8, shrinkage=0.05)),
    ],
)
def test_beliefs_and_scores_equal_plain_floats(name, forgetting):
    n, batch, steps = 200, 16, 40
    tested = made(name, batch, forgetting)

    def one(state, x):
        step, ids, rewards, policy_drift = x
        state = tested.observe(state, ids, outcome(rewards, policy_drift), step)
        return state, (state.per_prompt, tested.to_table(state, step + 1)["priority"], state.score)

    run_steps = jax.jit(lambda xs: jax.lax.scan(one, tested.init(n), xs)[1])

    @given(seed=st.integers(0, 2**32), pace=st.sampled_from([0.0, 0.002, 0.02]))
    @settings(max_examples=6)
    def check(seed, pace):
        rng = np.random.default_rng(seed)
        # Among few prompts, some are twice in a batch.
        ids = rng.integers(0, rng.choice([30, n]), (steps, batch))
        rewards = rng.choice([0, 1, 0.5, 2, np.nan], (steps, batch, GROUP), p=[0.4, 0.3, 0.1, 0.1, 0.1])
        rewards[rng.random((steps, batch)) < 0.1] = np.nan
        policy_drift = np.cumsum(rng.random(steps) * pace)
        per_prompt, priority, score = run_steps(
            (jnp.arange(steps), jnp.asarray(ids), jnp.asarray(rewards), jnp.asarray(policy_drift))
        )
        plain = Plain(n, forgetting, toward_prior=name != "spo")
        for t in range(steps):
            plain.step(ids[t].tolist(), rewards[t].tolist(), float(policy_drift[t]))
            for found, want in zip((per_prompt.a, per_prompt.b), zip(*plain.stored, strict=True), strict=True):
                np.testing.assert_allclose(found[t, :n], want, rtol=1e-4)
            np.testing.assert_allclose(per_prompt.policy_drift[t, :n], plain.moved, rtol=1e-5)
            want = [SCORES[name](a, b) for a, b in plain.now()]
            np.testing.assert_allclose(priority[t, :n], want, rtol=1e-4, atol=1e-5)
            if name != "mopps":
                able = np.asarray(score[t, :n]) > 0  # Excluded: without a verdict three times.
                np.testing.assert_allclose(score[t, :n][able], np.array(want)[able], rtol=1e-4, atol=1e-5)

    check()


# Discounts by which products are exact, so that equal beliefs are equal to the last bit.
@pytest.mark.parametrize(("discount", "cooldown"), slow_except([(0.5, 0)], [(0.5, 0), (1.0, 2)], several=True))
@given(seed=st.integers(0, 2**32), n=st.sampled_from([5, 40]), constancy=st.sampled_from([0.0, 0.7]))
@settings(max_examples=10)
def test_posterior_mixed_takes_those_most_likely_mixed(discount, cooldown, seed, n, constancy):
    config = SelectionConfig(name="posterior_mixed", cooldown=cooldown, max_unjudged=0)
    forgetting = ForgettingConfig(mode="fixed", discount=discount)
    rewards = random_rewards(np.random.default_rng(seed), n, [0.25, 0.25, 0.4, 0.1], constancy)
    got, _ = batches(config, forgetting, 4, rewards)
    a, b, last = np.ones(n, np.float32), np.ones(n, np.float32), np.full(n, -1)
    rho, one = np.float32(discount), np.float32(1)
    tie_new, tie_seen = (np.asarray(age_key(jnp.arange(n), jnp.full(n, x), SEED)) for x in (-1, 0))
    for step in range(STEPS):
        right, all_wrong = np.ones_like(a), np.ones_like(a)
        for i in range(GROUP):
            right, all_wrong = right * (a + i) / (a + b + i), all_wrong * (b + i) / (a + b + i)
        resting = (last >= 0) & (last + cooldown >= step)
        score = np.where(resting, 0, one - right - all_wrong)
        tie = np.where(last < 0, tie_new, tie_seen)
        want = np.lexsort((np.arange(n), -tie, last, -score, resting))[:4]
        assert sorted(got[step].tolist()) == sorted(want.tolist()), f"step {step}"
        for row in want:
            verdicts = rewards[step, row][~np.isnan(rewards[step, row])]
            s = np.clip(verdicts, 0, 1).sum(dtype=np.float32)
            if len(verdicts):
                a[row] = one + rho * (a[row] - one) + s
                b[row] = one + rho * (b[row] - one) + (len(verdicts) - s)
            last[row] = step


KINDS = [("mopps", "expected"), ("posterior_mixed", "thompson"), ("spo", "expected")]
DRAWS = 500


@lru_cache
def programs(name, draw, candidates=4):
    """(init, observe, function of a state, DRAWS keys and a step: as many batches of two)."""
    tested = made(name, 4, draw=draw, candidates=candidates)

    def draws(state, keys, step):
        return jax.lax.map(lambda key: tested.select(state, key, step, 2)[0], keys)

    return jax.jit(tested.init, static_argnums=0), jax.jit(tested.observe), jax.jit(draws)


def many(draws, state, count, step):
    """Batches [count, 2], each drawn with a key of its own."""
    keys = jax.random.split(jax.random.key(5), (count // DRAWS, DRAWS))
    return np.concatenate([draws(state, k, step) for k in keys])


def with_beliefs(state, a, b):
    def begin_with(stored, values):
        return np.concatenate([values, stored[len(values) :]], dtype=np.float32)

    beliefs = jax.device_get(state.per_prompt)
    return state._replace(per_prompt=beliefs._replace(a=begin_with(beliefs.a, a), b=begin_with(beliefs.b, b)))


def test_mopps_with_certain_beliefs_takes_those_nearest_to_one_half():
    init, _, draws = programs("mopps", "expected")
    p = np.array([0.1, 0.47, 0.95, 0.4, 0.54, 0.02, 0.7, 0.44])
    got = many(draws, with_beliefs(init(8), 1e6 * p, 1e6 * (1 - p)), DRAWS, 0)
    assert np.unique(np.sort(got), axis=0).tolist() == [[1, 4]]


@pytest.mark.parametrize("candidates", slow_except([2], [4, 2]))
@pytest.mark.parametrize(("name", "draw"), KINDS[:2])
def test_thompson_draws_as_a_plain_simulation(name, draw, candidates):
    init, _, draws = programs(name, draw, candidates)
    a = np.array([1, 9, 1, 3, 0.5, 20, 2, 0.3], np.float32)
    b = np.array([1, 1, 5, 3, 0.5, 18, 2, 4], np.float32)
    n, count, plain_count = len(a), 4000, 200_000
    chosen = many(draws, with_beliefs(init(n), a, b), count, 0)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    rng = np.random.default_rng(3)
    p = rng.beta(a, b, (plain_count, n))
    value = -abs(p - 0.5) if name == "mopps" else 1 - p**GROUP - (1 - p) ** GROUP
    pool = np.argsort(rng.random((plain_count, n)))[:, : 2 * candidates]
    best = np.argsort(-np.take_along_axis(value, pool, 1))[:, :2]
    want = np.bincount(np.take_along_axis(pool, best, 1).ravel(), minlength=n) / plain_count
    got = np.bincount(chosen.ravel(), minlength=n) / count
    error = np.sqrt(want * (1 - want) * (1 / count + 1 / plain_count))
    assert (abs(got - want) < 4 * error).all()


def test_spo_draws_in_proportion_to_its_weights():
    n = 8
    init, observe, draws = programs("spo", "expected")
    right, state = np.tri(n, n, -1), init(n)  # Prompt i is right i times of 8.
    for step, (low, half) in enumerate([(0, 0), (4, 0), (0, 4), (4, 4)]):
        state = observe(state, jnp.arange(low, low + 4), outcome(right[low : low + 4, half : half + 4]), step)
    v = (1 + np.arange(n)) / (n + 2)
    weight = np.sqrt(v * (1 - v)) + 0.05
    p = weight / weight.sum()
    repeated = made("spo", 4, replacement=True)
    ids = np.asarray(jax.jit(repeated.select, static_argnums=3)(state, jax.random.key(1), 4, 100_000)[0])
    assert stats.chisquare(np.bincount(ids, minlength=n), p * len(ids)).pvalue > 1e-3
    ids = many(draws, state, 15_000, 4)
    assert stats.chisquare(np.bincount(ids[:, 0], minlength=n), p * len(ids)).pvalue > 1e-3
    pairs = np.zeros((n, n))
    np.add.at(pairs, (ids[:, 0], ids[:, 1]), 1)
    want = p[:, None] * p / (1 - p[:, None]) * len(ids)
    off = ~np.eye(n, dtype=bool)
    assert stats.chisquare(pairs[off], want[off]).pvalue > 1e-3
    assert pairs.trace() == 0


def test_spo_floor_is_added_to_the_deviation():
    init = jax.jit(made("spo", 4, floor=0.4).init, static_argnums=0)
    np.testing.assert_allclose(init(4).score[:4], 0.9)


@pytest.mark.parametrize(("name", "draw"), KINDS)
def test_an_outcome_changes_the_next_draw(name, draw):
    init, observe, draws = programs(name, draw)
    state = init(8)
    for step in range(20):
        state = observe(state, jnp.arange(4), outcome(np.ones((4, GROUP))), step)
    before, after = (many(draws, s, DRAWS, 20) for s in (init(8), state))
    assert abs((before < 4).mean() - 0.5) < 0.06
    assert (after < 4).mean() < (0.35 if name == "spo" else 0.05)


def test_an_outcome_changes_the_next_batch_of_posterior_mixed():
    config = SelectionConfig(name="posterior_mixed", cooldown=0, max_unjudged=0)
    for better in ([0, 2, 4, 6], [1, 3, 5, 7]):
        rewards = np.tile([1.0, 1, 1, 1], (STEPS, 8, 1))
        rewards[:, better] = [1, 1, 0, 0]
        ids, _ = batches(config, ForgettingConfig(mode="fixed", discount=0.5), 4, rewards)
        assert all(sorted(batch.tolist()) == better for batch in ids[-5:])


@pytest.mark.parametrize("visited", slow_except([True], [False, True]))
@pytest.mark.parametrize(("name", "draw"), KINDS)
def test_draws_by_equal_beliefs_are_uniform(name, draw, visited):
    n = 20
    init, observe, draws = programs(name, draw)
    state = init(n)
    if visited:
        for step in range(5):
            ids = jnp.arange(4 * step, 4 * step + 4)
            state = observe(state, ids, outcome(np.full((4, GROUP), np.nan)), step)
    picks = many(draws, state, 5000, 5)[:, 0]
    assert stats.chisquare(np.bincount(picks, minlength=n)).pvalue > 1e-3


def test_first_picks_of_posterior_mixed_are_uniform_over_seeds():
    n, draws = 20, 20_000

    def first(seed):
        tested = made("posterior_mixed", 1, seed=seed)
        return tested.select(tested.init(n), jax.random.key(0), 0, 1)[0][0]

    picks = np.asarray(jax.jit(jax.vmap(first))(jnp.arange(draws)))
    assert stats.chisquare(np.bincount(picks, minlength=n)).pvalue > 1e-3


def test_posterior_mixed_without_verdicts_draws_in_epochs():
    config = SelectionConfig(name="posterior_mixed", cooldown=0, max_unjudged=0)
    ids, _ = batches(config, ForgettingConfig(mode="fixed", discount=0.5), 4, np.full((STEPS, 12, GROUP), np.nan))
    assert (np.sort(ids.reshape(-1, 12)) == np.arange(12)).all()
