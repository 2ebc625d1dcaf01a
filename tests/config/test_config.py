"""Config: presets, overrides, YAML, help, and the schedule that follows from it."""

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.commands.train import main
from pspo_jax.config import command_line
from pspo_jax.config.defaults import flatten, replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.json_fields import mixture
from pspo_jax.config.presets import PRESETS, resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate
from pspo_jax.distributed.mesh import microbatch_size
from pspo_jax.selection import PromptMetadata
from pspo_jax.training.algorithm import build
from pspo_jax.training.optimizer import schedule
from tests.conftest import REPO

RECIPES = REPO / "pspo_jax" / "recipes"


def parse(*argv):
    return command_line.parse(argv, "train", "")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_algorithm_builds(name):
    config = parse("--algorithm.name", name)
    assert config.algorithm.name == name
    assert None not in (config.selection.name, config.advantage.name, config.loss.name, config.loss.aggregation)
    zeros = np.zeros(40, np.int8)
    columns = PromptMetadata(zeros, np.zeros(40, np.float32), bins=zeros, features=np.zeros((40, 3), np.float32))
    assert build(config).selector.init(40, columns) is not None
    assert config.run.steps == 150


def test_dr_grpo_has_neither_std_nor_kl():
    config = parse("--algorithm.name", "dr_grpo")
    assert (config.advantage.scale, config.loss.aggregation, config.loss.kl_coef) == ("none", "dr_grpo", 0)
    assert (
        parse("--advantage.name", "group", "--advantage.scale", "none").advantage.scale == "none"
    )  # the word, not nothing


def test_flags_override_files_and_presets(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {steps: 9, fingerprint: true}\nselection: {name: null}\nalgorithm: {name: pspo}\n")
    config = parse("--config", str(path), "--run.steps", "4", "--advantage.name", "group")
    assert (config.run.steps, config.run.fingerprint) == (4, True)
    assert (config.selection.name, config.advantage.name) == ("pps", "group")


def test_saved_yaml_reads_back_as_itself(tmp_path):
    config = parse("--rollout.top_p", "0.9", "--run.fingerprint", "true")
    path = tmp_path / "config.yaml"
    path.write_text(command_line.to_yaml(config))
    assert parse("--config", str(path)) == config
    assert yaml.safe_load(path.read_text())["rollout"]["top_p"] == 0.9


def test_help_tells_every_fields_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in flatten(Config()):
        assert f"--{name}" in text
    assert "the divisor of the logits, in the sampler and in the trainer alike." in text


def test_print_config(capsys):
    assert main(["--run.print_config", "true"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"]["aggregation"] == "dapo"


@given(st.sampled_from(sorted(flatten(Config()))), st.one_of(st.integers(), st.floats(), st.none(), st.text()))
def test_any_value_is_accepted_or_refused_by_name(field, value):
    """validate never fails in another way than with a line that begins with a field's name."""
    try:
        validate(replace(Config(), {field: value}))
    except ConfigError as error:
        assert str(error).split("=")[0] in flatten(Config())


def test_equal_configs_are_one_key_of_a_dict():
    ways = [replace(replace(Config(), {"run.steps": 3}), {"loss.packing": True}), replace(Config(), {"run.steps": 3})]
    ways.append(replace(Config(), {"loss.packing": True, "run.steps": 3}))
    assert len(set(ways)) == 2


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match=r"run\.stepz"):
        replace(Config(), {"run.stepz": 1})
    assert resolve(Config()).selection.name == "pps"


def test_schedule():
    rate = schedule(Config().optimizer, 80)
    assert 0 < float(rate(0)) < float(rate(4)) < 8e-4
    assert float(rate(5)) == pytest.approx(8e-4)
    assert float(rate(80)) == pytest.approx(0.05 * 8e-4, rel=1e-3)


@given(st.integers(1, 300), st.integers(0, 300))
def test_microbatches_divide(rows, at_most):
    size = microbatch_size(rows, at_most)
    assert rows % size == 0 and size <= (at_most or rows)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    words = ["--model.source", "x"] if path.stem == "reasoning_gym" else []
    config = parse("--config", path.stem, *words)
    header = path.read_text().partition("\nrun:")[0]
    assert f"--config {path.stem}" in header  # the command
    for part in ("# Command: ", "# Hardware: ", "# Time: ", "# Result: "):
        assert header.count(part) == 1, part
    assert build(config) is not None


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "countdown") == parse("--config", str(RECIPES / "countdown.yaml"))
    (tmp_path / "countdown").write_text("run: {steps: 7}")
    assert parse("--config", "countdown").run.steps == 7  # a file goes before a recipe
    with pytest.raises(SystemExit):
        main(["--recipe", "own_data"])
    assert capsys.readouterr().out == (RECIPES / "own_data.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--config", "pspo_qwen_1p5b"),
            "--config pspo_qwen_1p5b: there is no file or recipe of this name; did you mean pspo_qwen25_math_1p5b or",
        ),
        (
            ("--config", "zzzz"),
            "--config zzzz: there is no file or recipe of this name; the recipes are countdown, grpo",
        ),
        (
            ("--config", "x/grpo.yaml"),
            "--config x/grpo.yaml: there is no such file; the package's recipe is --config grpo",
        ),
        (("--recipe", "gprpo"), "--recipe gprpo: there is no file or recipe of this name; did you mean grpo"),
        (("--recipe",), "--recipe: needs one name, and nothing else; the recipes are countdown, grpo"),
        (("--recipe", "grpo", "--run.steps", "2"), "--recipe: needs one name, and nothing else; the recipes are"),
    ],
)
def test_a_recipe_that_there_is_not_is_one_line_with_the_near_ones(words, says):
    with pytest.raises(ConfigError) as error:
        main(words)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_mixture_is_a_list_in_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {tokenizer: x}\ntask:\n  mixture:\n    - {name: countdown, weight: 0.25}\n"
        "    - {name: math, train_data: y.jsonl, heldout_prompts: 7}\n"
    )
    config = parse("--config", str(path))
    parts = mixture(config)
    assert [(part.task.name, weight) for part, weight in parts] == [("countdown", 0.25), ("math", 1.0)]
    assert parts[1][0].task.heldout_prompts == 7 and config.rollout.max_new_tokens == 1024
    path.write_text(command_line.to_yaml(config))
    assert parse("--config", str(path)) == config


@pytest.mark.parametrize("name", ["pspo_qwen25_math_1p5b", "pspo_qwen25_math_7b_lora"])
@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_recipes_of_real_models_take_every_algorithm(name, algorithm):
    words = ["--config", name, "--algorithm.name", algorithm]
    if algorithm == "maxrl":
        with pytest.raises(ConfigError, match=r"advantage\.name=maxrl: .* may give -1; drop the terms"):
            parse(*words)
        words += ["--reward.terms", "accuracy, format"]
    if algorithm not in ("pps", "pspo", "spo"):
        with pytest.raises(ConfigError, match=r"selection\.floor=1e-06: selection\.name=\w+ does not read it; drop it"):
            parse(*words)
        words += ["--selection.floor", "null"]
    config = parse(*words)
    assert config.algorithm.name == algorithm and build(config) is not None
    assert (config.loss.kl_coef, config.selection.exponent, config.advantage.alpha) == (0.04, 0.6, 0.99)
    assert config.selection.correction == 0.4 or config.selection.name != "pps"
    lora = name.endswith("lora")
    assert config.optimizer.learning_rate == (5e-6 if lora else 1e-6)
    assert (config.rollout.prompts, config.lora.rank, config.run.steps) == ((2, 32, 100) if lora else (8, 0, 50))
    assert config.model.param_dtype == ("bfloat16" if lora else "float32")


def test_text_tasks_have_their_own_defaults():
    text = ("--task.name", "gsm8k", "--task.train_data", "x", "--model.source", "y")
    assert parse().optimizer.learning_rate == 8e-4
    full = parse(*text)
    assert (full.optimizer.learning_rate, full.sft.steps, full.model.param_dtype) == (1e-6, 0, "float32")
    assert parse(*text, "--lora.rank=8").optimizer.learning_rate == 5e-6
    assert parse(*text, "--lora.rank", "8").model.param_dtype == "bfloat16"
    assert parse(*text, "--optimizer.learning_rate", "3e-5").optimizer.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.source", "x"], ["model.source=x", "uses the character tokenizer"]),
        (["--task.name", "gsm8k"], ["model.source=None", "needs a checkpoint"]),
        (["--task.name", "gsm8k", "--model.source", "x"], ["task.train_data=None"]),
        (["--task.name", "gsm8k", "--model.source", "x", "--task.train_data", "y", "--model.layers", "3"],
         ["model.layers=3", "the checkpoint model.source=x decides it"]),
        (["--task.name", "gsm8k", "--model.source", "x", "--task.train_data", "y", "--sft.steps", "3"],
         ["sft.steps=3", "sft.data"]),
        (["--task.name", "gsm8k", "--model.source", "x", "--task.train_data", "y", "--lora.targets", "q,wk"],
         ["lora.targets='q,wk'", "wk is not a projection"]),
        (["--lora.rank", "4"], ["lora.rank=4", "set model.source"]),
        (["--task.name", "segments", "--sft.data", "x.jsonl"], ["sft.data=x.jsonl", "drop it"]),
        (["--task.name", "segments", "--task.image_widths", "24,30"], ["task.image_widths='24,30'", "multiples of 8"]),
        (["--task.name", "segments", "--task.image_widths", "24,24"], ["task.image_widths='24,24'", "different"]),
        (["--task.image_widths", "32"], ["task.image_widths=32", "set task.name to segments"]),
        (["--eval.other_images", "true"], ["eval.other_images=True", "have no images"]),
        (["--task.train_prompts", "0"], ["task.train_prompts=0"]),
    ],
)  # fmt: skip
def test_settings_of_real_models_that_contradict(argv, words):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert all(word in str(error.value) for word in words), error.value
