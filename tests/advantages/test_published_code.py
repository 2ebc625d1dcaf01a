"""PSPO's published code, defects included: slots in place of prompts, its recursion, and weights of its own making."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import PRESETS, resolve
from pspo_jax.config.schema import Config
from pspo_jax.training.algorithm import build

ALPHA, EPS, EXPONENT, BETA, FLOOR = 0.3, 0.05, 0.6, 0.4, 1e-6


def published_code(variant="published_code", **fields):
    """The algorithm pspo on batches of three groups of four."""
    values = {
        "algorithm.name": "pspo",
        "algorithm.variant": variant,
        "rollout.prompts": 3,
        "rollout.group_size": 4,
        "selection.exponent": EXPONENT,
        "selection.correction": BETA,
        "selection.floor": FLOOR,
        "advantage.alpha": ALPHA,
        "advantage.eps": EPS,
    }
    return build(replace(Config(), values | {k.replace("__", "."): v for k, v in fields.items()}))


class PlainPublishedCode:
    """The published code as its formulas read, by slot of the batch."""

    def __init__(self):
        self.slots = {}

    def estimate(self, groups):
        return [self.visit(slot, rewards) for slot, rewards in enumerate(groups)]

    def visit(self, slot, rewards):
        values = [r for r in rewards if not math.isnan(r)]
        if len(values) < 2:
            return [0.0] * len(rewards)
        m, std = statistics.fmean(values), statistics.variance(values)
        if slot in self.slots:
            m_old, std_old = self.slots[slot]
            std = (1 - ALPHA) * std_old**2 + ALPHA * std + ALPHA * (1 - ALPHA) * (m - m_old) ** 2
            m = m_old + ALPHA * (m - m_old)
        self.slots[slot] = m, std
        a = [0.0 if math.isnan(r) else (r - m) / (std + EPS) for r in rewards]
        return [x * (abs(x) + FLOOR) ** -(EXPONENT * BETA) for x in a]


GROUPS = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, math.nan]), min_size=4, max_size=4), min_size=3, max_size=3
)
IDS = st.lists(st.integers(0, 8), min_size=3, max_size=3)
ESTIMATOR = published_code().estimator
ESTIMATE = jax.jit(ESTIMATOR.estimate)


@given(st.lists(st.tuples(IDS, GROUPS), min_size=1, max_size=6))
def test_published_code_equals_plain_python_by_slot(steps):
    state, plain = ESTIMATOR.init(9), PlainPublishedCode()
    for ids, groups in steps:
        got, state = ESTIMATE(state, jnp.asarray(ids), jnp.asarray(groups, jnp.float32))
        np.testing.assert_allclose(got, plain.estimate(groups), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", [{"advantage__stat_mode": "linear_std"}, {"advantage__alpha_mode": "count"}])
def test_modes_of_ers_are_refused_beside_the_published_recursion(setting):
    with pytest.raises(ConfigError, match=r"algorithm\.variant=published_code does not read it"):
        published_code(**setting)


def test_the_history_of_a_prompt_is_that_of_its_slot():
    rewards = jnp.array([[0.0, 0, 0, 1], [1.0, 1, 0, 1], [0.0, 1, 0, 1]])
    _, state = ESTIMATOR.estimate(ESTIMATOR.init(9), jnp.array([3, 4, 5]), rewards)
    same, _ = ESTIMATOR.estimate(state, jnp.array([5, 3, 4]), rewards)
    other, _ = ESTIMATOR.estimate(state, jnp.array([6, 7, 8]), rewards)
    np.testing.assert_array_equal(same, other)


def test_slots_stay_where_they_are_when_the_data_changes():
    _, state = ESTIMATOR.estimate(ESTIMATOR.init(9), jnp.arange(3), jnp.array([[0.0, 0, 0, 1]] * 3))
    followed = ESTIMATOR.follow(state, ESTIMATOR.init(500), jnp.full(500, -1))
    jax.tree.map(np.testing.assert_array_equal, followed, state)


@pytest.mark.parametrize(("variant", "centred"), [("paper", True), ("published_code", False)])
def test_advantages_of_a_group_sum_to_zero_without_the_defects_alone(variant, centred):
    advantage = published_code(variant).estimator
    got, _ = advantage.estimate(advantage.init(9), jnp.arange(3), jnp.array([[0.0, 0, 0, 1]] * 3))
    assert (np.abs(got.sum(1)) < 1e-4).all() == centred


def test_without_a_correction_advantages_are_not_weighted():
    advantage = published_code(selection__correction=0.0).estimator
    got, _ = advantage.estimate(advantage.init(9), jnp.arange(3), jnp.array([[0.0, 0, 0, 1]] * 3))
    np.testing.assert_allclose(got, [[-0.25 / 0.3] * 3 + [0.75 / 0.3]] * 3, rtol=1e-5)


@pytest.mark.parametrize(("variant", "alike"), [("paper", False), ("published_code", True)])
def test_loss_weights_are_one(variant, alike):
    selector = published_code(variant).selector
    state, ids = jax.jit(selector.init, static_argnums=0)(9), jnp.arange(3)
    advantages = jnp.array([[0.1] * 4, [1.0] * 4, [9.0] * 4])
    outcome = RolloutOutcome(jnp.tile(jnp.arange(4.0), (3, 1)), advantages, advantages)
    state = jax.jit(selector.observe)(state, ids, outcome, jnp.int32(0))
    select = jax.jit(selector.select, static_argnums=3)
    weights = [np.asarray(select(state, jax.random.key(i), jnp.int32(1), 3)[1]).tolist() for i in range(8)]
    assert all(weight == [1.0] * 3 for weight in weights) == alike


REFUSED = sorted(name for name in PRESETS if PRESETS[name]["advantage.name"] != "ers")


@pytest.mark.parametrize("name", REFUSED)
def test_published_code_is_refused_for_algorithms_without_ers(name):
    with pytest.raises(
        ConfigError,
        match=r"^algorithm\.variant=published_code: advantage\.name=\w+ does not read it.* set advantage\.name to ers$",
    ):
        command_line.parse(["--algorithm.name", name, "--algorithm.variant", "published_code"], "train", "")


@pytest.mark.parametrize("name", ["ers", "pspo"])
def test_published_code_is_taken_for_ers(name):
    config = command_line.parse(["--algorithm.name", name, "--algorithm.variant", "published_code"], "train", "")
    assert resolve(config).algorithm.variant == "published_code" and build(config) is not None
    with pytest.raises(ConfigError, match=r"advantage\.name=rloo"):
        command_line.parse(
            ["--algorithm.name", name, "--algorithm.variant", "published_code", "--advantage.name", "rloo"], "train", ""
        )
