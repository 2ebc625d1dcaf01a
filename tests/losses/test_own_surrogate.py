"""A user's own surrogate and estimator: they act, and are tried before anything is compiled; the page's code runs."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import SURROGATES as CONFIG_SURROGATES
from pspo_jax.config.unread_fields import is_read
from pspo_jax.config.validation import validate
from pspo_jax.losses.ratios import SURROGATES, SurrogateInputs
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.step import init_state, make_train_step
from tests.conftest import REPO
from tests.helpers import random_prompts, relative, tiny_config, tiny_policy

P, PAD, EOS = 9, 14, 13
PAGE = REPO / "docs" / "extending" / "loss.md"
MINE = """
import jax.numpy as jnp
from pspo_jax.losses import SurrogateTerms

def log_prob(inputs, config):
    return SurrogateTerms(inputs.advantages * inputs.log_probs)

def array(inputs, config):
    return inputs.ratio * inputs.advantages

def summed(inputs, config):
    return SurrogateTerms((inputs.ratio * inputs.advantages).sum())

def cut_by_row(inputs, config):
    return SurrogateTerms(inputs.ratio, clipped_low=(inputs.ratio < 1).any(axis=1))

def raises_attribute_error(inputs, config):
    return SurrogateTerms(inputs.rewards)

constant = 3
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on PYTHONPATH with `mine.py` and the page's modules."""
    (tmp_path / "mine.py").write_text(MINE)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        name = re.match(r'"""(\w+\.py)"""', code)
        assert name, code
        (tmp_path / name[1]).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("mine", "my_losses", "my_advantages"):
        sys.modules.pop(name, None)


@functools.cache
def rolled_out():
    """(model, params, rollouts, rewards) that every config trains on."""
    config = tiny_config()
    model, params, _ = tiny_policy(config)
    sample = make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, PAD)
    settings = SamplingParams.of(config.rollout, [EOS])
    rollouts = sample(params, random_prompts(config.rollout.prompts, P), jax.random.key(0), settings)
    return model, params, rollouts, ((rollouts.tokens % 2 == 0) & rollouts.mask).sum(-1) / rollouts.lengths


@functools.cache
def trained(**fields):
    """Weights and metrics after one step of two iterations."""
    config = tiny_config(algorithm__name="grpo", loss__num_iterations=2, **fields)
    model, params, rollouts, rewards = rolled_out()
    algorithm, optimizer = build(config), optax.sgd(5.0)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, algorithm, config, 40, P, jax.random.key(0))
    state, metrics = make_train_step(model, optimizer, algorithm, config)(state, rollouts, rewards)
    return state.params, metrics


@pytest.mark.slow
def test_an_own_surrogate_trains_as_the_packages_equal_one_does(modules):
    mine, metrics = trained(loss__surrogate="mine:log_prob", loss__microbatch_rows=8)
    same, _ = trained(loss__surrogate="reinforce", loss__microbatch_rows=8)
    # The update leaves out completions without an advantage for the package's surrogate alone.
    assert relative(mine, same) < 1e-6
    assert relative(mine, trained(loss__microbatch_rows=8)[0]) > 1e-4
    assert float(metrics["clip_ratio/region_mean"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent:f", "No module named 'absent'"),
        ("mine:absent", "has no attribute 'absent'"),
        ("mine:constant", "not a function"),
        ("mine:array", "return pspo_jax.losses.SurrogateTerms"),
        ("mine:summed", r"`value` has shape \[\].*return \[2, 3\] or \[2, 1\]"),
        ("mine:cut_by_row", r"`clipped_low` has shape \[2\].*return \[2, 3\]"),
        ("mine:raises_attribute_error", "AttributeError"),
    ],
)
def test_a_surrogate_that_cannot_serve_is_refused_before_it_is_compiled(modules, name, message):
    with pytest.raises(ConfigError, match=rf"loss\.surrogate={name}: .*{message}"):
        build(tiny_config(loss__surrogate=name))


def test_a_name_that_is_no_surrogate_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.surrogate='clap': choose one of .*clip"):
        validate(replace(Config(), {"loss.surrogate": "clap"}))


def test_an_own_surrogate_may_read_every_field_of_the_loss():
    fields = (
        "loss.ratio",
        "loss.clip_low",
        "loss.clip_high",
        "loss.delta",
        "loss.sapo_positive",
        "loss.vespo_negative",
    )
    config = resolve(replace(Config(), {"loss.surrogate": "mine:log_prob"}))
    assert all(is_read(field, config) for field in fields)
    config = resolve(replace(Config(), {"loss.surrogate": "reinforce"}))
    assert not any(is_read(field, config) for field in fields)


def test_the_command_line_takes_an_own_surrogate():
    argv = ["--loss.surrogate", "mine:log_prob", "--loss.clip_high", "0.5"]
    config = command_line.parse(argv, "train", "")
    assert (config.loss.surrogate, config.loss.clip_high) == ("mine:log_prob", 0.5)


def test_config_and_losses_name_the_same_surrogates():
    assert tuple(SURROGATES) == CONFIG_SURROGATES


def test_the_pages_surrogate_is_its_formula_and_trains(modules):
    from my_losses import quadratic

    ratio, advantages = jnp.array([[1.0, 1.5, 0.5]]), jnp.array([[-2.0]])
    inputs = SurrogateInputs(ratio, jnp.log(ratio), jnp.log(ratio), advantages, jnp.ones((1, 3), bool))
    config = tiny_config(loss__surrogate="my_losses:quadratic", loss__clip_high=0.25).loss
    terms = quadratic(inputs, config)
    np.testing.assert_allclose(terms.value, [[-2.0, -3.0 - 4 * 0.25, -1.0 - 4 * 0.25]])
    assert terms.clipped_low.tolist() == [[False, False, True]] and not terms.clipped_high.any()
    params, metrics = trained(loss__surrogate="my_losses:quadratic", loss__clip_high=0.01)
    assert relative(params, trained()[0]) > 1e-4
    assert float(metrics["clip_ratio/region_mean"]) > 0


def test_the_pages_estimator_is_its_formula_and_trains(modules):
    estimator = build(tiny_config(advantage__name="my_advantages:reinforce_plus_plus")).estimator
    rewards = np.array([[1.0, 0.0], [np.nan, 1.0]])
    advantages, state = estimator.estimate(estimator.init(40), jnp.arange(2), jnp.asarray(rewards))
    known = np.array([1.0, 0.0, 1.0])
    want = np.where(np.isnan(rewards), 0, (rewards - known.mean()) / (known.std() + 1e-4))
    np.testing.assert_allclose(advantages, want, rtol=1e-5)
    assert state == ()
    assert relative(trained(advantage__name="my_advantages:reinforce_plus_plus")[0], trained()[0]) > 1e-4


def test_the_pages_commands_are_accepted(modules):
    commands = re.findall(r"python -m pspo_jax\.train (.*?)\n```", PAGE.read_text().replace("\\\n", " "))
    assert len(commands) == 2
    for command in commands:
        build(command_line.parse(command.split(), "train", ""))
