"""Settings of carry-over that contradict each other are refused in one line."""

import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate

CARRY = {"rollout.carry": True, "rollout.budget": 16}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rollout.budget": 16}, "rollout.budget=16: rollout.carry=False does not read it; drop it, or set"),
        ({"rollout.carry": True}, "rollout.budget=None: rollout.carry=true needs it; set it, such as 15"),
        (CARRY | {"algorithm.name": "dapo"}, "rollout.dynamic_sampling_rounds=10: cannot be used with rollout.carry"),
        (
            CARRY | {"algorithm.name": "popo"},
            "replay.name=popo: cannot be used with rollout.carry=true; set it to",
        ),
        (CARRY | {"replay.name": "aper"}, "replay.name=aper: cannot be used with rollout.carry=true"),
        (CARRY | {"rollout.slots": 8}, "rollout.slots=8: cannot be used with rollout.carry=true; leave it out"),
        (CARRY | {"rollout.chunks": 2}, "rollout.chunks=2: cannot be used with rollout.carry=true; leave it out"),
        (
            CARRY | {"task.name": "segments"},
            "task.name=segments: cannot be used with rollout.carry=true; choose a",
        ),
        ({"loss.old_log_probs": "interpolated"}, "loss.old_log_probs=interpolated: is for tokens that rollout.carry"),
        (
            CARRY | {"loss.old_log_probs": "interpolated", "loss.off_policy": "coupled"},
            "loss.off_policy=coupled: cannot be used with loss.old_log_probs=interpolated; set decoupled",
        ),
        (
            CARRY | {"loss.old_log_probs": "interpolated", "loss.ess_scaling": "sqrt"},
            "loss.ess_scaling=sqrt: cannot be used with loss.old_log_probs=interpolated; set none",
        ),
    ],
)
def test_what_carry_over_cannot_serve_is_refused(fields, says):
    with pytest.raises(ConfigError) as refused:
        validate(replace(Config(), fields))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rollout.budget": 31},
        {"algorithm.name": "pspo", "loss.importance": "sequence_mask"},
        {"loss.off_policy": "coupled"},
        {"loss.old_log_probs": "interpolated"},
        {"loss.old_log_probs": "trainer", "loss.ess_scaling": "sqrt"},
        {"loss.kl_coef": 0.01, "loss.minibatches": 2},
    ],
)
def test_what_carry_over_serves_is_accepted(fields):
    validate(replace(Config(), CARRY | fields))
