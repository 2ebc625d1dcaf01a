"""Flags, files and `replace` give the same config and refuse the same values; files are read with care."""

import dataclasses
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.commands.train import main
from pspo_jax.config import command_line
from pspo_jax.config.defaults import COUNTDOWN_DEFAULTS, LORA_DEFAULTS, TEXT_DEFAULTS, flatten, replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig, TaskConfig
from pspo_jax.config.validation import validate

TEXT = {"task.name": "math", "task.train_data": "rows.jsonl", "model.source": "org/model"}


def parse(*argv):
    return command_line.parse(argv, "train", "")


def read(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse("--config", str(path))


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        (TEXT, TEXT_DEFAULTS),
        ({**TEXT, "lora.rank": 8}, TEXT_DEFAULTS | LORA_DEFAULTS),
        ({"task.name": "countdown"}, COUNTDOWN_DEFAULTS),
        ({"task.name": "countdown", "model.tokenizer": "x"}, TEXT_DEFAULTS),
        ({"task.mixture": '[{"name": "countdown"}]', "model.tokenizer": "x"}, TEXT_DEFAULTS),
    ],
)
def test_defaults_are_the_same_through_every_door(values, defaults, tmp_path):
    set_in_python = replace(Config(), values)
    assert {name: flatten(set_in_python)[name] for name in defaults} == defaults
    typed = parse(*[f"--{name}={value}" for name, value in values.items()])
    spaced = parse(*[word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))])
    from_file = read(tmp_path, "\n".join(f"{name}: {value!r}" for name, value in values.items()))
    one_by_one = Config()
    for name, value in values.items():
        one_by_one = replace(one_by_one, {name: value})
    assert typed == spaced == from_file == resolve(set_in_python) == resolve(one_by_one)


def test_a_config_made_by_hand_follows_its_task_too():
    made = Config(task=TaskConfig("math", train_data="x"), model=ModelConfig(source="y"), rollout=RolloutConfig(4))
    found = resolve(made)
    assert (found.rollout.prompts, found.rollout.max_new_tokens, found.optimizer.learning_rate) == (4, 1024, 1e-6)
    assert resolve(Config(optimizer=OptimizerConfig(b2=0.5))).optimizer.b2 == 0.5


def test_what_is_set_stays_and_the_rest_follows_when_the_task_changes():
    config = replace(Config(), {"rollout.prompts": 32, "optimizer.learning_rate": 8e-4})
    text = replace(config, TEXT)
    assert (text.rollout.prompts, text.optimizer.learning_rate, text.sft.steps) == (32, 8e-4, 0)
    back = replace(text, {"task.name": "arithmetic", "model.source": None, "task.train_data": None})
    assert flatten(back) == flatten(config)


def test_a_stage_that_is_replaced_by_hand_is_set():
    config = replace(Config(), TEXT)
    by_hand = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, prompts=32))
    assert resolve(by_hand).rollout.prompts == replace(by_hand, {"run.steps": 3}).rollout.prompts == 32
    assert resolve(by_hand).rollout.max_new_tokens == 1024


def test_the_program_prints_the_defaults_of_the_task(capsys):
    assert main([*[f"--{k}={v}" for k, v in TEXT.items()], "--run.print_config", "true"]) == 0
    assert "learning_rate: 1.0e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("run.steps", 3.5, "run.steps=3.5: must be a whole number"),
        ("run.steps", 3.0, "run.steps=3.0: must be a whole number"),
        ("run.steps", "3", "run.steps='3': must be a whole number"),
        ("run.steps", True, "run.steps=True: must be a whole number"),
        ("run.steps", None, "run.steps=None: must have a value"),
        ("run.steps", np.float32(2), "run.steps=2.0: must be a whole number"),
        ("run.steps", 2**40, f"run.steps={2**40}: must be at most"),
        ("lora.rank", 2.5, "lora.rank=2.5: must be a whole number"),
        ("run.fingerprint", 1, "run.fingerprint=1: must be true or false"),
        ("run.fingerprint", "true", "run.fingerprint='true': must be true or false"),
        ("loss.packing", 0, "loss.packing=0: must be true or false"),
        ("optimizer.learning_rate", "1e-3", "optimizer.learning_rate='1e-3': must be a number"),
        ("optimizer.learning_rate", math.nan, "optimizer.learning_rate=nan: must be a finite number"),
        ("optimizer.learning_rate", -math.inf, "optimizer.learning_rate=-inf: must be a finite number"),
        ("optimizer.learning_rate", 10**400, "is too large for a number"),
        ("optimizer.learning_rate", [1e-3], "must be a number"),
        ("optimizer.b1", 1.0, "optimizer.b1=1.0: must be less than 1.0"),
        ("optimizer.b2", 1, "optimizer.b2=1.0: must be less than 1.0"),
        ("sft.b2", 1.0, "sft.b2=1.0: must be less than 1.0"),
        ("run.dir", True, "run.dir=True: must be text; put it in quotes"),
        ("run.dir", 7, "run.dir=7: must be text; put it in quotes"),
        ("run.dir", ["a"], "must be text"),
        ("run.dir", " ", "run.dir=' ': must name a file or folder"),
        ("run.dir", "a\nb", "contains a control character"),
        ("run.dir", "a\udcffb", "contains bytes that are not UTF-8 text"),
        ("run.dir", "~nobody-of-this-name/x", "this home folder does not exist"),
        ("task.name", "maths", "task.name='maths': choose one of"),
        ("task.name", ("math",), "task.name=('math',): must be text"),
        ("loss.name", "dappo", "did you mean dapo?"),
        ("task.mixture", {"name": object()}, "cannot be written as JSON"),
        ("verifier.deadline", 1e300, "verifier.deadline=1e+300: must be at most 86400"),
        ("mesh.data", 0, "mesh.data=0: must be at least 1, or -1"),
        ("reward.cosine_right", "nan,1", "must be two finite numbers"),
        ("loss.vespo_positive", "inf,1", "loss.vespo_positive='inf,1'"),
        ("optimizer.warmup", 150, "optimizer.warmup=150: must be less than the 150 updates of run.steps=150"),
        ("sft.warmup", 3000, "sft.warmup=3000: must be less than sft.steps=3000"),
        ("task.numbers", "3,,4", "task.numbers='3,,4': has an empty entry"),
        ("task.numbers", "3,3", "task.numbers='3,3': 3 appears twice"),
        ("lora.targets", "q,,q", "lora.targets='q,,q': has an empty entry"),
        ("lora.targets", "q,q_proj", "q appears twice"),
        ("task.dataset", "a,", "task.dataset='a,': has an empty entry"),
        ("task.options", "[1]", "task.options='[1]': must be a JSON object"),
        ("task.prompt_column", "", "must not be empty"),
        ("distributed.coordinator", "host:99999", "must be host:port"),
    ],
)
def test_values_of_another_type_or_meaning_are_refused_in_one_line(field, value, words):
    with pytest.raises(ConfigError) as error:
        validate(replace(Config(), {field: value}))
    assert words in str(error.value) and field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reward.terms": "accuracy=0, format=0"}, "every weight is 0"),
        ({"reward.terms": "accuracy,,format"}, "'' is not a reward term"),
        ({"reward.terms": "overlong", "reward.overlong_cache": 2000}, "reward.overlong_cache=2000: must be at most"),
        ({"loss.kl_coef": 0.1, "loss.kl_in": "reward", "loss.kl_estimator": "k3+"}, "set k3"),
        ({"lora.rank": 4, "lora.targets": "q,,v"}, "lora.targets='q,,v': has an empty entry"),
    ],
)
def test_values_of_text_tasks_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ConfigError) as error:
        validate(replace(Config(), {**TEXT, **values}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "want"),
    [
        ("run.steps", np.int64(7), 7),
        ("optimizer.learning_rate", np.float64(0.5), 0.5),
        ("optimizer.learning_rate", jnp.float32(0.5), 0.5),
        ("optimizer.learning_rate", 1, 1.0),
        ("run.fingerprint", np.bool_(True), True),
        ("run.dir", pathlib.Path("a/b"), "a/b"),
        ("run.dir", "~/x", str(pathlib.Path.home() / "x")),
        ("lora.targets", ["q", "v"], "q,v"),
        ("task.numbers", (3, 4), "3,4"),
        ("task.numbers", 3, "3"),
        ("selection.pool_weights", [1, 0.5, 0], "1,0.5,0"),
        ("reward.terms", {"format": 1, "cosine": 2}, "format=1, cosine=2"),
        ("selection.quotas", {"math": 0.5}, "math=0.5"),
        ("task.options", {"max_animals": 5}, '{"max_animals": 5}'),
        ("task.mixture", [{"name": "math"}], '[{"name": "math"}]'),
    ],
)
def test_values_of_a_near_type_become_the_fields_own(field, value, want):
    found = flatten(replace(Config(), {field: value}))[field]
    assert found == want and type(found) is type(want)


def test_words_of_the_command_line():
    assert parse("--run.dir", "true").run.dir == "true"
    assert parse("--run.dir=None").run.dir == "None"
    assert parse("--mesh.data", "-1").mesh.data == -1
    assert parse("--optimizer.learning-rate", "1e-3", "--run.steps=9", "--run.steps", "8").run.steps == 8
    assert parse("--selection.replacement", "true", "--rollout.prompts", "8", "--task.train_prompts", "4")
    assert parse("--runtime.xla_flags", "--xla_dump_to=x").runtime.xla_flags == "--xla_dump_to=x"
    assert parse("--allow-data-change").task.allow_change


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run.steps"], "--run.steps: needs a value"),
        (["--run.steps", "--run.seed", "3"], "--run.steps: needs a value"),
        (["--config"], "--config: needs a value"),
        (["--config="], "--config: needs the name of a YAML file"),
        (["80"], "'80': is not a flag"),
        (["--run.stepz", "3"], "did you mean --run.steps?"),
        (["--selection.pool-weight", "1"], "did you mean --selection.pool_weights?"),
        (["--confg", "x"], "did you mean --config?"),
        (["--run.steps", "1e3"], "run.steps='1e3': must be a whole number"),
        (["--run.fingerprint", "yes"], "run.fingerprint='yes': must be true or false"),
        (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate='fast': must be a number"),
        (["--task.mixture", "[{}]", "--model.tokenizer", "x"], "lacks a name; add one of"),
        (["--task.mixture", "[{'name'", "--model.tokenizer", "x"], "must be a list of tasks"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_refused_in_one_line(words, message):
    with pytest.raises(ConfigError) as error:
        parse(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- run\n", "must be a mapping of stages"),
        ("steps\n", "must be a mapping of stages"),
        ("run: 3\n", "run=3: must be a mapping of fields"),
        ("run: {stepz: 3}\n", "run.stepz: there is no such field; did you mean run.steps?"),
        ("ruin: {steps: 3}\n", "ruin: there is no such stage; did you mean run?"),
        ("1: {steps: 3}\n", "1: there is no such stage"),
        ("run: {steps: 3, steps: 4}\n", "steps: appears twice in one mapping (line 1); keep one of them"),
        ("run: {steps: 3}\nrun: {seed: 4}\n", "run: appears twice in one mapping (line 2)"),
        ("run:\n\tsteps: 3\n", "not YAML: "),
        ("run: {dir: true}\n", "run.dir=True: must be text; put it in quotes"),
        ("run: {dir: 12:30:00}\n", "run.dir=45000: must be text; put it in quotes"),
        ("run: {dir: 2026-01-01}\n", "must be text; put it in quotes"),
        ("run: {steps: .nan}\n", "run.steps=nan: must be a finite number"),
        ("run: {steps: '9'}\n", "run.steps='9': must be a whole number"),
        ("run: {steps: }\n", "run.steps=None: must have a value"),
        ("run: {x: &a [*a]}\n", "run.x: there is no such field"),
        ("task: {mixture: &a [*a]}\n", "task.mixture"),
        ("run: !!python/object:os.system {}\n", "not YAML: "),
        (b"run: {dir: \xff}\n", "is not UTF-8 text (byte 11)"),
        (b"run: {dir: a\x00b}\n", "not YAML: "),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_file(text, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"--config {tmp_path / 'c.yaml'}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        parse("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        parse("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("---\n", {}),
        ("run:\n", {}),
        ("run:\nalgorithm: {name: grpo}\n", {"algorithm.name": "grpo"}),
        ("optimizer: {learning_rate: 1e-3}\n", {"optimizer.learning_rate": 1e-3}),
        ("optimizer: {learning_rate: 1}\n", {"optimizer.learning_rate": 1.0}),
        ("run.steps: 9\n", {"run.steps": 9}),
        ("run: &a {steps: 9}\n", {"run.steps": 9}),
        ("selection: {name: mopps, candidates: &n 4}\nrun: {steps: *n}\n", {"run.steps": 4, "selection.candidates": 4}),
        ("run: {<<: {steps: 9, seed: 1}, seed: 2}\n", {"run.steps": 9, "run.seed": 2}),
        ("\ufeffrun: {steps: 9}\n", {"run.steps": 9}),
        ("run: {dir: 'true'}\n", {"run.dir": "true"}),
    ],
)
def test_files_as_people_write_them_are_read(text, values, tmp_path):
    found = flatten(read(tmp_path, text))
    assert {name: found[name] for name in values} == values


def test_later_files_and_all_flags_override_whatever_their_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("run: {steps: 2, seed: 2}\n")
    second.write_text("run: {seed: 3}\n")
    found = parse("--run.steps", "4", "--config", str(first), f"--config={second}")
    assert (found.run.steps, found.run.seed) == (4, 3)


def test_help_tells_of_plan_config_and_their_precedence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "whatever.yaml", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("--plan [TARGET]", "--config FILE.yaml", "--allow-data-change", "flags override all files"):
        assert words in text
    for words in ("start here", "--help-all", "--run.dir PATH", "default: 0.0008; 1e-06 for text tasks"):
        assert words in text
    assert "--advantage.ddof" not in text and text.count("python -m pspo_jax.train --") == 2


def test_names_without_a_field_are_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"run\.stepz: there is no such field; did you mean run\.steps\?"):
        replace(Config(), {"run.stepz": 1})
    for name in ("given", "run", "", "run.steps.x", 3):
        with pytest.raises(ConfigError, match="there is no such field"):
            replace(Config(), {name: 1})
