"""Qwen2.5's tokenizer, whole and cut to 4,096 ranks: template, prefill, stop ids, padding, sizes."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rollout.sampler import make_sampler
from pspo_jax.rollout.token_loop import SamplingParams
from tests.conftest import DATA
from tests.helpers import random_prompts, tiny_config, tiny_policy

WHOLE, FOLDER = DATA / "tokenizers" / "qwen2.5", DATA / "tokenizers" / "qwen2.5-small"

TEXT_END, END, ENTRIES = 4096, 4098, 4118


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "t", copy_function=shutil.copyfile)


def load(folder, rows=None, **fields):
    config = tiny_config(task__name="gsm8k", model__tokenizer=str(folder), **fields)
    return load_tokenizer(config, None, rows)


def test_text_and_template():
    t = load(WHOLE)
    assert t.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert t.stop_ids == (151_645,) and t.pad_token_id == 151_643 and t.vocab_size == 151_665
    ids = t.prompt("2+2?", PromptConfig(system="Be brief.", prefill="<think>\n"))
    assert t.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert t.prompt("2+2?", PromptConfig())[:2] == t.encode("<|im_start|>system")
    assert t.prompt("2+2?", PromptConfig(template="none")) == t.encode("2+2?")
    assert t.completion_text([*t.encode("4"), 151_645]) == "4"


def test_thinking_reaches_the_template(folder):
    t = load(folder)
    t.hf.chat_template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}unset{% endif %}"
    seen = [t.decode(t.prompt("x", PromptConfig(thinking=value))) for value in (None, True, False)]
    assert seen == ["unset", "True", "False"]


def test_stop_ids_of_tokenizer_and_generation_config_together(folder):
    assert load(folder).stop_ids == (END,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TEXT_END, END]}))
    assert load(folder).stop_ids == (END, TEXT_END)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load(folder).stop_ids == (END, TEXT_END, 7)


def test_padding_is_a_special_token_or_a_stop_id(folder):
    assert load(folder).pad_token_id == TEXT_END
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder).pad_token_id == END
    t = load(folder)
    t.hf.pad_token_id = t.encode("!")[0]
    assert type(t)(t.hf, folder, (END,), len(t.hf)).pad_token_id == END


def test_rows_of_the_embedding_without_a_token_are_never_drawn(folder):
    t = load(folder, rows=4352)
    assert t.forbidden == tuple(range(ENTRIES, 4352)) and t.vocab_size == 4352
    model, params, _ = tiny_policy(vocab_size=40, forbidden=tuple(range(30, 40)))
    params["head"] = params["head"].at[:, 30:].add(5.0)  # the most probable ones, were they not forbidden
    sample = make_sampler(model, 8, 12, 0)
    settings = SamplingParams(1.0, 1.0, 0, jnp.array([-1]), 12)
    for seed in range(3):
        assert int(sample(params, random_prompts(4, 6), jax.random.key(seed), settings).tokens.max()) < 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 1000}, ["4,118 entries", "only 1,000 rows", "model.tokenizer="]),
        ({"eos": None, "template": "none"}, ["names an EOS token"]),
        ({"template": None}, ["prompt.template=chat", "use none"]),
        ({"broken": True}, ["cannot be read"]),
    ],
)
def test_bad_tokenizer_is_named(folder, change, words):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key, name in (("eos", "eos_token"), ("template", "chat_template")):
        if key in change:
            del settings[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if "broken" in change:
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError) as error:
        load(folder, change.get("rows"), **{"prompt__template": "none"} if change.get("template") else {})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_missing_folder():
    with pytest.raises(ConfigError, match=r"model\.tokenizer=/no/such: no such folder"):
        load("/no/such")
