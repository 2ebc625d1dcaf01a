"""Geometry3k as a benchmark: its columns and splits, sixteen samples of each problem with its image."""

from __future__ import annotations

import hashlib
import json

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.text import benchmark_prompts
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.evaluate import main as evaluate
from pspo_jax.evaluation.benchmarks import benchmark_source
from tests.conftest import DATA
from tests.data.made_images import problem_picture, write_splits
from tests.helpers import tiny_config
from tests.model.checkpoints import VOCABULARIES
from tests.model.visual_checkpoints import write_visual_policy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a visual policy, folder of data with a train, a validation and a test split)."""
    folder = tmp_path_factory.mktemp("geometry")
    write_visual_policy(folder / "source", layers=1)
    return folder / "source", write_splits(folder / "geometry3k", 3, 2, 5)


def words(source, data, out, *more):
    fields = ["--model", source, "--benchmarks", "geometry3k", "--data", f"geometry3k={data}", "--out", out]
    fields += ["--samples", 16, "--temperature", 0.6, "--top-p", 1, "--prompt.question", "geo3k", "--k", "1,16"]
    fields += ["--max-new-tokens", 4, "--verifier.workers", 1, "--task.cache", out.parent / "cache", *more]
    return [str(word) for word in fields]


def test_problems_are_those_of_the_test_split_with_their_images(made, tmp_path):
    source, data = made
    config = tiny_config(task__name="math", model__source=str(source), task__cache=str(tmp_path / "cache"))
    tokenizer = load_tokenizer(config, source, None)
    prompts = benchmark_prompts(benchmark_source("geometry3k", data, config), config, tokenizer, None, 0)
    assert list(prompts.answers) == [str(i % 7) for i in range(5, 10)] and list(prompts.images.first) == [*range(6)]
    assert prompts.images.keys == [hashlib.sha256(problem_picture(i)).hexdigest() for i in range(5, 10)]


@pytest.mark.slow
def test_sixteen_samples_of_each_problem_of_the_test_split(made, tmp_path):
    source, data = made
    assert evaluate(words(source, data, tmp_path / "out")) == 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "source" / "geometry3k.jsonl").read_text().splitlines()[1:]]
    assert [line["answer"] for line in lines] == [str(i % 7) for i in range(5, 10)]
    assert all(len(line["right"]) == len(line["completions"]) == 16 for line in lines)
    assert all("[image " in line["prompt"] and "You FIRST think" in line["prompt"] for line in lines)
    assert len({str(line["completions"]) for line in lines}) == 5
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| checkpoint | geometry3k |" in table and "Problems: 5; n, samples of each: 16." in table
    assert "pass@16" in table


def test_a_model_of_text_is_refused_by_name(made, tmp_path):
    from scripts.make_checkpoint import SHAPES, make

    small = DATA / "tokenizers" / "qwen2.5-small"
    fields = VOCABULARIES[small.name] | {"num_hidden_layers": 1, "hidden_size": 16}
    make(tmp_path / "text", SHAPES["tiny"] | fields, "float32", small, False)
    with pytest.raises(ConfigError, match=r"images, and model\.source=.* reads text alone") as error:
        evaluate(words(tmp_path / "text", made[1], tmp_path / "out"))
    assert "\n" not in str(error.value)
