"""Stop tokens, the one BOS, and odd chat templates, on small tokenizers in the form of every family."""

from __future__ import annotations

import dataclasses
import datetime
import json
import tempfile
from pathlib import Path

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig, RolloutConfig
from pspo_jax.config.text_fields import stop_texts
from pspo_jax.config.validation import validate
from pspo_jax.data.rendering import date_directives
from pspo_jax.data.tokenizer import load_tokenizer
from tests.data.small_tokenizer import CHATML, GEMMA, LLAMA, MISTRAL, PHI, SPECIAL, write_tokenizer
from tests.helpers import tiny_config


@pytest.fixture
def load(tmp_path):
    def make(template, rows=None, *, files=(), **fields):
        words = {k: v for k, v in fields.items() if "__" not in k}
        folder = tempfile.mkdtemp(dir=tmp_path)
        write_tokenizer(Path(folder), template, **words)
        for name, content in dict(files).items():
            (Path(folder) / name).write_text(json.dumps(content))
        config = tiny_config(
            task__name="gsm8k", model__tokenizer=folder, **{k: v for k, v in fields.items() if "__" in k}
        )
        return load_tokenizer(config, None, rows)

    return make


def texts(tokenizer):
    return [tokenizer.decode([i]) for i in tokenizer.stop_ids]


def refused(make):
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message, message
    return message


# --- what ends a completion ---


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (CHATML, ["<|im_end|>", "<eos>"]),
        (LLAMA, ["<|eot_id|>", "<eos>"]),
        (GEMMA, ["<end_of_turn>", "<eos>"]),
        (PHI, ["<|end|>", "<eos>"]),
        (MISTRAL, ["<eos>"]),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", ["<eos>"]),
    ],
)
def test_the_token_that_ends_a_turn_in_the_template_stops(template, stop, load):
    tokenizer = load(template)
    assert texts(tokenizer) == stop
    assert tokenizer.eos_token_id == tokenizer.stop_ids[0]  # ends a demonstration as the template does
    assert all(repr(text) in tokenizer.stop_line() for text in stop)


def test_a_template_of_plain_text_leaves_the_tokenizers_eos_first(load):
    assert texts(load(CHATML, prompt__template="none")) == ["<eos>", "<|im_end|>"]
    assert texts(load(None, prompt__template="r1")) == ["<eos>"]
    assert texts(load(None, prompt__template="qwen_math")) == ["<|im_end|>", "<eos>"]


def test_an_eos_is_not_needed_where_the_template_ends_its_turns(load):
    assert texts(load(CHATML, eos=None)) == ["<|im_end|>"]
    message = refused(lambda: load("{{ messages[0]['content'] }}", eos=None))
    assert "neither tokenizer, generation config nor template names an EOS token" in message


def test_ids_of_generation_config_and_config_are_added(load):
    files = {"generation_config.json": {"eos_token_id": [3, 4]}, "config.json": {"eos_token_id": 5}}
    tokenizer = load(CHATML, files=files)
    assert texts(tokenizer)[:2] == ["<|im_end|>", "<eos>"] and tokenizer.stop_ids[2:] == (3, 4, 5)


@pytest.mark.parametrize("value", ["2", [1, None], True, {"id": 2}, 1.5])
def test_an_eos_that_is_no_id_is_named(value, load):
    message = refused(lambda: load(CHATML, files={"generation_config.json": {"eos_token_id": value}}))
    assert "generation_config.json has eos_token_id=" in message and "must be" in message


@pytest.mark.parametrize(
    ("stop", "more"),
    [
        ("", []),
        (" ", []),
        ("<|user|>", ["<|user|>"]),
        ("<|user|>, <|assistant|>", ["<|user|>", "<|assistant|>"]),
        ('["\\n", ","]', ["\n", ","]),
        ("<eos>,#", ["#"]),
    ],
)
def test_more_tokens_that_stop(stop, more, load):
    assert texts(load(CHATML, rollout__stop=stop)) == ["<|im_end|>", "<eos>", *more]


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ("</answer>", "'</answer>' is not one token of the vocabulary but 9"),
        ("<|user|>,", "must be tokens separated by commas"),
        ('["<|user|>"', "is not a JSON list"),
        ("[1]", "must be tokens separated by commas, or a JSON list"),
        ('[""]', "must be tokens separated by commas, or a JSON list"),
    ],
)
def test_what_is_not_one_token_is_refused(stop, words, load):
    message = refused(lambda: load(CHATML, rollout__stop=stop))
    assert message.startswith(f"rollout.stop={stop!r}: ") and words in message


def test_an_alphabet_of_its_own_has_no_other_stop():
    config = tiny_config()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, stop="$"))
    assert "rollout.stop='$'" in refused(lambda: validate(config)) and stop_texts(RolloutConfig().stop) == []


# --- BOS ---


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["chat", "qwen_math", "r1", "none"])
@pytest.mark.parametrize("chat", [CHATML, LLAMA])
def test_bos_stands_once_where_the_tokenizer_or_the_template_wants_it(chat, template, adds_bos, load):
    tokenizer = load(chat, adds_bos=adds_bos, prompt__template=template)
    bos = tokenizer.encode("<bos>")
    for question in ("2 + 2?", "<bos>2 + 2?") if template == "none" else ("2 + 2?",):
        ids = tokenizer.prompt(question, PromptConfig(template=template, prefill="So"))
        wanted = adds_bos or (template == "chat" and chat is LLAMA) or question.startswith("<bos>")
        assert ids.count(bos[0]) == wanted and (ids[:1] == bos) == wanted
        assert tokenizer.decode(ids).endswith("So")


# --- ids beyond the embedding ---


def test_a_tokenizer_may_have_an_id_more_than_the_embedding_has_rows(load):
    """As Gemma 3 1B's, whose tokenizer knows a token of images."""
    count = 256 + len(SPECIAL)
    tokenizer = load(CHATML, count, special=(*SPECIAL, "<image_soft_token>"))
    assert tokenizer.vocab_size == count and tokenizer.forbidden == ()
    assert "stop ids" in refused(lambda: load(CHATML, 256))


def test_ids_that_no_token_has_are_never_drawn(load):
    count = 256 + len(SPECIAL)
    assert load(CHATML, count + 3).forbidden == (count, count + 1, count + 2)


# --- templates that refuse ---


@pytest.mark.parametrize(
    ("template", "fields", "words"),
    [
        (GEMMA, {"prompt__system": "Be brief."}, ["prompt.system='Be brief.'", "System role not supported", "drop it"]),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            {"prompt__system": "Be brief."},
            ["prompt.system='Be brief.'", "leaves system messages out"],
        ),
        ("{{ raise_exception('Never.') }}", {}, ["prompt.template=chat", "Never.", "choose another"]),
        ("{% for x %}", {}, ["prompt.template=chat", "cannot render a question"]),
        ("{{ messages[0]['content'] + 1 }}", {}, ["prompt.template=chat", "cannot render a question"]),
        ("{{ messages[0].none.of_this }}", {}, ["prompt.template=chat", "cannot render a question"]),
        ("no question", {}, ["prompt.template=chat", "leaves the question out"]),
        ({"rag": CHATML, "tool_use": CHATML}, {}, ["prompt.template=chat", "templates named rag, tool_use"]),
    ],
)
def test_a_template_that_refuses_is_one_line(template, fields, words, load):
    message = refused(lambda: load(template, **fields))
    assert all(word in message for word in words), message


def test_a_default_among_named_templates_is_taken(load):
    tokenizer = load({"default": CHATML, "tool_use": "x"})
    assert "<|im_start|>user\n2?" in tokenizer.decode(tokenizer.prompt("2?", PromptConfig()))
    assert texts(tokenizer) == ["<|im_end|>", "<eos>"]


# --- dates ---

DATED = "\n[{{ strftime_now('%d %b %Y') if strftime_now is defined }}]" + CHATML


def test_a_template_writes_the_date_that_it_is_given(load):
    tokenizer = load(DATED)

    def first(date):
        return tokenizer.decode(tokenizer.prompt("x", PromptConfig(date=date))).partition("<")[0]

    assert first("2024-02-29") == "\n[29 Feb 2024]" and first("2031-12-01") == "\n[01 Dec 2031]"
    assert first(None) == f"\n[{datetime.date.today():%d %b %Y}]"
    plain = load(CHATML)
    assert plain.prompt("x", PromptConfig(date="2024-02-29")) == plain.prompt("x", PromptConfig())


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%A, %B %-d, %Y", "100%% of %d/%m/%y", "%H:%M", "%j"])
def test_every_form_of_a_date(form, load):
    tokenizer = load("{{ strftime_now(" + repr(form) + ") }}|{{ messages[0]['content'] }}")
    text = tokenizer.decode(tokenizer.prompt("x", PromptConfig(date="2024-03-05")))
    assert text == f"{datetime.datetime(2024, 3, 5).strftime(form)}|x"
    assert date_directives(datetime.date(2024, 3, 5))["%-d"] == "5"


def test_a_date_that_is_none_is_refused():
    message = refused(lambda: validate(tiny_config(prompt__date="yesterday")))
    assert message == "prompt.date='yesterday': must be a day, such as 2026-01-31"
