"""Options of all selectors: cooldown, limits, exploration, quotas, odd sizes, repeated prompts, changed data."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.selection import SCORERS, PromptMetadata
from pspo_jax.selection.beliefs import Beliefs
from tests.helpers import slow_except
from tests.selection.helpers import (
    GROUP,
    all_wrong,
    assert_even,
    assert_valid,
    counted,
    half_right,
    half_right_only,
    make,
    outcome,
    random_rewards,
    run_steps,
    with_priorities,
)

MODES = ["uniform", "pps", "mopps", "prioritized_replay"]
"""Top, draw, candidates, and top of several pools."""
USUAL = slow_except(["pps", "prioritized_replay"], MODES)
N, B = 40, 4
COLUMNS = PromptMetadata(jnp.zeros(N, jnp.int8), jnp.arange(N, dtype=jnp.float32))


def last_visits(drawn, prompts):
    """Steps [steps, prompts] of each prompt's last visit before each step; -1 = never visited."""
    last, rows = np.full(prompts, -1), []
    for step, ids in enumerate(drawn):
        rows.append(last.copy())
        last[ids] = step
    return np.array(rows)


# Cooldown


@pytest.mark.parametrize("name", slow_except(["prioritized_replay"], ["pps", "prioritized_replay"]))
@settings(max_examples=8)
@given(sizes=st.sampled_from([(3, 3, 7), (1, 4, 1), (1, 4, 60)]), seed=st.integers(0, 10**6))
def test_a_prompt_rests_for_the_cooldown(name, sizes, seed):
    cooldown, b, more = sizes
    n = b * (cooldown + 1) + more
    compiled = make(name, b, cooldown=cooldown)
    drawn, _ = run_steps(compiled, compiled.init(n), 20, random_rewards(seed))
    for step, (ids, last) in enumerate(zip(drawn, last_visits(drawn, n), strict=True)):
        assert_valid(ids, n, b)
        assert ((last[ids] < 0) | (step - last[ids] > cooldown)).all()


@pytest.mark.parametrize("name", slow_except(["prioritized_replay"], ["pps", "prioritized_replay"]))
def test_a_prompt_can_be_drawn_as_soon_as_its_cooldown_ends(name):
    extra = {"initial": 1e-6, "floor": 1e-6, "exponent": 2.0} if name == "pps" else {"retest_share": 0.0}
    compiled = make(name, 2, cooldown=3, **extra)
    state = compiled.init(20)
    for step in range(10):
        ids = np.arange(2 * step, 2 * step + 2)
        state = compiled.observe(state, ids, half_right_only({0, 1})(ids, step), step)
    # The only prompts that are worth anything have long rested: they come whenever they may.
    drawn, _ = run_steps(compiled, state, 12, half_right_only({0, 1}), start=10)
    came = np.flatnonzero((np.sort(drawn, axis=1) == [0, 1]).all(1))
    assert came.tolist() == [0, 4, 8]
    assert not np.isin(np.delete(drawn, came, axis=0), [0, 1]).any()


@pytest.mark.parametrize("name", USUAL)
def test_where_all_prompts_rest_the_oldest_visits_come_first(name):
    n, b = 7, 3
    compiled = make(name, b, cooldown=3)
    drawn, _ = run_steps(compiled, compiled.init(n), 12, random_rewards(1))
    for ids, last in zip(drawn, last_visits(drawn, n), strict=True):
        assert_valid(ids, n, b)
        assert sorted(last[ids]) == sorted(last)[:b]


# Limits


@pytest.mark.parametrize("name", slow_except(["prioritized_replay"], MODES))
def test_no_prompt_is_drawn_more_often_than_max_visits(name):
    n, b, most = 10, 2, 3
    compiled = make(name, b, max_visits=most)
    drawn, _ = run_steps(compiled, compiled.init(n), 20, half_right_only(range(5)))
    visits = np.zeros(n, int)
    for ids, last in zip(drawn, last_visits(drawn, n), strict=True):
        assert_valid(ids, n, b)
        # Once fewer are left than a batch needs, the oldest return.
        over, spare = ids[visits[ids] >= most], (visits < most).sum()
        assert len(over) == max(0, b - spare)
        assert sorted(last[over]) == sorted(last[visits >= most])[: len(over)]
        visits[ids] += 1
    assert visits.min() >= most and spare == 0


def judged_once(ids, step):
    """Odd prompts have a verdict, but only until step 10."""
    return np.where((np.asarray(ids)[:, None] % 2 == 1) & (step < 10), half_right(ids), np.nan)


@pytest.mark.parametrize("name", slow_except(["pps"], MODES))
def test_a_prompt_that_never_had_a_verdict_is_left_out(name):
    n = 20
    compiled = make(name, B, discount=0.0)  # max_unjudged is 3
    state = compiled.init(n)
    for step in range(10):
        ids = (B * step + np.arange(B)) % n
        state = compiled.observe(state, ids, judged_once(ids, step), step)
    drawn, _ = run_steps(compiled, state, 60, judged_once, start=10)
    assert counted(drawn, n)[::2].max() == 1
    # Those that had one verdict stay, however many visits go without.
    assert (drawn[40:] % 2 == 1).all()


def test_without_max_unjudged_no_prompt_is_left_out():
    compiled = make("uniform", 2, max_unjudged=0)
    drawn, _ = run_steps(compiled, compiled.init(10), 40, unjudged)
    assert (counted(drawn, 10) == 8).all()


def unjudged(ids, step):
    return np.full((len(ids), GROUP), np.nan)


@pytest.mark.parametrize("name", USUAL)
def test_batches_are_full_where_no_prompt_ever_had_a_verdict(name):
    n = 12
    compiled = make(name, B, discount=0.0)
    drawn, _ = run_steps(compiled, compiled.init(n), 30, unjudged)
    visits = np.zeros(n, int)
    for ids, last in zip(drawn, last_visits(drawn, n), strict=True):
        assert_valid(ids, n, B)
        over, spare = ids[visits[ids] >= 3], (visits < 3).sum()
        assert len(over) == max(0, B - spare)
        assert sorted(last[over]) == sorted(last[visits >= 3])[: len(over)]
        visits[ids] += 1
    assert spare == 0


# Exploration


EXPLORING_PPS = {"floor": 1e-6, "exponent": 2.0, "correction": 0.7}


def with_favourites(compiled, n):
    """The state of n prompts of which only 0 and 1 have a priority."""
    state = compiled.init(n)
    for step in range(12):
        state = compiled.observe(state, np.arange(n), half_right_only({0, 1})(np.arange(n), step), step)
    return state


@pytest.mark.parametrize("name", slow_except(["pps"], MODES[1:]))
def test_half_of_a_batch_explores(name):
    n, b = 12, 4
    extra = {"pps": EXPLORING_PPS, "prioritized_replay": {"retest_share": 0.0}}.get(name, {})
    compiled = make(name, b, discount=1.0, exploration=0.5, **extra)
    ids = compiled.draws(with_favourites(compiled, n), 3000, step=12)
    assert (np.sort(ids[:, :2], axis=1) == [0, 1]).all()
    # The other half is of all others, distinct from the first.
    assert (np.sort(ids, axis=1)[:, :2] == [0, 1]).all()
    assert (ids[:, 2] != ids[:, 3]).all()
    assert_even(counted(ids[:, 2:], n)[2:], 2)


@pytest.mark.parametrize("name", slow_except(["pps"], ["pps", "prioritized_replay"]))
def test_with_exploration_alone_all_prompts_that_may_be_drawn_are_alike(name):
    n, b = 12, 2
    compiled = make(name, b, exploration=1.0, cooldown=2)
    _, state = run_steps(compiled, compiled.init(n), 9, half_right_only({0, 1, 2}))
    rested = np.asarray(compiled.table(state, n)["last_step"]) < 9 - 2
    assert rested.sum() == n - 2 * b
    visits = counted(compiled.draws(state, 3000, step=9), n)
    assert (visits[~rested] == 0).all()
    assert_even(visits[rested], b)


def test_loss_weights_know_of_exploration():
    n, b = 12, 4
    compiled = make("pps", b, discount=1.0, exploration=0.5, **EXPLORING_PPS)
    priority = np.linspace(0.1, 2, n)
    ids, weight, _ = compiled.select(with_priorities(compiled, priority), 0)
    p = 0.5 * priority**2 / (priority**2).sum() + 0.5 / n
    raw = (1 / p[ids]) ** 0.7
    np.testing.assert_allclose(weight, raw / raw.max(), rtol=1e-4)


# Quotas

KINDS = ("a", "b", "c")
QUOTAS = "a=0.5, b=0.25"
KIND = np.random.default_rng(5).permutation(np.repeat([0, 1, 2], [6, 10, 24]))


@pytest.mark.parametrize("name", slow_except(["pps"], MODES))
def test_every_batch_has_each_tasks_quota(name):
    compiled = make(name, 8, task_names=KINDS, quotas=QUOTAS, cooldown=2)
    state = compiled.init(N, PromptMetadata(jnp.asarray(KIND, jnp.int8)))
    drawn, _ = run_steps(compiled, state, 15, random_rewards(6))
    for ids, last in zip(drawn, last_visits(drawn, N), strict=True):
        assert_valid(ids, N, 8)
        assert np.bincount(KIND[ids], minlength=3).tolist() == [4, 2, 2]
        # Of the first task too few are rested: it is filled by its own oldest, and the others are not touched.
        assert sorted(last[ids[KIND[ids] == 0]]) == sorted(last[KIND == 0])[:4]
        others = ids[KIND[ids] > 0]
        assert ((last[others] < 0) | (last[others] < last.max() - 1)).all()


@pytest.fixture(scope="module")
def weighted():
    return make("pps", 8, task_names=KINDS, quotas=QUOTAS, exponent=1.0, correction=0.7, floor=1e-6)


def test_quotas_leave_the_order_of_preference_within_a_task(weighted):
    best = np.concatenate([np.flatnonzero(k == KIND)[:count] for k, count in enumerate((4, 2, 2))])
    priority = np.full(N, 1e-6)
    priority[best] = 1.0
    state = with_priorities(weighted, priority, metadata=PromptMetadata(jnp.asarray(KIND, jnp.int8)))
    assert sorted(weighted.select(state, 0)[0]) == sorted(best)


def test_loss_weights_use_the_probability_within_a_quota(weighted):
    priority = np.random.default_rng(7).uniform(0.1, 2, N)
    state = with_priorities(weighted, priority, metadata=PromptMetadata(jnp.asarray(KIND, jnp.int8)))
    ids, weight, _ = weighted.select(state, 0)
    share = np.array([0.5, 0.25, 0.25])[KIND]
    p = share * priority / np.bincount(KIND, priority)[KIND]
    raw = (1 / p[ids]) ** 0.7
    np.testing.assert_allclose(weight, raw / raw.max(), rtol=1e-4)


MANY_TASKS = [(44, "prioritized_replay", 44), (130, "uniform", 1)]


@pytest.mark.parametrize(("tasks", "name", "named"), slow_except(MANY_TASKS[:1], MANY_TASKS, several=True))
def test_quotas_of_many_tasks_lose_no_prompt(tasks, name, named):
    task_names = tuple(f"task{i:03d}" for i in range(tasks))
    quotas = ", ".join(f"{task}={0.9 / named}" for task in task_names[:named])
    compiled = make(name, 4, task_names=task_names, quotas=quotas)
    state = compiled.init(tasks, PromptMetadata(jnp.arange(tasks)))
    assert int(compiled.selector.summary(state, jnp.int32(0))["selection/eligible"]) == tasks
    assert (np.asarray(state.label)[:tasks] >= 0).all()


# Sizes


@pytest.mark.parametrize("name", USUAL[1:])
@pytest.mark.parametrize("n", [B, B + 1])
def test_batches_are_full_where_there_are_hardly_more_prompts(name, n):
    compiled = make(name, B, discount=0.0)
    for ids in run_steps(compiled, compiled.init(n), 20, random_rewards(8, missing=0.3))[0]:
        assert_valid(ids, n, B)


def test_all_prompts_of_several_blocks_are_drawn_alike():
    n = 300
    compiled = make("pps", 16)
    ids = compiled.draws(compiled.init(n), 500)
    assert_even(counted(ids, n), 16)


@pytest.mark.parametrize("initial", [1e-3, 1e3])
def test_weights_beyond_float32_still_fill_a_batch(initial):
    # 1e-150 or 1e150: all weights are the same smallest or largest one.
    compiled = make("pps", B, exponent=50.0, initial=initial, correction=0.4)
    state, visits = compiled.init(N), np.zeros(N, int)
    for seed in range(200):
        ids, weight, _ = compiled.select(state, 0, seed)
        assert_valid(ids, N, B)
        np.testing.assert_allclose(weight, 1.0, rtol=1e-5)
        visits[ids] += 1
    assert_even(visits, B)


# A prompt that is twice in a batch

TWICE = np.array([7, 3, 7, 9])
GROUPS = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]])


@pytest.mark.parametrize("name", slow_except(["pps", "prioritized_replay", "mopps", "spo"], sorted(SCORERS)))
def test_a_prompt_twice_in_a_batch_counts_twice(name):
    compiled = make(name, B, discount=0.0)
    state = compiled.observe(compiled.init(N, COLUMNS), TWICE, GROUPS, 6)
    found = compiled.table(state, N, 7)
    want = np.zeros(N, int)
    want[[3, 7, 9]] = 1, 2, 1
    np.testing.assert_array_equal(found["visits"], want)
    np.testing.assert_array_equal(found["last_step"], np.where(want > 0, 6, -1))
    np.testing.assert_array_equal(found["success"][[3, 7, 9]], [0.75, 0.5, 0.5])
    assert_valid(compiled.select(state, 7)[0], N, B)


@pytest.mark.parametrize("name", ["prioritized_replay", "mopps", "posterior_mixed", "spo"])
def test_beliefs_count_both_groups_of_a_prompt_twice_in_a_batch(name):
    compiled = make(name, B, discount=0.0)
    state = compiled.observe(compiled.init(N, COLUMNS), TWICE, GROUPS, 6)
    beliefs = state.per_prompt if isinstance(state.per_prompt, Beliefs) else state.per_prompt.beliefs
    prior = 0 if name == "spo" else 1
    np.testing.assert_allclose(np.asarray(beliefs.a)[[3, 7, 9]], np.array([3, 4, 2]) + prior)
    np.testing.assert_allclose(np.asarray(beliefs.b)[[3, 7, 9]], np.array([1, 4, 2]) + prior)
    if state.shared.seen > 0:
        means = np.asarray(beliefs.a / (beliefs.a + beliefs.b))[[3, 7, 9]]
        assert float(state.shared.seen) == 3
        assert float(state.shared.total) == pytest.approx(means.sum(), rel=1e-5)


def test_the_last_group_of_a_prompt_twice_in_a_batch_makes_its_priority():
    compiled = make("pps", B, discount=0.0)
    found = compiled.table(compiled.observe(compiled.init(N), TWICE, GROUPS, 6), N)["priority"]
    raw = np.abs(np.asarray(outcome(GROUPS).raw_advantages)[:, -1]) + 0.1
    np.testing.assert_allclose(found[[3, 7, 9]], raw[1:], rtol=1e-5)


def test_the_last_group_of_a_prompt_twice_in_a_batch_decides_gresos_streak():
    compiled = make("greso", B, discount=0.0)
    state = compiled.init(N)
    for step in range(3):
        state = compiled.observe(state, [7, 1, 2, 3], all_wrong(TWICE), step)
    assert compiled.table(state, N)["priority"][7] == 0.125
    for first, second, want in ((all_wrong([0]), half_right([0]), 1.0), (half_right([0]), all_wrong([0]), 0.0625)):
        seen = compiled.observe(state, [7, 1, 2, 7], np.concatenate([first, all_wrong([1, 2]), second]), 3)
        assert compiled.table(seen, N)["priority"][7] == want


def test_all_groups_of_a_prompt_twice_in_a_batch_decide_its_pool():
    compiled = make("difficulty_pools", B, discount=0.0)
    rewards = np.array([[0] * 4, [0] * 4, [1] * 4, [1] * 4])
    found = compiled.table(compiled.observe(compiled.init(N), TWICE, rewards, 6), N)
    np.testing.assert_allclose(found["priority"][[3, 7, 9]], [0.2, 1.0, 0.2])


@pytest.mark.parametrize("name", ["pps", "difficulty_pools"])
def test_draws_with_replacement_may_repeat_a_prompt(name):
    compiled = make(name, B, replacement=True)
    state, repeated = compiled.init(5), 0
    visits = np.zeros(5, int)
    for step in range(10):
        ids, _, state = compiled.select(state, step)
        state = compiled.observe(state, ids, half_right(ids), step)
        repeated += len(set(ids.tolist())) < B
        visits += counted(ids, 5)
    assert repeated
    np.testing.assert_array_equal(compiled.table(state, 5)["visits"], visits)


# Changed data


def changed(seed=9, before=30, kept=21, new=9):
    """Old rows of reordered data with some prompts removed and some added."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.concatenate([rng.permutation(before)[:kept], np.full(new, -1)]))


@pytest.mark.parametrize("name", slow_except(["pps", "spo"], ["uniform", "pps", "mopps", "prioritized_replay", "spo"]))
def test_what_is_known_of_prompts_follows_them(name):
    places = changed()
    compiled = make(name, 3, cooldown=3)
    _, state = run_steps(compiled, compiled.init(30), 12, random_rewards(10))
    before, fresh = compiled.table(state, 30, 12), compiled.table(compiled.init(30), 30, 12)
    state = compiled.selector.follow(state, compiled.init(30), jnp.asarray(places))
    for column, found in compiled.table(state, 30, 12).items():
        np.testing.assert_array_equal(found, np.where(places >= 0, before[column][places], fresh[column]))
    # Prompts that rested at the change go on resting, under their new rows.
    last = np.where(places >= 0, before["last_step"][places], -1)
    for step in range(12, 24):
        ids, _, state = compiled.select(state, step)
        assert_valid(ids, 30, 3)
        assert ((last[ids] < 0) | (step - last[ids] > 3)).all()
        state = compiled.observe(state, ids, random_rewards(step)(ids, step), step)
        last[ids] = step


@pytest.mark.parametrize("name", ["uniform", "greso"])
def test_changed_data_starts_a_new_epoch(name):
    compiled = make(name, B, discount=0.0)
    _, state = run_steps(compiled, compiled.init(N), 7, half_right_only(range(20)))
    state = compiled.selector.follow(state, compiled.init(N), jnp.asarray(changed(before=N, kept=30, new=10)))
    drawn, _ = run_steps(compiled, state, N // B, start=7)
    assert (counted(drawn, N) == 1).all()


def test_the_cooldown_of_prompts_that_changed_places_ends():
    compiled = make("pps", 2, cooldown=3, initial=1e-6, floor=1e-6, exponent=2.0)
    state = compiled.observe(compiled.init(20), [0, 1], half_right([0, 1]), 0)
    ids = [2, 3]
    state = compiled.observe(state, ids, all_wrong(ids), 1)
    places = np.concatenate([np.arange(19, 9, -1), [1, -1, 0], np.arange(3, 10)])
    state = compiled.selector.follow(state, compiled.init(20), jnp.asarray(places))
    drawn, _ = run_steps(compiled, state, 8, half_right_only({10, 12}), start=2)
    came = np.flatnonzero((np.sort(drawn, axis=1) == [10, 12]).all(1))
    assert (came + 2).tolist() == [4, 8]


@pytest.mark.parametrize("n", [9, 150])
def test_data_may_shrink_and_grow(n):
    compiled = make("pps", 3, cooldown=3)
    _, state = run_steps(compiled, compiled.init(30), 12, random_rewards(10))
    places = np.concatenate([np.arange(30)[::-1], np.full(120, -1)])[:n]
    before = compiled.table(state, 30)["visits"]
    state = compiled.selector.follow(state, compiled.init(n), jnp.asarray(places))
    found = compiled.table(state, n)["visits"]
    np.testing.assert_array_equal(found, np.where(places >= 0, before[places], 0))
    drawn, _ = run_steps(compiled, state, 8, random_rewards(11), start=12)
    for ids in drawn:
        assert_valid(ids, n, 3)
