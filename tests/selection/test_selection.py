"""Selectors: exact frequencies and weights, epochs without gaps, the effect of outcomes, and reports."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection import SCORERS, PromptMetadata, SelectorContext, selector
from tests.helpers import slow_except
from tests.selection.helpers import (
    GROUP,
    all_wrong,
    assert_even,
    assert_fits,
    assert_valid,
    counted,
    half_right,
    half_right_only,
    make,
    outcome,
    random_rewards,
    run_steps,
    scan_steps,
    with_priorities,
)

N, B = 40, 4
COLUMNS = PromptMetadata(jnp.zeros(N, jnp.int8), jnp.asarray(np.random.default_rng(0).permutation(N), jnp.float32))


def all_ways(p, k):
    """Probability of each ordered k in successive draws without replacement."""
    ways = {}
    for way in itertools.permutations(range(len(p)), k):
        left, chance = sum(p), 1.0
        for i in way:
            chance, left = chance * p[i] / left, left - p[i]
        ways[way] = chance
    return ways


def times_drawn(ids, ways):
    """How often each tuple was drawn."""
    found = {way: 0 for way in ways}
    for way, times in zip(*np.unique(ids, axis=0, return_counts=True), strict=True):
        found[tuple(way.tolist())] += int(times)
    return list(found.values())


# Uniform


@pytest.mark.parametrize(("n", "b"), slow_except([(23, 5)], [(1, 1), (7, 7), (23, 5), (130, 13)], several=True))
def test_uniform_visits_every_prompt_once_an_epoch(n, b):
    compiled = make("uniform", b)
    drawn, _ = run_steps(compiled, compiled.init(n), 2 * math.ceil(n / b) + 3)
    visits = np.zeros(n, int)
    for ids in drawn:
        assert_valid(ids, n, b)
        visits[ids] += 1
        # No prompt starts an epoch while another has not finished the one before: also in batches over an epoch's end.
        assert visits.max() - visits.min() <= 1
    assert visits.sum() == drawn.size


def test_uniform_weighs_all_prompts_alike():
    compiled = make("uniform", 5)
    assert compiled.select(compiled.init(23), 0)[1].tolist() == [1.0] * 5


@pytest.fixture(scope="module")
def orders():
    """Order of five prompts in two epochs, for many seeds [seeds, 2, 5]."""

    def order(seed):
        s = selector(SelectionConfig(name="uniform"), ForgettingConfig(mode="fixed"), SelectorContext(1, 2, 10, seed))
        seen = outcome([[0.0, 1.0]])

        def one(state, step):
            ids, _, state = s.select(state, jax.random.key(0), step, 1)
            return s.observe(state, ids, seen, step), ids[0]

        return jax.lax.scan(one, s.init(5), jnp.arange(10))[1].reshape(2, 5)

    return np.asarray(jax.jit(lambda seeds: jax.lax.map(order, seeds, batch_size=1500))(jnp.arange(6000)))


def test_uniform_orders_are_as_likely_as_one_another(orders):
    everything = dict.fromkeys(itertools.permutations(range(5)), 1 / 120)
    for epoch in (0, 1):
        assert_fits(np.bincount(orders[:, epoch, 0]), np.ones(5))
        assert_fits(times_drawn(orders[:, epoch], everything), list(everything.values()))


def test_uniform_orders_differ_by_epoch_and_by_seed(orders):
    for first, second in ((orders[:, 0], orders[:, 1]), (orders[:-1, 0], orders[1:, 0])):
        same = (first == second).all(1).sum()
        assert abs(same - 6000 / 120) < 4 * math.sqrt(6000 / 120)
        assert_fits(np.bincount(5 * first[:, 0] + second[:, 0], minlength=25), np.ones(25))


# PPS


def test_pps_draws_are_successive_draws_in_proportion_to_powers_of_priorities():
    priority = np.array([1.0, 0.3, 0.05, 2.0, 1e-3, 0.7])
    p = priority**0.6 / (priority**0.6).sum()
    compiled = make("pps", 2, exponent=0.6, floor=1e-6)
    ids = compiled.draws(with_priorities(compiled, priority), 50_000)
    assert_fits(counted(ids[:, 0], 6), p)
    ways = all_ways(p, 2)
    assert_fits(times_drawn(ids, ways), list(ways.values()))


@pytest.mark.slow
def test_pps_draws_are_exact_where_one_prompt_holds_nearly_all_of_the_weight():
    priority = np.array([1e6, 1.0, 2.0, 4.0])
    compiled = make("pps", 3, exponent=1.0, floor=1e-6)
    ids = compiled.draws(with_priorities(compiled, priority), 5000)
    ways = {(0, *(i + 1 for i in rest)): p for rest, p in all_ways([1, 2, 4], 2).items()}
    usual = ids[ids[:, 0] == 0]
    assert len(usual) > 0.999 * len(ids)
    assert_fits(times_drawn(usual, ways), list(ways.values()))


def test_draws_with_replacement_are_independent_and_in_proportion():
    priority = np.array([1.0, 0.3, 0.05, 2.0])
    compiled = make("pps", 20_000, exponent=0.6, floor=1e-6, replacement=True)
    p = priority**0.6 / (priority**0.6).sum()
    ids = compiled.select(with_priorities(compiled, priority), 0)[0]
    assert_fits(counted(ids, 4), p)
    ways = {(i, j): p[i] * p[j] for i, j in itertools.product(range(4), repeat=2)}
    assert_fits(times_drawn(ids.reshape(-1, 2), ways), list(ways.values()))


@pytest.mark.parametrize(
    ("exponent", "correction"), slow_except([(1.0, 1.0)], [(0.6, 0.4), (1.0, 1.0), (0.0, 0.4)], several=True)
)
@given(priority=st.lists(st.floats(1e-3, 10), min_size=9, max_size=9), seed=st.integers(0, 1000))
def test_loss_weights_equal_plain_python(exponent, correction, priority, seed):
    compiled = make("pps", 4, exponent=exponent, correction=correction, floor=1e-6)
    ids, weight, _ = compiled.select(with_priorities(compiled, priority), 0, seed)
    total = sum(p**exponent for p in priority)
    n_p = [9 * priority[i] ** exponent / total for i in ids]
    raw = [(1 / x) ** correction for x in n_p]
    np.testing.assert_allclose(weight, np.array(raw) / max(raw), rtol=1e-4)
    assert weight.max() == pytest.approx(1, abs=1e-6)
    # w (N P)^beta is 1 before normalisation, so afterwards it is the same for all.
    np.testing.assert_allclose([w * x**correction for w, x in zip(weight, n_p, strict=True)], 1 / max(raw), rtol=1e-4)


def test_draws_are_not_fixed_at_the_start_of_an_epoch():
    compiled = make("pps", 8, floor=1e-6)
    state = compiled.init(100)
    before, _, state = compiled.select(state, 0, seed=7)
    # The prompts just drawn turn out to teach nothing.
    after, _, _ = compiled.select(compiled.observe(state, before, all_wrong(before), 0), 1, seed=7)
    assert not set(before.tolist()) & set(after.tolist())


def test_loss_weights_use_the_probability_at_the_draw():
    compiled = make("pps", 4, exponent=1.0, correction=1.0, floor=1e-6)
    state = with_priorities(compiled, np.ones(9))
    # An outcome that changes every priority comes after the weights of its own draw.
    ids, weight, state = compiled.select(state, 0)
    np.testing.assert_allclose(weight, 1.0, rtol=1e-5)
    state = compiled.observe(state, ids, half_right(ids), 0)
    again, weight, _ = compiled.select(state, 1)
    priority = np.ones(9)
    priority[ids] = abs(float(outcome(half_right([0])).raw_advantages[0, -1]))
    assert 0 < np.isin(again, ids).sum() < 4
    np.testing.assert_allclose(weight, priority[again].min() / priority[again], rtol=1e-4)


@pytest.mark.parametrize(("statistic", "want"), [("last", 0.5), ("mean", 1.0), ("max", 2.0)])
def test_pps_statistics(statistic, want):
    compiled = make("pps", 1, statistic=statistic, floor=1e-6)
    seen = outcome(np.zeros((1, 4)))._replace(raw_advantages=jnp.array([[-2.0, 1.0, 0.5, 0.5]]))
    found = compiled.table(compiled.observe(compiled.init(3), [1], seen, 0), 3)
    np.testing.assert_allclose(found["priority"], [1.0, want + 1e-6, 1.0], rtol=1e-5)


@pytest.mark.parametrize(("signal", "want"), [("raw", 1.0), ("smoothed", 3.0)])
def test_pps_signal(signal, want):
    compiled = make("pps", 1, statistic="last", floor=1e-6, **({} if signal == "raw" else {"signal": signal}))
    seen = outcome(np.zeros((1, 4)), advantages=[[0, 0, 0, 3.0]])._replace(raw_advantages=jnp.ones((1, 4)))
    found = compiled.table(compiled.observe(compiled.init(3), [1], seen, 0), 3)
    assert found["priority"][1] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("statistic", ["last", "mean", "max"])
def test_a_prompt_without_a_verdict_keeps_its_priority(statistic):
    compiled = make("pps", 1, statistic=statistic, floor=1e-6)
    state = compiled.observe(compiled.init(3), [1], [[0, 1, 1, 0]], 0)
    before = compiled.table(state, 3)["priority"]
    assert before[1] != before[0]
    nothing = outcome([[math.nan] * 4])._replace(raw_advantages=jnp.full((1, 4), 5.0))
    np.testing.assert_array_equal(compiled.table(compiled.observe(state, [1], nothing, 1), 3)["priority"], before)


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_completions_without_a_verdict_do_not_count(statistic):
    compiled = make("pps", 1, statistic=statistic, floor=1e-6)
    seen = outcome([[1, math.nan, 0, math.nan]])._replace(raw_advantages=jnp.array([[0.5, 9.0, -0.5, 9.0]]))
    found = compiled.table(compiled.observe(compiled.init(3), [1], seen, 0), 3)
    assert found["priority"][1] == pytest.approx(0.5, rel=1e-4)


def test_exponent_and_correction_are_annealed_and_all_prompts_follow():
    steps, n = 11, 20
    compiled = make(
        "pps", 4, exponent=0.2, exponent_end=1.0, correction=0.4, correction_end=1.0, floor=1e-6, steps=steps
    )
    priority = np.linspace(0.1, 2, n)
    state = with_priorities(compiled, priority)
    for step in range(steps):
        ids, weight, state = compiled.select(state, step)
        exponent, correction = 0.2 + 0.8 * step / (steps - 1), 0.4 + 0.6 * step / (steps - 1)
        p = priority**exponent / (priority**exponent).sum()
        raw = (1 / (n * p[ids])) ** correction
        np.testing.assert_allclose(weight, raw / raw.max(), rtol=1e-4)
        if step in (0, 5, 10):
            assert_fits(counted(compiled.draws(state, 4000, step)[:, 0], n), p)
        # Its own advantages again, so that nothing but time changes a weight.
        same = np.tile(priority[ids][:, None] - 1e-6, (1, GROUP))
        seen = outcome(np.zeros((4, GROUP)))._replace(raw_advantages=jnp.asarray(same, jnp.float32))
        state = compiled.observe(state, ids, seen, step)


# GRESO


def test_greso_visits_a_prompt_that_is_never_mixed_with_the_keep_probability():
    n, keep = 64, 0.25
    compiled = make("greso", 8, greso_base=1e-3, greso_floor=keep)
    rewards = half_right_only(range(n // 2))(np.arange(n), 0)
    drawn = scan_steps(compiled, compiled.init(n), 2500, rewards)
    visits = counted(drawn, n)
    epochs = visits[: n // 2].mean()
    assert visits[: n // 2].max() - visits[: n // 2].min() <= 1
    # Everything is visited in the first epoch.
    want = n // 2 * (1 + keep * (epochs - 1))
    error = math.sqrt(n // 2 * epochs * keep * (1 - keep))
    assert abs(visits[n // 2 :].sum() - want) < 4 * error


@pytest.mark.slow
def test_greso_without_skips_is_uniform():
    a, b = make("greso", B), make("uniform", B)
    np.testing.assert_array_equal(run_steps(a, a.init(N), 25)[0], run_steps(b, b.init(N), 25)[0])


def test_a_mixed_group_resets_gresos_streak():
    compiled = make("greso", 1, greso_base=0.5, greso_floor=0.1)
    state, found = compiled.init(3), []
    none = np.full((1, GROUP), np.nan)
    for step, rewards in enumerate(
        [all_wrong([0]), 1 - all_wrong([0]), none, all_wrong([0]), all_wrong([0]), half_right([0])]
    ):
        state = compiled.observe(state, [0], rewards, step)
        found.append(float(compiled.table(state, 3)["priority"][0]))
    assert found == pytest.approx([0.5, 0.25, 0.25, 0.125, 0.1, 1.0])


# Pools and curriculum


def test_difficulty_pools_draw_by_the_last_group():
    n, weights = 12, {0.0: 0.3, 0.5: 1.0, 1.0: 0.1}
    compiled = make("difficulty_pools", 1, pool_weights="0.1,1,0.3")
    state, success = compiled.init(n), np.full(n, 0.5)
    for step, learned in enumerate([(1.0, 0.0), (0.0, 0.5), (0.5, 1.0)]):
        success[:8] = np.repeat(learned, 4)
        rewards = np.arange(GROUP) < GROUP * success[:8, None]
        state = compiled.observe(state, np.arange(8), rewards, step)
        want = np.array([weights[s] for s in success])
        np.testing.assert_allclose(compiled.table(state, n)["priority"], want)
        assert_fits(counted(compiled.draws(state, 5000), n), want)


def test_difficulty_pools_thresholds_belong_to_the_outer_pools():
    compiled = make("difficulty_pools", 1, easy_from=0.75, hard_to=0.25, pool_weights="0.1,1,0.3")
    rewards = (np.arange(GROUP) < np.arange(GROUP + 1)[:, None]).astype(float)
    found = compiled.table(compiled.observe(compiled.init(6), np.arange(5), rewards, 0), 6)
    np.testing.assert_allclose(found["priority"], [0.3, 0.3, 1.0, 0.1, 0.1, 1.0])


def window(difficulty, share, batch):
    """The easiest share of the prompts, NaN counting as hardest."""
    n = len(difficulty)
    order = sorted(range(n), key=lambda i: (math.isnan(difficulty[i]), difficulty[i] if difficulty[i] >= 0 else 0, i))
    return {i for rank, i in enumerate(order) if rank / n < max(share, batch / n)}


def test_the_curriculum_draws_from_the_easiest_share_only():
    n, steps = 47, 40
    difficulty = np.random.default_rng(1).integers(0, 30, n).astype(np.float32)
    difficulty[[3, 17, 30]] = np.nan
    compiled = make("curriculum", B, steps=steps, curriculum_start=0.2)
    state = compiled.init(n, PromptMetadata(jnp.zeros(n, jnp.int8), jnp.asarray(difficulty)))
    for step in range(steps):
        if step in (0, 1, 7, 13, 19, 20, 39):
            want = window(difficulty.tolist(), 0.2 + 0.8 * min(step / (steps // 2), 1), B)
            ids = compiled.draws(state, 500, step)
            assert set(ids.reshape(-1).tolist()) == want
            assert_even(counted(ids, n)[sorted(want)], B)
            assert bool(want & {3, 17, 30}) == (step >= 19)
        ids, weight, state = compiled.select(state, step)
        assert weight.tolist() == [1.0] * B
        state = compiled.observe(state, ids, half_right(ids), step)
    assert len(want) == n


def test_the_curriculum_ends_at_its_own_step():
    compiled = make("curriculum", B, curriculum_start=0.2, curriculum_steps=2)
    state, found = compiled.init(N, COLUMNS), []
    for step in range(3):
        found.append(int((compiled.table(state, N, step)["priority"] > 0).sum()))
        _, state = run_steps(compiled, state, 1, start=step)
    assert found == [8, 24, 40]


def test_the_curriculums_window_holds_a_batch():
    n, b = 20, 8
    compiled = make("curriculum", b, curriculum_start=0.05)
    difficulty = np.random.default_rng(2).permutation(n)
    ids = compiled.draws(
        compiled.init(n, PromptMetadata(jnp.zeros(n, jnp.int8), jnp.asarray(difficulty, jnp.float32))), 100
    )
    assert (np.sort(difficulty[ids], axis=1) == np.arange(b)).all()


def test_the_curriculums_window_holds_a_batch_of_changed_data():
    b = 8
    compiled = make("curriculum", b, curriculum_start=0.05)
    large, small = (
        compiled.init(n, PromptMetadata(jnp.zeros(n, jnp.int8), jnp.arange(n, dtype=jnp.float32))) for n in (120, 20)
    )
    ids = compiled.draws(compiled.selector.follow(large, small, jnp.arange(20)), 100)
    assert (np.sort(ids, axis=1) == np.arange(b)).all()


@pytest.mark.parametrize("metadata", [None, PromptMetadata(jnp.zeros(9, jnp.int8))])
def test_a_curriculum_without_difficulties_is_refused(metadata):
    with pytest.raises(ConfigError, match="difficulty"):
        make("curriculum", B).init(9, metadata)


# All of them


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "curriculum"])
def test_an_outcome_changes_the_next_draw(name):
    compiled = make(name, B, discount=0.0)
    state = compiled.init(N, COLUMNS)
    before, _, state = compiled.select(state, 0, seed=5)
    after, _, _ = compiled.select(compiled.observe(state, before, all_wrong(before), 0), 1, seed=5)
    assert set(before.tolist()) != set(after.tolist())


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "curriculum"])
def test_prompts_that_teach_nothing_are_drawn_less(name):
    compiled = make(name, B, discount=0.0)
    state = compiled.init(N, COLUMNS)
    for step in range(N // 2 // B):
        ids = B * step + np.arange(B)
        state = compiled.observe(state, ids, all_wrong(ids), step)
    drawn = np.stack([compiled.select(state, 5, seed)[0] for seed in range(200)])
    # Half would be chance; the standard error of the share is below .018.
    assert (drawn < N // 2).mean() < 0.42


def test_the_step_changes_what_the_curriculum_draws():
    compiled = make("curriculum", B)
    state = compiled.init(N, COLUMNS)
    early, _, _ = compiled.select(state, 0, seed=5)
    late, _, _ = compiled.select(compiled.observe(state, early, half_right(early), 60), 61, seed=5)
    hardness = np.asarray(COLUMNS.difficulty)
    assert hardness[early].max() < 0.2 * N <= hardness[late].max()


@pytest.mark.parametrize("name", slow_except(["pps", "prioritized_replay", "mopps", "greso"], sorted(SCORERS)))
def test_without_information_all_prompts_are_drawn_alike(name):
    compiled = make(name, B, discount=0.0)
    state = compiled.init(N, COLUMNS)
    # Every prompt is visited once, so that no prompt lacks a visit; from step 50 the curriculum holds all prompts.
    for step in range(40, 50):
        ids = B * (step - 40) + np.arange(B)
        state = compiled.observe(state, ids, half_right(ids), step)
    drawn, _ = run_steps(compiled, state, 400, start=50)
    visits = counted(drawn, N)
    if name in ("uniform", "greso", "prioritized_replay", "posterior_mixed"):
        assert (visits == 400 * B // N).all()
    else:
        assert_even(visits, B)


@pytest.mark.parametrize("name", SCORERS)
def test_a_run_resumes_exactly(name):
    compiled, rewards = make(name, B, discount=0.0), random_rewards(3)
    _, state = run_steps(compiled, compiled.init(N, COLUMNS), 7, rewards)
    saved = jax.tree.map(jnp.asarray, jax.device_get(state))
    once, again = (run_steps(compiled, s, 8, half_right_only(range(15)), start=7)[0] for s in (state, saved))
    np.testing.assert_array_equal(once, again)


# Reports


@pytest.fixture(scope="module")
def history():
    """A run of pps with gaps and cooldown, and the same in NumPy."""
    compiled = make("pps", B, cooldown=2, max_unjudged=1, floor=0.1)
    rewards, state = random_rewards(4, missing=0.3), compiled.init(N)
    table = {
        "visits": np.zeros(N, int),
        "last_step": np.full(N, -1),
        "success": np.full(N, np.nan),
        "priority": np.ones(N),
    }
    for step in range(12):
        ids, _, state = compiled.select(state, step)
        before = {name: values.copy() for name, values in table.items()}
        shown = compiled.selector.batch_metrics(state, jnp.asarray(ids), jnp.int32(step))
        seen = rewards(ids, step)
        state = compiled.observe(state, ids, seen, step)
        judged = ~np.isnan(seen[:, 0])
        table["visits"][ids] += 1
        table["last_step"][ids] = step
        table["success"][ids[judged]] = seen[judged].mean(1)
        table["priority"][ids[judged]] = np.abs(np.asarray(outcome(seen).raw_advantages)[judged, -1]) + 0.1
    return compiled, state, table, before, ids, shown


def test_the_table_is_what_happened(history):
    compiled, state, table, *_ = history
    found = compiled.selector.to_table(state, jnp.int32(12))
    for name, want in table.items():
        np.testing.assert_allclose(np.asarray(found[name])[:N], want, rtol=1e-5)
    assert np.isnan(np.asarray(found["priority"])[N:]).all()


def test_the_summary_is_of_all_prompts_and_no_padding(history):
    compiled, state, table, *_ = history
    found = compiled.selector.summary(state, jnp.int32(12))
    excluded = (table["visits"] >= 1) & np.isnan(table["success"])
    resting = (table["visits"] > 0) & (table["last_step"] >= 10) & ~excluded
    able = ~excluded & ~resting
    share = table["priority"][able] / table["priority"][able].sum()
    entropy = -(share * np.log(share)).sum()
    want = {
        "priority_entropy": entropy,
        "effective_prompts": np.exp(entropy),
        "never_seen": (table["visits"] == 0).mean(),
        "visits_mean": 12 * B / N,
        "visits_max": table["visits"].max(),
        "eligible": able.sum(),
        "resting": resting.sum(),
        "excluded": excluded.sum(),
    }
    assert excluded.any() and resting.any() and (table["visits"] == 0).any()
    scalars = {name: float(x) for name, x in found.items() if name.startswith("selection/")}
    assert scalars == pytest.approx({f"selection/{name}": x for name, x in want.items()}, rel=1e-5)
    for name in ("priority", "visits"):
        counts, edges = (np.asarray(found[name][x]) for x in ("counts", "edges"))
        assert counts.sum() == N
        assert (edges[0], edges[-1]) == pytest.approx((table[name].min(), table[name].max()), rel=1e-5)
        # In places of the values, not of bins: rounding may move a value that is an edge to the bin below.
        assert np.repeat(edges[:-1], counts) == pytest.approx(np.sort(table[name]), abs=1.01 * (edges[1] - edges[0]))


def test_the_description_is_of_the_batch_before_its_visit(history):
    _, _, _, before, ids, shown = history
    visits, last = before["visits"][ids], before["last_step"][ids]
    want = {
        "new": (visits == 0).mean(),
        "reuse": visits.mean(),
        "age": (11 - last)[visits > 0].mean() if visits.any() else 0,
        "not_eligible": 0,
        "distinct": B,
    }
    assert {k: float(x) for k, x in shown.items()} == pytest.approx({f"selection/{k}": x for k, x in want.items()})


def test_reports_count_pools():
    compiled = make("prioritized_replay", B, discount=0.0)
    state = compiled.observe(compiled.init(N), [0, 1, 2, 3], [[1] * 4, [0] * 4, [1, 1, 1, 1], [0, 1, 1, 1]], 0)
    found = compiled.selector.summary(state, jnp.int32(1))
    sizes = [float(found[f"selection/pool_{name}"]) for name in ("ranked", "solved", "unsolved")]
    assert sizes == [N - 3, 2, 1]
    shown = compiled.selector.batch_metrics(state, jnp.array([0, 1, 3, 9]), jnp.int32(1))
    assert [float(shown[f"selection/from_{name}"]) for name in ("ranked", "solved", "unsolved")] == [2, 1, 1]
