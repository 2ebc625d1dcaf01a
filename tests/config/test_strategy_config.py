"""Settings of selectors and advantage estimators: refusals and their messages, and the fields that a name fills."""

import dataclasses
import math
import typing

import pytest

from pspo_jax.advantages import ESTIMATORS
from pspo_jax.config import command_line
from pspo_jax.config.defaults import flatten, replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import PRESETS, resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.unread_fields import BELIEFS, READ_WHEN
from pspo_jax.config.validation import validate
from pspo_jax.selection import SCORERS
from pspo_jax.training.algorithm import build, needs_policy_drift

SECTIONS = ("selection", "advantage", "forgetting")


def parse(*argv):
    return command_line.parse(argv, "train", "")


def flags(values):
    return [f"--{name}={value}" for name, value in values.items()]


SELECTOR, QUOTAS, POOLS = "selection.name", "selection.quotas", "selection.pool_weights"
RULE_QUOTAS, RULE_POOLS = "share in (0, 1], each task once, such as", "must be three numbers of at least 0"
WEIGHTED = "drop it, or set selection.name to pps, spo, difficulty_pools or curriculum"


@pytest.mark.parametrize(
    ("values", "begins", "fix"),
    [
        ({"selection.cooldown": -1}, "selection.cooldown=-1:", "must be at least 0"),
        ({"selection.exploration": 0.01}, "selection.exploration=0.01:", "at least 0.03125"),
        ({"replay.name": "ring"}, "replay.name='ring': choose one of", "filter"),
        ({"replay.max_share": 0}, "replay.max_share=0.0:", "must be greater than 0"),
        ({"replay.min_age": 4}, "replay.min_age=4:", "at most replay.max_age=3"),
        (
            {"rollout.oversampling": 2},
            "rollout.oversampling=2:",
            "rollout.dynamic_sampling_rounds=1 does not read it; drop it, or raise rollout.dynamic_sampling_rounds",
        ),
        (
            {"rollout.oversampling": 0.01, "rollout.dynamic_sampling_rounds": 2},
            "rollout.oversampling=0.01:",
            "has 0 prompts",
        ),
        (
            {"rollout.oversampling": 16, "algorithm.name": "dapo", "rollout.prompts": 64},
            "rollout.oversampling=16:",
            "512",
        ),
        (
            {"rollout.oversampling": 1.125, "rollout.dynamic_sampling_rounds": 2, "rollout.chunks": 8},
            "rollout.oversampling=1.125:",
            "rollout.chunks=8 must divide",
        ),
        ({"loss.name": "ppo"}, "loss.name='ppo': choose one of", "cispo"),
        ({"loss.delta": 1.2}, "loss.delta=1.2:", "1 + loss.clip_high = 1.28"),
        ({"loss.dual_clip": 1}, "loss.dual_clip=1:", "0 = off"),
        (
            {"loss.dual_clip": 3, "loss.name": "cispo"},
            "loss.dual_clip=3:",
            "set loss.surrogate to clip",
        ),
        ({"loss.delta": 3, "loss.name": "sapo"}, "loss.delta=3:", "set loss.surrogate to clip"),
        ({"loss.vespo_positive": "2"}, "loss.vespo_positive='2':", "such as 2,3"),
        ({"loss.vespo_negative": "2,0"}, "loss.vespo_negative='2,0':", "lambda greater than 0"),
        ({"loss.top_entropy": 0}, "loss.top_entropy=0.0:", "must be greater than 0"),
        (
            {"loss.off_policy": "coupled", "loss.old_log_probs": "trainer"},
            "loss.off_policy=coupled:",
            "loss.old_log_probs=sampler",
        ),
        ({"selection.exploration": 2}, "selection.exploration=2.0:", "must be at most 1.0"),
        ({"selection.max_unjudged": 128}, "selection.max_unjudged=128:", "must be at most 127"),
        ({"selection.floor": 0}, "selection.floor=0.0:", "must be greater than 0"),
        ({"selection.greso_floor": 0}, "selection.greso_floor=0.0:", "must be at least 0.001"),
        ({"selection.exponent": "nan"}, "selection.exponent=nan:", "must be a finite number"),
        ({"selection.correction": "inf"}, "selection.correction=inf:", "must be a finite number"),
        ({"selection.success_threshold": "nan"}, "selection.success_threshold=nan:", "must be a finite number"),
        ({"advantage.alpha": 0}, "advantage.alpha=0.0:", "must be greater than 0"),
        ({"advantage.ddof": 2}, "advantage.ddof=2:", "must be at most 1"),
        ({"forgetting.half_life": "inf"}, "forgetting.half_life=inf:", "must be a finite number"),
        ({"forgetting.prior_failures": 0}, "forgetting.prior_failures=0.0:", "must be greater than 0"),
        ({"forgetting.low": 0.97}, "forgetting.low=0.97:", "must be at most forgetting.high=0.96"),
        ({QUOTAS: "garbage"}, f"{QUOTAS}='garbage': 'garbage'", RULE_QUOTAS),
        ({QUOTAS: "math=x"}, f"{QUOTAS}='math=x': 'math=x'", RULE_QUOTAS),
        ({QUOTAS: "math=nan"}, f"{QUOTAS}='math=nan': 'math=nan'", RULE_QUOTAS),
        ({QUOTAS: "math=1.5"}, f"{QUOTAS}='math=1.5': 'math=1.5'", RULE_QUOTAS),
        ({QUOTAS: "math=0"}, f"{QUOTAS}='math=0': 'math=0'", RULE_QUOTAS),
        ({QUOTAS: "=0.5"}, f"{QUOTAS}='=0.5': '=0.5'", RULE_QUOTAS),
        ({QUOTAS: "math=0.2,math=0.3"}, f"{QUOTAS}='math=0.2,math=0.3': 'math=0.3'", RULE_QUOTAS),
        ({QUOTAS: "math=0.6,gsm8k=0.6"}, f"{QUOTAS}='math=0.6,gsm8k=0.6':", "sums to more than 1; lower a share"),
        ({POOLS: "easy"}, f"{POOLS}='easy':", RULE_POOLS),
        ({POOLS: "1,1"}, f"{POOLS}='1,1':", RULE_POOLS),
        ({POOLS: "1,-1,1"}, f"{POOLS}='1,-1,1':", RULE_POOLS),
        ({POOLS: "1,nan,1"}, f"{POOLS}='1,nan,1':", RULE_POOLS),
        ({POOLS: "1,inf,1"}, f"{POOLS}='1,inf,1':", RULE_POOLS),
        ({POOLS: "0,0,0"}, f"{POOLS}='0,0,0':", "not all 0"),
        ({SELECTOR: "uniform", "selection.correction_end": 0.5}, "selection.correction_end=0.5:", WEIGHTED),
        ({SELECTOR: "mopps", "selection.replacement": True}, "selection.replacement=True:", WEIGHTED),
        (
            {"selection.easy_from": 0.3, "selection.hard_to": 0.3},
            "selection.easy_from=0.3:",
            "must be greater than selection.hard_to=0.3",
        ),
        (
            {SELECTOR: "greso", "selection.difficulty_column": "level"},
            "selection.difficulty_column=level: selection.name=greso",
            "curriculum",
        ),
        ({SELECTOR: "best"}, "selection.name='best': choose one of", "mopps"),
        ({"advantage.name": "best"}, "advantage.name='best': choose one of", "tracked_baseline"),
        ({"algorithm.name": "best"}, "algorithm.name='best': choose one of", "posterior_mixed"),
    ],
    ids=lambda case: " ".join(flags(case)) if isinstance(case, dict) else "",
)
def test_bad_values_are_refused_in_one_line_with_the_fix(values, begins, fix):
    with pytest.raises(ConfigError) as error:
        parse(*flags(values))
    message = str(error.value)
    assert message.startswith(begins) and fix in message and "\n" not in message, message


@pytest.mark.parametrize(
    ("quotas", "words"),
    [
        ("maths=0.5", "there is no task 'maths'; the run's tasks are math, gsm8k"),
        ("math=1.0", "leaves nothing for gsm8k; name them too, or lower the shares"),
    ],
)
def test_quotas_must_fit_the_tasks(quotas, words):
    config = parse("--selection.quotas", quotas)
    with pytest.raises(ConfigError) as error:
        build(config, ("math", "gsm8k"))
    assert str(error.value) == f"selection.quotas={quotas!r}: {words}"


def numbers(kind):
    """Fields of the strategies whose type names `kind`."""
    for section in SECTIONS:
        stage = type(getattr(Config(), section))
        for name, hint in typing.get_type_hints(stage).items():
            if kind in (typing.get_args(hint) or (hint,)):
                yield f"{section}.{name}"


@pytest.mark.parametrize("field", [*numbers(float), *numbers(int)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(field, value):
    with pytest.raises(ConfigError) as error:
        validate(replace(Config(), {field: value}))
    assert str(error.value) == f"{field}={value}: must be a finite number"


@pytest.mark.parametrize("name", ["curriculum", "difficulty_pools", "spo", "pps"])
def test_options_of_selectors_that_draw_by_weight_are_taken(name):
    values = {SELECTOR: name, "selection.correction": 0.3, "selection.replacement": True}
    values |= {"selection.difficulty_column": "level"} if name == "curriculum" else {}
    config = parse(*flags(values))
    assert (config.selection.correction, config.selection.replacement) == (0.3, True)


def test_every_name_has_its_preset_and_its_selector():
    assert {preset["selection.name"] for preset in PRESETS.values()} == set(SCORERS)
    assert {preset["advantage.name"] for preset in PRESETS.values()} == set(ESTIMATORS)


FILLED = (
    "selection.name",
    "selection.cooldown",
    "selection.correction",
    "selection.floor",
    "advantage.name",
    "advantage.scale",
    "forgetting.mode",
    "loss.name",
    "loss.surrogate",
    "loss.ratio",
    "loss.aggregation",
    "loss.clip_low",
    "loss.clip_high",
    "replay.name",
    "rollout.dynamic_sampling_rounds",
)
OWN = {
    "selection.name": "curriculum",
    "selection.cooldown": 7,
    "selection.correction": 0.25,
    "selection.floor": 0.5,
    "advantage.name": "rloo",
    "advantage.scale": "batch",
    "forgetting.mode": "policy_drift",
    "loss.aggregation": "bnpo",
    "loss.surrogate": "sapo",
    "loss.ratio": "sequence_token",
    "loss.clip_low": 0.125,
    "loss.clip_high": 0.375,
    "replay.name": "filter",
    "rollout.dynamic_sampling_rounds": 3,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_fills_every_field_that_is_left_open_and_read(name):
    config = resolve(replace(Config(), {"algorithm.name": name}))
    values = flatten(config)
    unread = {field for field in FILLED if not all(condition.holds(config) for condition in READ_WHEN[field])}
    assert {field for field in FILLED if values[field] is None} == unread
    preset = PRESETS[name].items() - {(field, PRESETS[name].get(field)) for field in unread}
    assert {(field, values[field]) for field, _ in preset} == preset
    assert resolve(config) == config
    validate(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_users_value_wins_over_the_preset(name):
    base = flatten(resolve(replace(Config(), {"algorithm.name": name})))
    for field, value in OWN.items():
        values = flatten(resolve(replace(Config(), {"algorithm.name": name, field: value})))
        assert values[field] == value
        if field not in ("selection.name", "advantage.name", "loss.surrogate"):
            assert {f: v for f, v in values.items() if v != base[f]}.keys() <= {field}


def test_zero_is_a_users_value_too():
    config = parse("--algorithm.name=pps", "--selection.correction=0", "--selection.cooldown=0")
    assert (config.selection.correction, config.selection.cooldown) == (0.0, 0)
    config = parse("--algorithm.name=prioritized_replay", "--selection.cooldown=0")
    assert config.selection.cooldown == 0


DEFAULTS = {name: (0, None, None) for name in SCORERS} | {
    "pps": (0, 0.4, 0.1),
    "prioritized_replay": (5, None, None),
    "posterior_mixed": (5, None, None),
    "spo": (0, 0.0, 0.05),
    "difficulty_pools": (0, 0.0, None),
    "curriculum": (0, 0.0, None),
}


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
@pytest.mark.parametrize("selector", sorted(SCORERS))
def test_defaults_of_a_selector_follow_its_name_whatever_the_algorithm(selector, algorithm):
    config = resolve(replace(Config(), {"algorithm.name": algorithm, "selection.name": selector}))
    s = config.selection
    assert (s.cooldown, s.correction, s.floor) == DEFAULTS[selector]
    assert config.advantage.name == PRESETS[algorithm]["advantage.name"]
    believes = selector in BELIEFS or config.advantage.name == "tracked_baseline"
    assert config.forgetting.mode == (None if not believes else "policy_drift" if selector == "spo" else "fixed")


def test_defaults_of_a_selector_reach_the_command_line():
    config = parse("--algorithm.name", "grpo", "--selection.name", "prioritized_replay")
    assert (config.selection.cooldown, config.advantage.scale) == (5, "group")
    again = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, name="spo"))
    assert resolve(again) == again  # a resolved config does not change with the algorithm's name


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"algorithm.name": "spo"}, True),
        ({"algorithm.name": "spo", "forgetting.mode": "fixed"}, False),
        ({"algorithm.name": "mopps"}, False),
        ({"algorithm.name": "mopps", "forgetting.mode": "policy_drift"}, True),
        ({"algorithm.name": "grpo", "forgetting.mode": "policy_drift"}, False),
        ({"algorithm.name": "grpo", "forgetting.mode": "policy_drift", "advantage.name": "tracked_baseline"}, True),
        ({"algorithm.name": "pspo", "advantage.alpha_mode": "policy_drift"}, True),
        ({"algorithm.name": "pps", "advantage.alpha_mode": "policy_drift"}, False),
    ],
)
def test_policy_drift_is_measured_only_where_a_strategy_asks_for_it(values, needed):
    assert needs_policy_drift(replace(Config(), values)) == needed
