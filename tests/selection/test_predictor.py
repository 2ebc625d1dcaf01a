"""Beliefs with predicted priors: equal to float64 over the whole history, acting on draws, sound for any features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.config.validation import validate
from pspo_jax.selection import PromptMetadata, SelectorContext, selector
from pspo_jax.selection.predictor import HIGHEST, LOWEST, init_predictor, predicted
from tests.helpers import slow_except
from tests.selection import test_sharded
from tests.selection.helpers import GROUP
from tests.selection.test_bins import outcome
from tests.selection.test_posterior import p_mixed

PRIOR = {"prior_successes": 2.0, "prior_failures": 3.0}
MOVING = ForgettingConfig(mode="policy_drift", shrinkage=0.05, shared_steps=4.0, **PRIOR)
FIXED = ForgettingConfig(mode="fixed", discount=0.8)


def made(name="posterior_mixed", batch=4, forgetting=FIXED, **fields):
    config = SelectionConfig(name=name, **({"predictor": "hidden_states", "max_unjudged": 0} | fields))
    return selector(config, forgetting, SelectorContext(batch, GROUP, 100, 0))


def metadata(features):
    features = np.asarray(features, np.float32)
    return PromptMetadata(np.zeros(len(features), np.int16), features=features)


class Plain:
    """Every group that was seen, in float64; predictions solve the whole weighted history anew."""

    def __init__(self, features, forgetting):
        clipped = np.clip(np.asarray(features, np.float64), -5, 5)
        n, count = clipped.shape
        self.phi = np.concatenate([np.ones((n, 1)), clipped / count**0.5], axis=1)
        self.forgetting = forgetting
        self.groups = []
        self.own = np.zeros((n, 2))
        self.moved = np.zeros(n)

    def predicted(self, now):
        f = self.forgetting
        strength = f.prior_successes + f.prior_failures
        precision = strength * np.eye(self.phi.shape[1])
        moment = np.zeros(self.phi.shape[1])
        moment[0] = f.prior_successes
        for step, row, right, count in self.groups:
            weight = np.exp(-(now - step) / f.shared_steps)
            precision += weight * count * np.outer(self.phi[row], self.phi[row])
            moment += weight * right * self.phi[row]
        return np.clip(self.phi @ np.linalg.solve(precision, moment), LOWEST, HIGHEST)

    def step(self, now, ids, rewards, policy_drift):
        f = self.forgetting
        error = []
        before = self.predicted(now)
        for row in set(ids):
            values = [min(x, 1.0) for i, group in zip(ids, rewards, strict=True) if i == row for x in group]
            values = [x for x in values if x == x]
            if not values:
                continue
            rho = f.discount
            if f.mode == "policy_drift":
                rho = min(max(2 ** (-(policy_drift - self.moved[row]) / f.half_life), f.low), f.high)
            right = sum(values)
            self.own[row] = rho * self.own[row] + (right, len(values) - right)
            self.moved[row] = policy_drift
            self.groups.append((now, row, right, len(values)))
            error.append(abs(before[row] - right / len(values)))
        others = np.setdiff1d(np.arange(len(self.own)), ids)
        self.own[others] *= 1 - f.shrinkage
        return np.mean(error)

    def beliefs(self, now):
        f = self.forgetting
        share, strength = self.predicted(now), f.prior_successes + f.prior_failures
        return zip(strength * share + self.own[:, 0], strength * (1 - share) + self.own[:, 1], strict=True)


SCORES = {
    "posterior_mixed": lambda a, b: p_mixed(a, b, GROUP),
    "mopps": lambda a, b: 1 - 2 * abs(a / (a + b) - 0.5),
}


@pytest.mark.parametrize(
    ("name", "forgetting"),
    slow_except(
        [("posterior_mixed", MOVING)],
        [("posterior_mixed", MOVING), ("posterior_mixed", FIXED), ("mopps", MOVING)],
        several=True,
    ),
)
def test_beliefs_equal_a_regression_over_the_whole_history(name, forgetting):
    n, batch, rounds, count = 30, 6, 20, 7
    tested = made(name, batch, forgetting)
    steps = np.arange(rounds) + (np.arange(rounds) > 12) * 3  # Steps 13 to 15 have no round.

    def one(state, x):
        step, ids, rewards, policy_drift = x
        seen = outcome(rewards, policy_drift)
        error = tested.outcome_metrics(state, ids, seen, step)["selection/predictor_error"]
        state = tested.observe(state, ids, seen, step)
        return state, (tested.to_table(state, step + 1)["priority"], state.score, error)

    run_steps = jax.jit(lambda features, xs: jax.lax.scan(one, tested.init(n, metadata_of(features)), xs)[1])

    def metadata_of(features):
        return PromptMetadata(jnp.zeros(n, jnp.int16), features=features)

    @given(seed=st.integers(0, 2**32))
    @settings(max_examples=5)
    def check(seed):
        rng = np.random.default_rng(seed)
        features = rng.standard_normal((n, count)) * rng.choice([1, 4], count)
        ids = rng.integers(0, n, (rounds, batch))
        rewards = rng.choice([0, 1, 0.5, 2, np.nan], (rounds, batch, GROUP), p=[0.4, 0.3, 0.1, 0.1, 0.1])
        rewards[rng.random((rounds, batch)) < 0.1] = np.nan
        ids[5, 3], rewards[5, 3] = ids[5, 0], rewards[5, 0]  # A prompt is twice in one batch at least.
        drift = np.cumsum(rng.random(rounds) * 0.02)
        xs = (jnp.asarray(steps), jnp.asarray(ids), jnp.asarray(rewards), jnp.asarray(drift))
        priority, score, error = run_steps(jnp.asarray(features, jnp.float32), xs)
        plain = Plain(np.float32(features), forgetting)
        for t, step in enumerate(steps.tolist()):
            if step == 16:
                plain.own *= (1 - forgetting.shrinkage) ** 3  # No prompt is visited in the steps without a round.
            wanted = plain.step(step, ids[t].tolist(), rewards[t].tolist(), float(drift[t]))
            np.testing.assert_allclose(error[t], wanted, rtol=1e-4)
            want = [SCORES[name](a, b) for a, b in plain.beliefs(step + 1)]
            np.testing.assert_allclose(priority[t, :n], want, rtol=1e-3, atol=1e-4)
            if name == "posterior_mixed":
                np.testing.assert_allclose(score[t, :n], want, rtol=1e-3, atol=1e-4)

    check()


@functools.cache
def three_rounds(shared_steps, strength):
    """A compiled function of features and three rounds to predictions before and after, regression and priorities."""
    forgetting = ForgettingConfig("fixed", shared_steps=shared_steps, prior_successes=strength)
    tested = made(batch=12, forgetting=forgetting)

    def run(features, ids, rewards):
        state = tested.init(24, PromptMetadata(jnp.zeros(24, jnp.int16), features=features))
        first = predicted(forgetting, state.per_prompt.features, state.shared, 0)
        state = jax.lax.fori_loop(
            0, 3, lambda step, state: tested.observe(state, ids[step], outcome(rewards[step]), step), state
        )
        last = predicted(forgetting, state.per_prompt.features, state.shared, 3)
        return first, last, state.shared, tested.to_table(state, 3)["priority"][:24]

    return jax.jit(run)


@given(
    features=hnp.arrays(np.float32, (24, 5), elements=st.floats(width=32)),
    seed=st.integers(0, 2**32),
    fields=st.sampled_from([(1e-3, 1.0), (1e6, 1e-3)]),
)
@settings(max_examples=60)
def test_beliefs_are_sound_for_any_features(features, seed, fields):
    rng = np.random.default_rng(seed)
    ids, rewards = (
        rng.permuted(np.tile(np.arange(24), (3, 1)), axis=1)[:, :12],
        rng.choice([0, 1, np.nan], (3, 12, GROUP)),
    )
    first, last, regression, priority = three_rounds(*fields)(features, ids, rewards)
    np.testing.assert_allclose(first, max(fields[1] / (1 + fields[1]), LOWEST), rtol=1e-5)
    assert (last >= LOWEST).all() and (last <= HIGHEST).all()
    assert np.isfinite(regression.precision).all() and np.isfinite(regression.moment).all()
    assert np.isfinite(priority).all() and (priority > 0).all()


def test_much_data_does_not_break_the_equations():
    """A thousand steps of 256 equal prompts whose weights never fall: the regression is that of their mean."""
    forgetting = ForgettingConfig(mode="fixed", shared_steps=1e9)
    beliefs, regression = init_predictor(128, 128, metadata(np.full((128, 64), 5.0)))
    phi = jnp.concatenate([jnp.ones(1), beliefs.features[0]])
    count = 1000 * 256 * 16
    regression = regression._replace(precision=count * jnp.outer(phi, phi), moment=0.75 * count * phi)
    np.testing.assert_allclose(predicted(forgetting, beliefs.features, regression, 1000), 0.75, atol=0.01)


@pytest.mark.parametrize("name", slow_except(["posterior_mixed"], ["posterior_mixed", "mopps", "prioritized_replay"]))
def test_a_prompt_that_was_never_tried_is_ranked_by_its_features(name):
    """Prompts 0 to 9 resemble each other and are always solved, 10 to 19 are half solved; half of each is tried."""
    rng = np.random.default_rng(0)
    kind, tried = np.repeat([-1.0, 1.0], 10), np.r_[0:5, 10:15]
    features = np.stack([kind + 0.2 * rng.standard_normal(20), *rng.standard_normal((3, 20))], axis=1)
    seen = outcome(np.where(kind[tried][:, None] < 0, 1.0, np.tile([0.0, 1.0], GROUP // 2)))
    tested = made(name, 10)

    @jax.jit
    def after_three_rounds():
        state = tested.init(20, metadata(features))
        state = jax.lax.fori_loop(0, 3, lambda t, state: tested.observe(state, jnp.asarray(tried), seen, t), state)
        return tested.to_table(state, 3)["priority"], tested.select(state, jax.random.key(0), 3, 10)[0]

    priority, ids = map(np.asarray, after_three_rounds())
    solved, mixed = np.r_[5:10], np.r_[15:20]
    assert priority[solved].max() < 0.8 * priority[mixed].min()
    if name == "posterior_mixed":
        assert set(mixed) <= set(ids.tolist())


def test_counts_follow_their_prompts_and_the_regression_starts_over():
    tested = made("prioritized_replay", 3)
    rewards = np.eye(GROUP)[[0, 0, 0]]
    rewards[0] = 1

    @jax.jit
    def before_and_after():
        state = tested.init(6, metadata(np.arange(12).reshape(6, 2) / 6 - 1))
        state = tested.observe(state, jnp.array([0, 4, 5]), outcome(rewards), 0)
        return state, tested.follow(state, tested.init(4, metadata(np.ones((4, 2)))), jnp.array([5, -1, 0, 3]))

    before, state = before_and_after()
    assert np.abs(before.shared.precision).max() > 0
    beliefs = state.per_prompt.beliefs
    np.testing.assert_allclose(beliefs.own.successes[:4], [1, 0, GROUP, 0])
    np.testing.assert_allclose(beliefs.own.failures[:4], [GROUP - 1, 0, 0, 0])
    np.testing.assert_allclose(beliefs.features[:4], 2**-0.5)
    assert not np.asarray(state.shared.precision).any() and not np.asarray(state.shared.moment).any()


@pytest.mark.parametrize("known", [None, PromptMetadata(np.zeros(8, np.int16))])
def test_features_that_are_not_known_are_named(known):
    with pytest.raises(ConfigError, match=r"selection\.predictor: the features of each prompt are not known; pass"):
        made().init(8, known)


def test_bins_and_predictor_are_refused_together():
    fields = {"algorithm.name": "mopps", "selection.bins": "difficulty", "selection.predictor": "hidden_states"}
    with pytest.raises(ConfigError, match=r"^selection\.predictor=hidden_states: .*bins=difficulty.*; set one of them"):
        validate(replace(Config(), fields))


@pytest.mark.slow
def test_eight_devices_draw_and_learn_what_one_does(monkeypatch):
    features = np.random.default_rng(0).standard_normal((test_sharded.N, 16)).astype(np.float32)
    monkeypatch.setattr(test_sharded, "metadata", lambda n: metadata(features))
    fields = {"algorithm.name": "posterior_mixed", "selection.predictor": "hidden_states"}
    config = resolve(replace(Config(), fields))
    chosen = selector(config.selection, config.forgetting, SelectorContext(test_sharded.B, test_sharded.G, 20, 0))
    one, eight = (test_sharded.Stepper(chosen, test_sharded.mesh_of(*mesh)) for mesh in ((1,), (4, 2)))
    for step in range(4):
        for x, y in zip(one.step(step), eight.step(step), strict=True):
            np.testing.assert_array_equal(x, y)
    test_sharded.assert_equal(one.state, eight.state)
