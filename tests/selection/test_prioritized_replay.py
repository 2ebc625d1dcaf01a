"""Prioritized replay equals plain Python heaps in every batch of a history; retests, returns, effect of rewards."""

import dataclasses
import heapq
import math
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
from pspo_jax.selection.prioritized_replay import MAX_WAIT
from tests.helpers import slow_except
from tests.selection.helpers import compiled_whole

STEPS, GROUP, SEED = 60, 4, 17
RANKED, SOLVED, UNSOLVED = 0, 1, 2
ONE = np.float32(1)
RIGHT, WRONG, HALF, NONE = [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [math.nan] * 4


class Heap:
    """A heap of (key, version), where the key ends with the row; entries of an older version are dropped."""

    def __init__(self, versions):
        self.entries, self.versions = [], versions

    def push(self, key):
        heapq.heappush(self.entries, (key, self.versions[key[-1]]))

    def head(self):
        while self.entries and self.entries[0][1] != self.versions[self.entries[0][0][-1]]:
            heapq.heappop(self.entries)
        return self.entries[0] if self.entries else None


class Oracle:
    """The rules of prioritized replay, one prompt at a time."""

    def __init__(self, n, config, forgetting):
        self.config, self.discount = config, np.float32(forgetting.discount)
        rows = jnp.arange(n)
        self.tie_new, self.tie_seen = (np.asarray(age_key(rows, jnp.full(n, x), SEED)).tolist() for x in (-1, 0))
        self.a, self.b, self.p = [ONE] * n, [ONE] * n, [np.float32(0.5)] * n
        self.last, self.visits, self.judged = [-1] * n, [0] * n, [False] * n
        self.pool, self.wait, self.versions = [RANKED] * n, [0] * n, [0] * n
        self.pools = [Heap(self.versions) for _ in range(3)]
        self.resting, self.excluded = Heap(self.versions), Heap(self.versions)
        for row in range(n):
            self.place(row)

    def order(self, row):
        tie = self.tie_new[row] if self.last[row] < 0 else self.tie_seen[row]
        return self.last[row], -tie, row

    def enter_pool(self, row):
        p = self.p[row]
        first = -p * (ONE - p) if self.pool[row] == RANKED else self.last[row] + self.wait[row]
        self.pools[self.pool[row]].push((first, *self.order(row)))

    def place(self, row):
        c, visits = self.config, self.visits[row]
        if (c.max_visits and visits >= c.max_visits) or (visits >= c.max_unjudged > 0 and not self.judged[row]):
            self.excluded.push(self.order(row))
        elif visits and c.cooldown:
            self.resting.push(self.order(row))
        else:
            self.enter_pool(row)

    def choose(self, step, batch):
        c, taken = self.config, []
        while (head := self.resting.head()) and head[0][0] + c.cooldown < step:
            heapq.heappop(self.resting.entries)
            self.enter_pool(head[0][-1])

        def take(heaps, most=batch, until=math.inf):
            for _ in range(min(most, batch - len(taken))):
                heads = [(head, i) for i, heap in enumerate(heaps) if (head := heap.head())]
                if not heads or min(heads)[0][0][0] > until:
                    return
                heap = heaps[min(heads)[1]]
                taken.append((heap, heapq.heappop(heap.entries)))

        if c.retest_share and step % c.retest_every == 0:
            for pool in (SOLVED, UNSOLVED):
                take([self.pools[pool]], max(1, round(c.retest_share * batch)), until=step)
        take([self.pools[RANKED]])
        take([self.pools[SOLVED], self.pools[UNSOLVED]])
        take([self.resting])
        take([self.excluded])
        for heap, entry in taken:
            heapq.heappush(heap.entries, entry)
        return sorted(entry[0][-1] for _, entry in taken)

    def observe(self, step, row, rewards):
        self.versions[row] += 1
        self.last[row] = step
        self.visits[row] += 1
        verdicts = np.clip(rewards[~np.isnan(rewards)], 0, 1)
        if len(verdicts):
            self.judged[row] = True
            right, count = np.float32(verdicts.sum()), np.float32(len(verdicts))
            self.a[row] = ONE + self.discount * (self.a[row] - ONE) + right
            self.b[row] = ONE + self.discount * (self.b[row] - ONE) + (count - right)
            by_last = self.config.estimate == "last"
            self.p[row] = right / count if by_last else self.a[row] / (self.a[row] + self.b[row])
            pool = SOLVED if right == count else UNSOLVED if right == 0 else RANKED
            unchanged = pool == self.pool[row]
            self.wait[row] = min(2 * self.wait[row], MAX_WAIT) if unchanged else self.config.retest_every
            self.pool[row] = pool
        self.place(row)


@lru_cache
def player(config, forgetting, batch):
    """(selector, function of a state and rewards [T, N, G]: the last state and the batches [T, B])."""
    made = selector(config, forgetting, SelectorContext(batch, GROUP, STEPS, SEED))

    def one(state, x):
        step, rewards = x
        ids, _, state = made.select(state, jax.random.key(0), step, batch)
        zeros = jnp.zeros((batch, GROUP))
        return made.observe(state, ids, RolloutOutcome(rewards[ids], zeros, zeros), step), ids

    def run_steps(state, rewards):
        return jax.lax.scan(one, state, (jnp.arange(len(rewards)), rewards))

    return compiled_whole(made), jax.jit(run_steps)


def batches(config, forgetting, batch, rewards):
    """The batches that the selector draws with rewards [T, N, G], and its last state."""
    made, run_steps = player(config, forgetting, batch)
    n = rewards.shape[1]
    rows = -(-n // 128) * 128
    padded = np.full((len(rewards), rows, GROUP), np.nan, np.float32)
    padded[:, :n] = rewards
    state, ids = run_steps(made.init(n), jnp.asarray(padded))
    return np.asarray(ids), state


def random_rewards(rng, n, weights, constancy):
    """Groups all right, all wrong, mixed or without a verdict; a prompt keeps its kind of group for a while."""
    kind = rng.choice(4, (STEPS, n), p=weights)
    for t in range(1, STEPS):
        kind[t] = np.where(rng.random(n) < constancy, kind[t - 1], kind[t])
    shape = (STEPS, n, GROUP)
    mixed = rng.choice([0, 0.25, 1], shape)
    mixed[..., 0], mixed[..., 1] = 1, 0
    task_names = [rng.choice([1, 1.5], shape), rng.choice([0, -0.5], shape), mixed]
    rewards = np.select([kind[..., None] == i for i in range(3)], task_names, np.nan)
    rewards[..., 2:][rng.random((STEPS, n, GROUP - 2)) < 0.2] = np.nan
    return rewards.astype(np.float32)


# Discounts by which products are exact, so that no fused multiply-add can tell two equal problems apart.
LAST, HALVED, KEPT = ("last", 1.0), ("beta", 0.5), ("beta", 1.0)
SMALL, MEDIUM, LARGE = (4, [5, 40]), (8, [12, 100]), (8, [129, 200])
CASES = [  # Sizes, estimate, cooldown, share, every, most visits: all pairs of the first four.
    (SMALL, LAST, 0, 0.0, 3, 0),
    (SMALL, HALVED, 2, 0.05, 2, 0),
    (SMALL, KEPT, 5, 0.25, 3, 0),
    (MEDIUM, LAST, 2, 0.25, 2, 0),
    (MEDIUM, HALVED, 5, 0.0, 5, 9),
    (MEDIUM, KEPT, 0, 0.05, 4, 0),
    (LARGE, LAST, 5, 0.05, 2, 0),
    (LARGE, HALVED, 0, 0.25, 3, 0),
    (LARGE, KEPT, 1, 0.0, 5, 2),
]


@pytest.mark.parametrize(
    ("sizes", "estimate", "cooldown", "share", "every", "most"), slow_except([CASES[1], CASES[8]], CASES, several=True)
)
@given(data=st.data())
@settings(max_examples=8)
def test_every_batch_is_the_heaps(sizes, estimate, cooldown, share, every, most, data):
    batch, ns = sizes
    n = data.draw(st.sampled_from(ns))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = np.array(data.draw(st.lists(st.sampled_from([0, 1, 4]), min_size=4, max_size=4).filter(any)))
    constancy = data.draw(st.sampled_from([0.0, 0.5, 0.95]))
    config = SelectionConfig(
        name="prioritized_replay",
        estimate=estimate[0],
        cooldown=cooldown,
        retest_share=share,
        retest_every=every,
        max_visits=most,
    )
    forgetting = ForgettingConfig(mode="fixed", discount=estimate[1])
    rewards = random_rewards(rng, n, weights / weights.sum(), constancy)
    got, _ = batches(config, forgetting, batch, rewards)
    oracle = Oracle(n, config, forgetting)
    for step in range(STEPS):
        want = oracle.choose(step, batch)
        assert sorted(got[step].tolist()) == want, f"step {step}"
        for row in want:
            oracle.observe(step, row, rewards[step, row])


PLAIN = SelectionConfig(name="prioritized_replay", estimate="last", cooldown=0, retest_every=2, retest_share=0.25)
FIXED = ForgettingConfig(mode="fixed")


def table_of(n, group, steps=STEPS):
    return np.tile(np.array(group, np.float32), (steps, n, 1))


def visits_of(ids, row):
    return [step for step in range(len(ids)) if row in ids[step]]


@pytest.mark.parametrize("group", [RIGHT, WRONG])
def test_waits_double_at_retests_that_change_nothing(group):
    rewards = table_of(40, HALF)
    rewards[:, 7] = group
    steps = visits_of(batches(PLAIN, FIXED, 4, rewards)[0], 7)
    assert steps[1] == steps[0] + 2 + steps[0] % 2
    assert np.diff(steps[1:]).tolist() == [4, 8, 16]


def test_a_group_of_the_other_pool_starts_the_wait_anew():
    rewards = table_of(40, HALF)
    rewards[:, 7] = RIGHT
    steps = visits_of(batches(PLAIN, FIXED, 4, rewards)[0], 7)
    rewards[steps[2] :, 7] = WRONG
    steps = visits_of(batches(PLAIN, FIXED, 4, rewards)[0], 7)
    assert np.diff(steps[1:]).tolist() == [4, 2, 4, 8, 16]


@pytest.mark.parametrize("group", [RIGHT, WRONG])
def test_a_mixed_group_brings_a_problem_back(group):
    made = player(PLAIN, FIXED, 4)[0]
    rewards = table_of(40, HALF)
    rewards[:, 7] = group
    ids, state = batches(PLAIN, FIXED, 4, rewards)
    assert made.to_table(state, STEPS)["priority"][7] == 0
    retest = visits_of(ids, 7)[1]
    rewards[retest:, 7] = HALF
    ids, state = batches(PLAIN, FIXED, 4, rewards)
    assert made.to_table(state, STEPS)["priority"][7] == 0.25
    # Now it takes its turn with all others: every ten steps.
    assert np.diff(visits_of(ids, 7)[1:4]).tolist() == [10, 10]


def test_only_the_share_is_retested_first_due_first():
    config = dataclasses.replace(PLAIN, retest_every=6)
    rewards = table_of(20, HALF)
    rewards[:, :5] = RIGHT
    ids, _ = batches(config, FIXED, 4, rewards)
    retests = {t: [r for r in ids[t] if r < 5] for t in range(5, STEPS)}
    assert all(len(rows) == (t % 6 == 0) for t, rows in retests.items() if t >= 12)
    # No problem has its second retest before each has its first.
    first = [row for rows in retests.values() for row in rows][:5]
    assert sorted(first) == list(range(5))
    seen = [visits_of(ids, row)[0] for row in first]
    assert seen == sorted(seen)


@pytest.mark.parametrize("estimate", slow_except(["beta"], ["last", "beta"]))
@given(seed=st.integers(0, 2**32), n=st.sampled_from([12, 37]))
@settings(max_examples=5)
def test_everything_is_tried_once_before_anything_twice(estimate, seed, n):
    config = dataclasses.replace(PLAIN, estimate=estimate, retest_share=0.0)
    rewards = random_rewards(np.random.default_rng(seed), n, [0.3, 0.3, 0.3, 0.1], 0.0)
    drawn = batches(config, FIXED, 4, rewards)[0].reshape(-1)[:n].tolist()
    assert sorted(drawn) == list(range(n))


@pytest.mark.parametrize("estimate", ["last", "beta"])
def test_equal_priorities_are_drawn_in_epochs(estimate):
    config = dataclasses.replace(PLAIN, estimate=estimate, retest_share=0.0)
    epochs = batches(config, FIXED, 4, table_of(12, HALF))[0].reshape(-1, 12)
    assert (np.sort(epochs) == np.arange(12)).all()
    # Where an epoch ends within a batch, nothing waits for longer than the batches of one.
    ids, _ = batches(config, FIXED, 4, table_of(37, HALF))
    assert {gap for row in range(37) for gap in np.diff(visits_of(ids, row))} <= {9, 10}


@pytest.mark.parametrize(("group", "pool"), [(RIGHT, "solved"), (WRONG, "unsolved")])
def test_with_nothing_to_rank_pools_are_drawn_in_epochs(group, pool):
    config = dataclasses.replace(PLAIN, retest_share=0.0)
    ids, state = batches(config, FIXED, 4, table_of(12, group))
    assert (np.sort(ids.reshape(-1, 12)) == np.arange(12)).all()
    assert player(config, FIXED, 4)[0].summary(state, STEPS)[f"selection/pool_{pool}"] == 12


def test_first_picks_are_uniform_over_seeds():
    n, draws = 20, 20_000

    def first(seed):
        made = selector(PLAIN, FIXED, SelectorContext(1, GROUP, STEPS, seed))
        return made.select(made.init(n), jax.random.key(0), 0, 1)[0][0]

    picks = np.asarray(jax.jit(jax.vmap(first))(jnp.arange(draws)))
    assert stats.chisquare(np.bincount(picks, minlength=n)).pvalue > 1e-3


@pytest.mark.parametrize("better", [(0, 2, 4, 6), (1, 3, 5, 7)])
@pytest.mark.parametrize("estimate", ["last", "beta"])
def test_an_outcome_changes_the_next_draw(estimate, better):
    rewards = table_of(8, [1, 0, 0, 0])
    rewards[:, list(better)] = HALF
    config = dataclasses.replace(PLAIN, estimate=estimate, retest_share=0.0)
    ids, _ = batches(config, FIXED, 4, rewards)
    assert sorted(ids[:2].reshape(-1).tolist()) == list(range(8))
    assert sorted(ids[2].tolist()) == list(better)


@pytest.mark.parametrize("estimate", ["last", "beta"])
def test_no_verdict_changes_nothing_but_the_visit(estimate):
    config = dataclasses.replace(PLAIN, estimate=estimate, retest_share=0.0)
    made = player(config, FIXED, 4)[0]
    rewards = table_of(12, HALF)
    rewards[:, :4], rewards[:, 4:8], rewards[:, 8:10] = RIGHT, WRONG, [1, 0, 0, 0]
    before = batches(config, FIXED, 4, rewards)[1]
    zeros = jnp.zeros((12, GROUP))
    nothing = RolloutOutcome(jnp.full((12, GROUP), jnp.nan), zeros, zeros)
    after = made.observe(before, jnp.arange(12), nothing, STEPS)
    for name in ("pool", "wait", "last_success", "beliefs"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after.per_prompt, name), getattr(before.per_prompt, name))
    old, new = made.to_table(before, STEPS), made.to_table(after, STEPS + 1)
    for name in ("priority", "success"):
        np.testing.assert_array_equal(new[name], old[name])
    assert new["visits"][:12].tolist() == (old["visits"][:12] + 1).tolist()
    assert new["last_step"][:12].tolist() == [STEPS] * 12
    # The wait, as long as it was, counts from the visit.
    np.testing.assert_array_equal(after.per_prompt.due[:8], STEPS + before.per_prompt.wait[:8])


@pytest.mark.parametrize(
    ("forgetting", "group"),
    [
        (ForgettingConfig(mode="fixed", prior_successes=1, prior_failures=3), HALF),
        (ForgettingConfig(mode="fixed", shrinkage=0.1), [1, 0, 0, 0]),
    ],
)
def test_everything_is_tried_once_whatever_the_prior(forgetting, group):
    config = dataclasses.replace(PLAIN, estimate="beta", retest_share=0.0)
    drawn = batches(config, forgetting, 4, table_of(40, group))[0][:10].reshape(-1).tolist()
    assert sorted(drawn) == list(range(40))
