"""A field that is set and that the run does not read is refused, in one line, through every door."""

from pathlib import Path

import pytest
import yaml

from pspo_jax.advantages import ESTIMATORS
from pspo_jax.config import command_line
from pspo_jax.config.defaults import flatten, replace, uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import LOSSES, PRESETS, resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import ESTIMATORS as CONFIG_ESTIMATORS
from pspo_jax.config.strategies import REPLAYS as CONFIG_REPLAYS
from pspo_jax.config.strategies import SELECTORS as CONFIG_SELECTORS
from pspo_jax.config.unread_fields import _BY_ESTIMATOR, _BY_SELECTOR, READ_WHEN
from pspo_jax.config.validation import validate
from pspo_jax.replay import REPLAYS
from pspo_jax.selection import SCORERS
from pspo_jax.training.algorithm import build

TEXT = {"task.name": "math", "task.train_data": "rows.jsonl", "model.tokenizer": "x"}
UNREAD = [
    ({"advantage.scale": "group"}, "advantage.name=ers"),
    ({"advantage.scale": "none", "algorithm.name": "ers"}, "advantage.name=ers"),
    ({"advantage.alpha": 0.5, "algorithm.name": "grpo"}, "advantage.name=group"),
    ({"advantage.alpha": 0.5, "advantage.alpha_mode": "count"}, "advantage.alpha_mode=count"),
    ({"advantage.alpha_mode": "count", "algorithm.name": "spo"}, "advantage.name=tracked_baseline"),
    ({"advantage.stat_mode": "linear_std", "algorithm.name": "rloo"}, "advantage.name=rloo"),
    ({"advantage.stat_mode": "linear_std", "algorithm.variant": "published_code"}, "algorithm.variant=published_code"),
    ({"advantage.alpha_mode": "count", "algorithm.variant": "published_code"}, "algorithm.variant=published_code"),
    ({"advantage.eps": 0.1, "algorithm.name": "dr_grpo"}, "advantage.scale=none"),
    ({"advantage.ddof": 0, "algorithm.name": "spo"}, "advantage.name=tracked_baseline"),
    ({"selection.exponent_end": 0.1, "algorithm.variant": "published_code"}, "algorithm.variant=published_code"),
    ({"selection.exponent": 0.9, "algorithm.name": "grpo"}, "selection.name=uniform"),
    ({"selection.statistic": "mean", "algorithm.name": "spo"}, "selection.name=spo"),
    ({"selection.signal": "smoothed", "algorithm.name": "greso"}, "selection.name=greso"),
    ({"selection.floor": 0.5, "algorithm.name": "mopps"}, "selection.name=mopps"),
    ({"selection.initial": 0.5, "algorithm.name": "curriculum"}, "selection.name=curriculum"),
    ({"selection.retest_every": 3}, "selection.name=pps"),
    ({"selection.retest_every": 3, "selection.name": "prioritized_replay", "selection.retest_share": 0}, "share=0"),
    ({"selection.estimate": "last"}, "selection.name=pps"),
    ({"selection.bins": "task"}, "selection.name=pps"),
    ({"selection.bins": "difficulty", "algorithm.name": "spo"}, "selection.name=spo"),
    ({"selection.bins": "task", "selection.name": "prioritized_replay", "selection.estimate": "last"}, "estimate=last"),
    ({"selection.difficulty_column": "level", "algorithm.name": "mopps", "selection.bins": "task"}, "bins=task"),
    ({"selection.predictor": "hidden_states"}, "selection.name=pps"),
    ({"forgetting.shared_steps": 5.0, "algorithm.name": "mopps"}, "selection.predictor=none"),
    ({"selection.draw": "thompson"}, "selection.name=pps"),
    ({"selection.candidates": 3, "algorithm.name": "posterior_mixed"}, "selection.draw=expected"),
    ({"selection.greso_base": 0.1}, "selection.name=pps"),
    ({"selection.pool_weights": "1,1,1", "algorithm.name": "grpo"}, "selection.name=uniform"),
    ({"selection.curriculum_steps": 9}, "selection.name=pps"),
    ({"selection.difficulty_column": "level", "algorithm.name": "greso"}, "selection.name=greso"),
    ({"selection.correction": 0.4, "algorithm.name": "prioritized_replay"}, "selection.name=prioritized_replay"),
    ({"replay.max_age": 9}, "replay.name=none"),
    ({"replay.order": "random", "algorithm.name": "grpo_filter"}, "replay.name=filter"),
    ({"replay.memory": "pinned_host", "algorithm.name": "dapo"}, "replay.name=none"),
    ({"replay.ess_floor": 0.5}, "replay.name=none"),
    ({"replay.tau": 3.0, "algorithm.name": "popo"}, "replay.order=newest"),
    ({"replay.effective": "advantages"}, "replay.name=none"),
    ({"loss.off_policy": "ignored"}, "rollout.dynamic_sampling_rounds=1"),
    ({"loss.importance": "token_mask"}, "replay.name=none"),
    ({"loss.ess_scaling": "sqrt"}, "replay.name=none"),
    ({"loss.ess_scaling": "linear", "algorithm.name": "popo", "loss.off_policy": "coupled"}, "policy=coupled"),
    ({"loss.importance_cap": 3.0, "algorithm.name": "popo", "loss.off_policy": "ignored"}, "policy=ignored"),
    ({"loss.importance_cap": 3.0, "algorithm.name": "popo", "loss.name": "vespo"}, "surrogate=vespo"),
    ({"loss.clip_low": 0.1, "loss.name": "cispo"}, "loss.surrogate=cispo"),
    ({"loss.clip_high": 0.1, "loss.name": "sapo"}, "loss.surrogate=sapo"),
    ({"loss.clip_high": 0.1, "loss.name": "vespo"}, "loss.surrogate=vespo"),
    ({"loss.ratio": "sequence", "loss.name": "reinforce"}, "loss.surrogate=reinforce"),
    ({"loss.sapo_positive": 2.0}, "loss.surrogate=clip"),
    ({"loss.vespo_negative": "2,2", "loss.name": "sapo"}, "loss.surrogate=sapo"),
    ({"loss.count_masked": False}, "loss.aggregation=dapo"),
    ({"loss.kl_unbiased": False}, "loss.kl_coef=0"),
    ({"loss.kl_unbiased": False, "loss.kl_coef": 0.1, "loss.kl_in": "reward"}, "loss.kl_in=reward"),
    ({"loss.kl_in": "reward"}, "loss.kl_coef=0"),
    ({"loss.kl_estimator": "k1"}, "loss.kl_coef=0"),
    ({"loss.share_prompts": True, "loss.packing": False}, "loss.packing=False"),
    ({"rollout.slots": 256}, "at most 256 completions"),
    ({"rollout.slots": 64, "rollout.chunks": 4}, "at most 64 completions"),
    ({"rollout.longest_first": True}, "rollout.slots=None"),
    ({"rollout.oversampling": 2.0}, "rollout.dynamic_sampling_rounds=1"),
    ({"rollout.weights": "split", "mesh.fsdp": 1}, "mesh.fsdp=1"),
    ({"lora.alpha": 3.0}, "lora.rank=0"),
    ({"lora.dropout": 0.1}, "lora.rank=0"),
    ({"lora.targets": "q"}, "lora.rank=0"),
    ({"sft.steps": 0, "sft.batch": 3}, "sft.steps=0"),
    ({"sft.steps": 0, "sft.share": not Config().sft.share}, "sft.steps=0"),
    ({"forgetting.discount": 0.5}, "selection.name=pps"),
    ({"forgetting.mode": "policy_drift"}, "advantage.name=ers"),
    ({"forgetting.discount": 0.5, "algorithm.name": "spo"}, "forgetting.mode=policy_drift"),
    ({"forgetting.half_life": 0.5, "algorithm.name": "mopps"}, "forgetting.mode=fixed"),
    (
        {"forgetting.shrinkage": 0.5, "selection.name": "pps", "advantage.name": "tracked_baseline"},
        "selection.name=pps",
    ),
    (
        {"forgetting.shrinkage": 0.5, "algorithm.name": "prioritized_replay", "selection.estimate": "last"},
        "estimate=last",
    ),
    ({"task.train_data": "x"}, "task.name=arithmetic"),
    ({"task.difficulty_column": "x", "task.strata": "0=1"}, "task.name=arithmetic"),
    ({**TEXT, "task.difficulty_column": "x"}, "task.strata='' does not read it"),
    ({"task.numbers": "3"}, "task.name=arithmetic"),
    ({"task.function": "a:b"}, "task.name=arithmetic"),
    ({"task.cache": "x"}, "task.name=arithmetic"),
    ({**TEXT, "task.seed": 3}, "task.name=math"),
    ({**TEXT, "task.max_target": 9}, "task.name=math"),
    ({**TEXT, "task.choices_column": "options"}, "task.name=math"),
    ({**TEXT, "task.heldout_split": "dev"}, "task.heldout_data=None"),
    ({**TEXT, "prompt.template": "r1", "prompt.system": "open_r1"}, "prompt.template=r1"),
    ({**TEXT, "model.revision": "main"}, "model.source=None"),
    ({**TEXT, "reward.format": "open_rs"}, "reward.terms=accuracy"),
    ({**TEXT, "reward.cosine_right": "0,1"}, "reward.terms=accuracy"),
    (
        {**TEXT, "reward.terms": "cosine", "reward.variant": "published_code", "reward.cosine_length": 9},
        "variant=published_code",
    ),
    ({"prompt.system": "x"}, "task.name=arithmetic"),
    ({"verifier.deadline": 3.0}, "task.name=arithmetic"),
    ({"reward.require_end": False}, "task.name=arithmetic"),
    ({"model.source": "x"}, "task.name=arithmetic"),
    ({"optimizer.schedule": "constant", "optimizer.final_fraction": 0.5}, "optimizer.schedule=constant"),
    ({"distributed.processes": 2}, "distributed.coordinator=None"),
    ({"log.completions_every": 0, "log.completions": 2}, "log.completions_every=0"),
]  # fmt: skip


def words_of(values):
    return [f"--{name}={value}" for name, value in values.items()]


def test_every_field_has_its_conditions():
    """A new field must be added to READ_WHEN with the conditions under which it is read."""
    assert set(READ_WHEN) == set(flatten(Config()))


def test_selectors_and_estimators_read_fields_that_exist():
    for table, stage, strategies in ((_BY_SELECTOR, "selection", SCORERS), (_BY_ESTIMATOR, "advantage", ESTIMATORS)):
        assert set(table) == set(strategies)
        assert {f"{stage}.{name}" for reads in table.values() for name in reads} <= set(flatten(Config()))


@pytest.mark.parametrize(
    ("values", "reason"), UNREAD, ids=lambda case: " ".join(case) if isinstance(case, dict) else ""
)
def test_a_field_that_nothing_reads_is_refused_through_every_door(values, reason, tmp_path):
    messages = []
    for door in ("flags", "file", "python"):
        with pytest.raises(ConfigError) as error:
            if door == "flags":
                command_line.parse(words_of(values), "train", "")
            elif door == "file":
                path = tmp_path / "c.yaml"
                path.write_text(yaml.safe_dump(values))
                command_line.parse(["--config", str(path)], "train", "")
            else:
                validate(replace(Config(), values))
        messages.append(str(error.value))
    assert len(set(messages)) == 1, messages
    (field,) = [name for name in values if messages[0].startswith(f"{name}=")]
    assert reason in messages[0] and "; drop it, or " in messages[0] and "\n" not in messages[0], messages[0]
    value = values[field]
    assert messages[0].startswith(f"{field}={value:g}:" if type(value) is float else f"{field}={value}:")


@pytest.mark.parametrize("values", [values for values, _ in UNREAD[:12]])
def test_building_strategies_refuses_unread_fields_too(values):
    with pytest.raises(ConfigError, match="drop it, or"):
        build(replace(Config(), values))


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_presets_set_nothing_that_is_not_read(name, loss):
    config = resolve(replace(Config(), {"algorithm.name": name, "loss.name": loss}))
    validate(config)
    plain = flatten(Config())
    for field, value in flatten(config).items():
        if value != plain[field]:
            assert all(condition.holds(config) for condition in READ_WHEN[field]), field


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_config_of_a_run_reads_back_as_itself(name, tmp_path):
    path = tmp_path / "config.yaml"
    for values in ({}, TEXT, {"loss.name": "reinforce"}, {"task.name": "countdown"}):
        config = command_line.parse(words_of({"algorithm.name": name, **values}), "train", "")
        path.write_text(command_line.to_yaml(config))
        assert command_line.parse(["--config", str(path)], "train", "") == config
        assert resolve(replace(Config(), flatten(config))) == config


def test_a_task_of_a_mixture_may_set_only_fields_that_it_reads():
    def parsed(*tasks, **values):
        config = replace(Config(), {"model.tokenizer": "x", "task.mixture": list(tasks), **values})
        validate(config)
        return config

    math, countdown = {"name": "math", "train_data": "x.jsonl"}, {"name": "countdown", "numbers": "3"}
    assert not uses_char_tokenizer(parsed(math, countdown))
    parsed(math, countdown, **{"task.max_target": 50, "task.answer_column": "gold", "task.seed": 3})
    with pytest.raises(ConfigError, match=r"task\.mixture: task\.numbers=3: task\.name=math does not read it"):
        parsed({**math, "numbers": "3"}, countdown)
    with pytest.raises(ConfigError, match=r"task\.choices_column=c: task\.name=math does not read it"):
        parsed(math, countdown, **{"task.choices_column": "c"})
    with pytest.raises(ConfigError, match=r"task\.name=math: task\.mixture=.* does not read it"):
        parsed(countdown, **{"task.name": "math"})


OWN_SELECTOR = "pspo_jax.selection.pps:pps"
OWN_ESTIMATOR = "pspo_jax.advantages.group:group"


def test_a_new_selector_estimator_and_algorithm_need_no_edit_of_the_package(monkeypatch):
    """A field names a function of any module, and a new strategy may read every field of its stage."""
    monkeypatch.setitem(
        PRESETS, "ours", {"selection.name": OWN_SELECTOR, "advantage.name": OWN_ESTIMATOR, "loss.name": "dapo"}
    )
    words = ["--algorithm.name", "ours", "--selection.exponent", "0.9", "--selection.replacement", "true"]
    config = command_line.parse([*words, "--advantage.scale", "none"], "train", "")
    assert (config.selection.name, config.advantage.name, config.selection.exponent) == (
        OWN_SELECTOR,
        OWN_ESTIMATOR,
        0.9,
    )
    assert build(config).selector.init(40) is not None
    with pytest.raises(ConfigError, match="did you mean ours"):
        command_line.parse(["--algorithm.name", "our"], "train", "")
    with pytest.raises(ConfigError, match=r"selection\.name=nowhere:f: No module named 'nowhere'"):
        build(command_line.parse(["--selection.name", "nowhere:f"], "train", ""))


def test_the_names_that_fields_take_are_those_of_the_tables():
    assert (set(CONFIG_SELECTORS), set(CONFIG_ESTIMATORS)) == (set(SCORERS), set(ESTIMATORS))
    assert set(CONFIG_REPLAYS) == set(REPLAYS)


def test_help_lists_what_the_tables_hold(capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["--help-all"], "train", "")
    text = capsys.readouterr().out
    assert "posterior_mixed" in text and "tracked_baseline" in text and str(Path("FILE.yaml")) in text
