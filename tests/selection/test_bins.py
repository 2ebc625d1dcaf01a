"""Beliefs shared within a bin: equal to plain floats, acting on draws, returning to bins that were given up."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.distributed.mesh import prompts_shardings
from pspo_jax.selection import PromptMetadata, SelectorContext, selector
from pspo_jax.selection.bins import MAX_BINS, STRONGEST, WEAKEST, BinCounts, bin_priors, number_bins
from tests.helpers import slow_except
from tests.selection import test_sharded
from tests.selection.helpers import GROUP, compiled_whole
from tests.selection.test_posterior import p_mixed

FIXED = ForgettingConfig(mode="fixed", discount=0.8)


def made(name="posterior_mixed", batch=4, forgetting=FIXED, **fields):
    config = SelectionConfig(name=name, **({"bins": "task", "max_unjudged": 0} | fields))
    return compiled_whole(selector(config, forgetting, SelectorContext(batch, GROUP, 100, 0)))


def metadata(bins):
    return PromptMetadata(np.zeros(len(bins), np.int16), None, np.asarray(bins, np.int8))


def outcome(rewards, policy_drift=0.0):
    rewards = jnp.asarray(rewards, jnp.float32)
    return RolloutOutcome(rewards, jnp.zeros_like(rewards), jnp.zeros_like(rewards), policy_drift)


class Plain:
    """The counts of prompts and bins in plain floats, all of which shrink at every step."""

    def __init__(self, bins, forgetting):
        self.bins, self.forgetting = bins, forgetting
        self.own = [(0.0, 0.0)] * len(bins)
        self.moved = [0.0] * len(bins)
        self.of_bin = {b: (0.0, 0.0) for b in bins}
        self.pairs = {b: (0.0, 0.0) for b in bins}
        """Pairs of right completions, and all pairs, of each bin's groups."""

    def step(self, ids, rewards, policy_drift):
        f = self.forgetting
        keep = 1 - f.shrinkage
        visited = set(ids)
        for row in visited:
            values = [min(x, 1.0) for i, group in zip(ids, rewards, strict=True) if i == row for x in group]
            values = [x for x in values if x == x]
            if not values:
                continue
            rho = f.discount
            if f.mode == "policy_drift":
                rho = min(max(2 ** (-(policy_drift - self.moved[row]) / f.half_life), f.low), f.high)
            right, wrong = sum(values), len(values) - sum(values)
            self.own[row] = rho * self.own[row][0] + right, rho * self.own[row][1] + wrong
            self.moved[row] = policy_drift
            of_bin = self.of_bin[self.bins[row]]
            self.of_bin[self.bins[row]] = of_bin[0] + right, of_bin[1] + wrong
            both, pairs = self.pairs[self.bins[row]]
            n = len(values)
            self.pairs[self.bins[row]] = both + max(right * (right - 1), 0), pairs + n * (n - 1)
        # Shrinking comes after the round, for the prompts that had no visit in it, and for all bins.
        self.own = [x if i in visited else (keep * x[0], keep * x[1]) for i, x in enumerate(self.own)]
        keep *= math.exp(-1 / f.shared_steps) if f.prior_strength == "estimated" else 1
        self.of_bin = {b: (keep * s, keep * f) for b, (s, f) in self.of_bin.items()}
        self.pairs = {b: (keep * s, keep * f) for b, (s, f) in self.pairs.items()}

    def strength(self, b, share):
        a0, b0 = self.forgetting.prior_successes, self.forgetting.prior_failures
        if self.forgetting.prior_strength != "estimated":
            return a0 + b0
        both, pairs = self.pairs[b]
        variance = (a0 * (a0 + 1) + both) / ((a0 + b0) * (a0 + b0 + 1) + pairs) - share**2
        return min(max(share * (1 - share) / max(variance, 1e-6) - 1, WEAKEST), STRONGEST)

    def beliefs(self):
        a0, b0 = self.forgetting.prior_successes, self.forgetting.prior_failures
        for own, b in zip(self.own, self.bins, strict=True):
            right, wrong = self.of_bin[b]
            share = (a0 + right) / (a0 + b0 + right + wrong)
            strength = self.strength(b, share)
            yield strength * share + own[0], strength * (1 - share) + own[1]


SCORES = {
    "posterior_mixed": lambda a, b: p_mixed(a, b, GROUP),
    "mopps": lambda a, b: 1 - 2 * abs(a / (a + b) - 0.5),
}
ESTIMATED = ForgettingConfig(mode="fixed", discount=0.8, prior_strength="estimated", shared_steps=7.0)
MOVING = ForgettingConfig(mode="policy_drift", shrinkage=0.05, prior_successes=2.0, prior_failures=3.0)


@pytest.mark.parametrize(
    ("name", "forgetting"),
    slow_except(
        [("posterior_mixed", MOVING), ("posterior_mixed", ESTIMATED)],
        [("posterior_mixed", MOVING), ("posterior_mixed", ESTIMATED), ("posterior_mixed", FIXED), ("mopps", MOVING)],
        several=True,
    ),
)
def test_beliefs_equal_plain_floats(name, forgetting):
    n, batch, steps = 30, 5, 25
    bins = (np.arange(n) * 7 % 3).tolist()
    tested = made(name, batch, forgetting)

    def one(state, x):
        step, ids, rewards, policy_drift = x
        state = tested.observe(state, ids, outcome(rewards, policy_drift), step)
        return state, (tested.to_table(state, step + 1)["priority"], state.score)

    run_steps = jax.jit(lambda xs: jax.lax.scan(one, tested.init(n, metadata(bins)), xs)[1])

    @given(seed=st.integers(0, 2**32), pace=st.sampled_from([0.0, 0.02]))
    @settings(max_examples=6)
    def check(seed, pace):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, n, (steps, batch))
        rewards = rng.choice([0, 1, 0.5, 2, np.nan], (steps, batch, GROUP), p=[0.4, 0.3, 0.1, 0.1, 0.1])
        rewards[rng.random((steps, batch)) < 0.1] = np.nan
        drift = np.cumsum(rng.random(steps) * pace)
        priority, score = run_steps((jnp.arange(steps), jnp.asarray(ids), jnp.asarray(rewards), jnp.asarray(drift)))
        plain = Plain(bins, forgetting)
        for t in range(steps):
            plain.step(ids[t].tolist(), rewards[t].tolist(), float(drift[t]))
            want = [SCORES[name](a, b) for a, b in plain.beliefs()]
            np.testing.assert_allclose(priority[t, :n], want, rtol=1e-4, atol=1e-5)
            if name == "posterior_mixed":  # Every score is that of the next step, though the round was of few prompts.
                np.testing.assert_allclose(score[t, :n], want, rtol=1e-4, atol=1e-5)

    check()


@pytest.mark.parametrize("name", slow_except(["posterior_mixed"], ["posterior_mixed", "mopps", "prioritized_replay"]))
def test_a_prompt_that_was_never_tried_is_ranked_by_its_bin(name):
    """Prompts 0 to 9 are of a bin that is always solved, 10 to 19 of one that is half solved; half of each is tried."""
    bins, tried = np.repeat([0, 1], 10), np.r_[0:5, 10:15]
    rewards = np.where(bins[tried][:, None] == 0, 1.0, np.tile([0.0, 1.0], GROUP // 2))
    priority = {}
    for choice in ("task", "none"):
        tested = made(name, 10, bins=choice)
        state = tested.init(20, metadata(bins) if choice == "task" else None)
        state = tested.observe(state, jnp.asarray(tried), outcome(rewards), 0)
        priority[choice] = np.asarray(tested.to_table(state, 1)["priority"])
    solved, mixed = np.r_[5:10], np.r_[15:20]
    assert priority["task"][solved].max() < 0.5 * priority["task"][mixed].min()
    assert np.ptp(priority["none"][np.r_[solved, mixed]]) == 0


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.0, 4.0), (6.0, 2.0), (0.4, 12.0)])
def test_the_strength_of_a_bin_is_that_of_the_beta_distribution_its_prompts_come_from(a, b):
    rng = np.random.default_rng(0)
    right = rng.binomial(GROUP, rng.beta(a, b, 40_000))
    total = right.size * GROUP
    sums = right.sum(), total - right.sum(), (right * (right - 1)).sum(), total * (GROUP - 1)
    counts = BinCounts(*(jnp.full(1, x, jnp.float32) for x in sums), jnp.int32(0))
    found = bin_priors(ESTIMATED, counts, 0)
    assert float(found.mean[0]) == pytest.approx(a / (a + b), abs=0.01)
    assert float(found.strength[0]) == pytest.approx(a + b, rel=0.1)


def test_wrong_labels_do_not_make_a_solved_bin_look_mixed():
    """Bin 0 is solved but for a quarter of wrong labels; in bin 1 each completion is right once in 16 times.

    A bin's mean with a fixed weight says that the next prompt of bin 0 is the better choice.
    """
    bins = np.repeat([0, 1], 24)
    tried = np.r_[0:16, 24:40]
    rewards = np.zeros((32, GROUP))
    rewards[:12] = 1
    rewards[16:, 0] = np.tile([1.0, 0.0], 8)
    ranked = {}
    for strength in ("fixed", "estimated"):
        tested = made(batch=32, forgetting=ForgettingConfig(mode="fixed", prior_strength=strength))
        state = tested.observe(tested.init(48, metadata(bins)), jnp.asarray(tried), outcome(rewards), 0)
        priority = np.asarray(tested.to_table(state, 1)["priority"])
        ranked[strength] = float(priority[20]), float(priority[44])
    assert ranked["fixed"][0] > ranked["fixed"][1]
    assert ranked["estimated"][1] > 1.5 * ranked["estimated"][0]


@pytest.mark.parametrize(
    ("shrinkage", "returns"), slow_except([(0.05, True)], [(0.05, True), (0.0, False)], several=True)
)
def test_a_bin_that_was_given_up_is_tried_again(shrinkage, returns):
    """Bin 0 is never solved for 20 steps, then half solved for ever; in bin 1, each third group has one mistake."""
    n, batch = 24, 4
    bins = np.repeat([0, 1], n // 2)
    tested = made(batch=batch, forgetting=ForgettingConfig(mode="fixed", shrinkage=shrinkage), cooldown=1)
    half, mistake = jnp.tile(jnp.array([0.0, 1.0]), GROUP // 2), 1 - jnp.eye(GROUP)[0]

    def one(state, step):
        ids, _, state = tested.select(state, jax.random.key(0), step, batch)
        hard = jnp.where(step < 20, 0.0, half)
        easy = jnp.where(((ids + step) % 3 == 0)[:, None], mistake, 1.0)
        rewards = jnp.where((ids < n // 2)[:, None], hard, easy)
        return tested.observe(state, ids, outcome(rewards), step), (ids < n // 2).sum()

    drawn = jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(100))[1])(tested.init(n, metadata(bins)))
    assert np.asarray(drawn[:4]).sum() > 0  # It was tried at first,
    assert np.asarray(drawn[12:20]).sum() == 0  # and given up.
    late = np.asarray(drawn[60:])
    assert late.mean() > 2 if returns else late.sum() == 0


def test_counts_follow_their_prompts_and_bins_are_numbered_anew():
    tested = made("prioritized_replay", 3)
    state = tested.init(6, metadata([0, 0, 0, 1, 1, 1]))
    rewards = np.eye(GROUP)[[0, 0, 0]]
    rewards[0] = 1
    state = tested.observe(state, jnp.array([0, 4, 5]), outcome(rewards), 0)
    fresh = tested.init(4, metadata([2, 0, 2, 1]))
    state = tested.follow(state, fresh, jnp.array([5, -1, 0, 3]))
    beliefs = state.per_prompt.beliefs
    np.testing.assert_allclose(beliefs.own.successes[:4], [1, 0, GROUP, 0])
    np.testing.assert_allclose(beliefs.own.failures[:4], [GROUP - 1, 0, 0, 0])
    assert beliefs.bin[:4].tolist() == [2, 0, 2, 1]
    np.testing.assert_allclose(state.shared.successes[:3], [0, 0, GROUP + 1])
    np.testing.assert_allclose(state.shared.failures[:3], [0, 0, GROUP - 1])


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(float("nan"))), min_size=1, max_size=300))
def test_bins_by_difficulty_keep_its_order(values):
    bins = number_bins(np.asarray(values, np.float32))
    known = np.where(np.isnan(values), np.inf, np.asarray(values, np.float32))
    assert bins.min() >= 0 and bins.max() < MAX_BINS
    order = np.argsort(known, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    same = known[order][1:] == known[order][:-1]
    assert (np.diff(bins[order])[same] == 0).all()
    if len(np.unique(known)) <= MAX_BINS:
        assert len(np.unique(bins)) == len(np.unique(known))


def test_many_difficulties_are_cut_into_even_bins():
    assert np.bincount(number_bins(np.random.default_rng(0).random(6400))).tolist() == [100] * MAX_BINS


@pytest.mark.parametrize("known", [None, PromptMetadata(np.zeros(8, np.int16))])
def test_bins_that_are_not_known_are_named(known):
    with pytest.raises(ConfigError, match=r"selection\.bins: the bin of each prompt is not known; pass"):
        made().init(8, known)


@pytest.mark.slow
def test_a_sharded_state_is_restored_on_one_device(tmp_path: Path, monkeypatch):
    """Eight devices draw and learn what one does, and what they saved goes on on one."""
    n = test_sharded.N
    monkeypatch.setattr(test_sharded, "metadata", lambda n=n: metadata(np.arange(n) % 5))
    config = resolve(replace(Config(), {"algorithm.name": "posterior_mixed", "selection.bins": "difficulty"}))
    chosen = selector(config.selection, config.forgetting, SelectorContext(test_sharded.B, test_sharded.G, 20, 0))
    one, eight = (test_sharded.Stepper(chosen, test_sharded.mesh_of(*mesh)) for mesh in ((1,), (4, 2)))
    for step in range(4):
        for x, y in zip(one.step(step), eight.step(step), strict=True):
            np.testing.assert_array_equal(x, y)
    test_sharded.assert_equal(one.state, eight.state)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(4, {"selector": eight.state}, {})
        checkpoints.wait()
        shardings = prompts_shardings(one.mesh, one.abstract, n)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), one.abstract, shardings)
        found = checkpoints.restore({"selector": wanted}, pytest.fail)
    assert found is not None
    test_sharded.assert_equal(found[0]["selector"], one.state)
