"""Properties over many draws: loss weights do not collapse, quotas are exact, cooldowns count steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.fields import ConfigError
from pspo_jax.selection import PromptMetadata
from pspo_jax.selection.engine.quotas import check_prompts
from pspo_jax.selection.engine.selector import score_all
from tests.selection.helpers import (
    GROUP,
    all_wrong,
    assert_valid,
    counted,
    half_right,
    half_right_only,
    make,
    random_rewards,
    run_steps,
)

KINDS = ("a", "b")
WEIGHTED = [
    ("pps", {"cooldown": 2, "exponent": 2.0, "floor": 1e-4, "exploration": 0.25}),
    pytest.param("spo", {"cooldown": 3}, marks=pytest.mark.slow),
    pytest.param("difficulty_pools", {"pool_weights": "0,1,0", "exploration": 0.25}, marks=pytest.mark.slow),
    pytest.param("difficulty_pools", {"pool_weights": "0,1,0", "cooldown": 2}, marks=pytest.mark.slow),
    pytest.param("curriculum", {"cooldown": 2, "curriculum_start": 0.2}, marks=pytest.mark.slow),
]


def kinds_of(*counts):
    return np.repeat(np.arange(len(counts)), counts).astype(np.int16)


def expected_weights(score, ids, slots, share, correction):
    """(1 / (N P))^beta over the batch's maximum, in float64; prompts without a weight count as the likeliest."""
    score = score.astype(float)
    sums = np.array([max(score[slots == slot].sum(), 1e-30) for slot in range(len(share))])
    p = np.where(score[ids] > 1e-30, np.array(share)[slots[ids]] * score[ids] / sums[slots[ids]], 0)
    p = np.where(p > 0, p, p.max() or 1)
    weight = p**-correction
    return weight / weight.max()


@pytest.mark.parametrize(("name", "fields"), WEIGHTED)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_loss_weights_never_collapse(name, fields, seed):
    """No loss weight is below the one that the batch's own probabilities give, whatever filled the batch."""
    compiled = make(name, 8, steps=20, correction=0.4, **fields)
    metadata = PromptMetadata(np.zeros(14, np.int16), np.random.default_rng(seed).random(14).astype(np.float32))
    state, rewards = compiled.init(14, metadata), random_rewards(seed, missing=0.2)
    for step in range(8):
        ids, weight, state = compiled.select(state, step, seed)
        score = np.asarray(state.score)[:14]
        drawn = score[ids][score[ids] > 1e-30].astype(float)
        least = (drawn.min() / drawn.max()) ** 0.4 if len(drawn) else 1.0
        assert weight.max() == 1 and weight.min() >= least * (1 - 1e-5)
        if "exploration" not in fields:
            want = expected_weights(score, ids, np.zeros(14, int), [1.0], 0.4)
            np.testing.assert_allclose(weight, want, rtol=1e-4)
        state = compiled.observe(state, ids, rewards(ids, step), step)


def test_prompts_that_teach_keep_their_weight_beside_those_of_weight_zero():
    compiled = make("difficulty_pools", 8, steps=20, correction=0.4, pool_weights="0,1,0")
    state = compiled.init(12)
    first = compiled.observe(state, np.arange(8), half_right_only([])(np.arange(8), 0), 0)
    ids, weight, _ = compiled.select(first, 1)
    assert set(range(8, 12)) <= set(ids.tolist())
    np.testing.assert_array_equal(weight, 1)


def test_a_quota_whose_prompts_all_rest_leaves_the_others_their_weight():
    compiled = make("pps", 8, task_names=KINDS, quotas="a=0.5, b=0.5", correction=0.4, cooldown=9)
    state = compiled.init(104, PromptMetadata(kinds_of(4, 100)))
    ids, _, state = compiled.select(state, 0)
    state = compiled.observe(state, ids, half_right(ids), 0)
    ids, weight, _ = compiled.select(state, 1)
    assert sorted(ids[ids < 4].tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(weight, 1, rtol=1e-6)


def test_weights_correct_for_the_share_of_a_quota_and_not_for_what_one_batch_gave_it():
    compiled = make("pps", 4, task_names=KINDS, quotas="a=0.3", correction=1.0)
    state = compiled.init(40, PromptMetadata(kinds_of(20, 20)))
    seen = {0: set(), 1: set()}
    for step in range(10):
        ids, weight, state = compiled.select(state, step)
        for task in (0, 1):
            seen[task] |= {round(float(w), 5) for w in weight[(ids >= 20) == bool(task)]}
    # P = 0.3 / 20 and 0.7 / 20; a batch that holds only one of the kinds has weight 1 throughout.
    assert seen[0] == {1.0} and seen[1] <= {round(0.3 / 0.7, 5), 1.0}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("uniform", {}, marks=pytest.mark.slow),
        ("pps", {"exploration": 0.25}),
        pytest.param("mopps", {}, marks=pytest.mark.slow),
        pytest.param("prioritized_replay", {"cooldown": 2}, marks=pytest.mark.slow),
    ],
)
def test_quotas_are_exact_over_steps_and_batches_distinct(name, fields):
    compiled = make(name, 8, task_names=("a", "b", "c"), quotas="a=0.03, b=0.37", **fields)
    task_ids = kinds_of(9, 40, 60)
    drawn, _ = run_steps(compiled, compiled.init(len(task_ids), PromptMetadata(task_ids)), 30, random_rewards(0))
    for ids in drawn:
        assert_valid(ids, len(task_ids), 8)
    total = np.stack([np.bincount(task_ids[ids], minlength=3) for ids in drawn]).cumsum(axis=0)
    due = np.arange(1, 31)[:, None] * 8 * np.array([0.03, 0.37, 0.6])
    assert np.abs(total - due).max() < 1
    assert total[-1, 0] == 7


def test_the_best_of_a_quota_are_drawn_however_many_it_has_this_time():
    """No prompt of a task comes twice before all prompts of its task have come."""
    compiled = make("uniform", 8, task_names=("a", "b", "c"), quotas="a=0.03, b=0.37")
    task_ids = kinds_of(9, 40, 60)
    drawn, _ = run_steps(compiled, compiled.init(len(task_ids), PromptMetadata(task_ids)), 40)
    visits = counted(drawn, len(task_ids))
    for k in range(3):
        assert np.ptp(visits[task_ids == k]) <= 1


def test_a_quota_with_too_few_prompts_for_a_round_is_refused():
    quotas = "a=0.5, b=0.5"
    with pytest.raises(ConfigError, match=r"up to 16 of the 32 prompts of a round from a, and there are 10"):
        check_prompts(quotas, KINDS, kinds_of(10, 90), 32)
    check_prompts(quotas, KINDS, kinds_of(16, 84), 32)


def test_a_quota_with_too_few_prompts_repeats_none_of_them():
    compiled = make("uniform", 8, task_names=KINDS, quotas="a=0.5, b=0.5")
    for ids in run_steps(compiled, compiled.init(20, PromptMetadata(kinds_of(2, 18))), 4)[0]:
        assert_valid(ids, 20, 8)
        assert {0, 1} <= set(ids.tolist())


def test_with_replacement_fewer_prompts_than_a_batch_are_drawn_in_turns():
    compiled = make("pps", 8, replacement=True, cooldown=1)
    state = compiled.init(3)
    for step in range(4):
        ids, weight, state = compiled.select(state, step)
        assert ids.min() >= 0 and ids.max() < 3 and weight.min() > 0
        state = compiled.observe(state, ids, half_right(ids), step)


def test_a_cooldown_ends_after_its_steps_though_nothing_was_rolled_out_in_them():
    compiled = make("pps", 4, cooldown=5, floor=1e-6, exponent=1.0)
    state = compiled.init(8)
    first, _, state = compiled.select(state, 0)
    state = compiled.observe(state, first, all_wrong(first), 0)
    second, _, state = compiled.select(state, 1)
    state = compiled.observe(state, second, half_right(second), 1)
    # At step 6 the first four are back, at step 7 the others too, which have nearly all of the weight.
    assert set(compiled.select(state, 6)[0].tolist()) == set(first.tolist())
    assert set(compiled.select(state, 7)[0].tolist()) == set(second.tolist())


@settings(max_examples=15)
@given(rounds=st.lists(st.booleans(), min_size=8, max_size=20), keeps=st.booleans())
def test_who_rests_depends_on_steps_alone(rounds, keeps):
    """Cooldowns equal those by a dict of last visits, whether or not the state that `select` returns is kept."""
    compiled = make("pps", 4, cooldown=3)
    state, last = compiled.init(13), {}
    for step, there in enumerate(rounds):
        if not there:
            continue
        ids, _, after = compiled.select(state, step)
        state = after if keeps else state
        able = [i for i in range(13) if last.get(i, -9) + 3 < step]
        assert len(set(ids.tolist()) & set(able)) == min(4, len(able))
        state = compiled.observe(state, ids, random_rewards(step)(ids, step), step)
        last |= dict.fromkeys(ids.tolist(), step)
        np.testing.assert_array_equal(state.score, scorer_of_all(compiled)(state))


@functools.cache
def scorer_of_all(compiled):
    """A function that scores all prompts at the step of a state."""
    engine = compiled.selector.observe.__wrapped__.args[0]
    return jax.jit(lambda state: score_all(engine, state, state.now).score)


def test_no_score_is_old_after_steps_without_a_round():
    compiled = make("curriculum", 4, steps=500, curriculum_steps=10, curriculum_start=0.1)
    n = 20_000
    metadata = PromptMetadata(np.zeros(n, np.int16), np.arange(n, dtype=np.float32))
    ids, _, state = compiled.select(compiled.init(n, metadata), 0)
    state = compiled.observe(state, ids, half_right(ids), 0)
    _, _, state = compiled.select(state, 60)
    assert np.asarray(state.score)[:n].min() == 1


def test_retests_have_their_turn_though_their_own_step_had_no_round():
    fields = {"retest_every": 10, "retest_share": 0.25, "estimate": "last", "cooldown": 0}
    compiled = make("prioritized_replay", 4, **fields)
    state = compiled.init(12)
    for step in range(19):
        ids, _, state = compiled.select(state, step)
        # Prompt 0 is solved at its first visit, all others stay mixed.
        rewards = np.where((ids == 0)[:, None], np.ones((len(ids), GROUP)), half_right(ids))
        state = compiled.observe(state, ids, rewards, step)
    assert 0 not in compiled.select(state, 19)[0]
    assert 0 in compiled.select(state, 20)[0]
    # Nothing is rolled out in steps 20 to 22, and step 23 does what step 20 would have done.
    ids, _, later = compiled.select(state, 23)
    assert 0 in ids
    later = compiled.observe(later, ids, half_right(ids), 23)
    assert int(later.last_rollout_step) == 23


def verdicts(rewards, right):
    centred = jnp.asarray(rewards - rewards.mean(1, keepdims=True), jnp.float32)
    return RolloutOutcome(jnp.asarray(rewards, jnp.float32), centred, centred, verdicts=jnp.asarray(right, jnp.float32))


def test_success_is_the_verdict_and_not_the_shaped_reward():
    """Well-formed wrong answers have a reward near 1; right answers with a penalty have a negative reward."""
    ids = np.array([0, 1, 2])
    rewards = np.array([[0.9, 1.0, 0.8, 1.1], [-0.5, -0.4, -0.6, -0.2], [0.7, 0.1, 0.4, 0.2]])
    right = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [np.nan, np.nan, np.nan, np.nan]])
    by_verdict, by_reward = make("mopps", 3), make("mopps", 3, success="reward")
    seen = verdicts(rewards, right)
    table = by_verdict.table(by_verdict.observe(by_verdict.init(3), ids, seen, 0), 3, 1)
    np.testing.assert_array_equal(table["success"], [0, 1, np.nan])
    table = by_reward.table(by_reward.observe(by_reward.init(3), ids, seen, 0), 3, 1)
    np.testing.assert_allclose(table["success"], [0.925, 0, 0.35], atol=1e-6)


def test_verdicts_decide_what_is_drawn_next():
    """Two prompts have equal rewards; the one with mixed verdicts is drawn again, and the solved one is not."""
    compiled = make("prioritized_replay", 2, cooldown=0, retest_share=0.0)
    rewards, state = np.tile([0.5, 2.0, 0.5, 2.0], (2, 1)), compiled.init(4)
    for step, ids in enumerate(([0, 1], [2, 3])):
        right = np.array([[1, 1, 1, 1], [1, 0, 1, 0]])
        state = compiled.observe(state, np.array(ids), verdicts(rewards, right), step)
    assert sorted(compiled.select(state, 2)[0].tolist()) == [1, 3]
