"""Prompts that are conversations, in the forms in which data sets write them, rendered whole."""

from __future__ import annotations

import json

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.conversations import read_prompt, transcript
from pspo_jax.data.loading import quiet_datasets
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.rewards.task import make_task
from tests.data.small_tokenizer import CHATML, GEMMA, write_tokenizer
from tests.helpers import tiny_config

QUESTION = {"role": "user", "content": "2 + 2?"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    QUESTION,
]
RENDERED = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TURNS) + "<|im_start|>assistant\n"
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi."},
    {"from": "human", "value": "2 + 2?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: write_tokenizer(tmp_path_factory.mktemp(name), template)
        for name, template in {
            "chatml": CHATML,
            "gemma": GEMMA,
            "no_tools": CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"),
        }.items()
    }


@pytest.fixture
def task(tmp_path, folders):
    """A task of rows, written as JSONL or Parquet."""

    def make(rows, template="chatml", form="jsonl", **fields):
        path = tmp_path / f"x.{form}"
        if form == "parquet":
            quiet_datasets().Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
        values = {
            "task__name": "math",
            "task__cache": str(tmp_path / "prompts"),
            "task__train_data": str(path),
            "task__train_prompts": 0,
            "task__heldout_prompts": 1,
            "model__tokenizer": folders[template],
            "rollout__prompts": 1,
        }
        config = tiny_config(**(values | fields))
        return make_task(config, load_tokenizer(config, None, None))

    return make


def rows_of(*prompts, key="prompt"):
    """A row for each prompt, and one that is held out."""
    return [{key: prompt, "answer": "4"} for prompt in (*prompts, "held out")]


def rendered(task, i=0):
    return task.tokenizer.decode(task.train.tokens[i, : task.train.lengths[i]].tolist())


def refused(make):
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message, message
    return message


@pytest.mark.parametrize(
    ("key", "prompt"),
    [
        ("prompt", TURNS),
        ("messages", TURNS),
        ("conversations", SHAREGPT),
        ("prompt", json.dumps(TURNS)),
        ("prompt", str(TURNS)),
        ("prompt", [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]),
        ("prompt", [{**m, "content": [m["content"][:1], {"text": m["content"][1:]}]} for m in TURNS]),
    ],
)
def test_a_conversation_is_rendered_whole(key, prompt, task):
    made = task(rows_of(prompt, key=key))
    assert rendered(made) == RENDERED and not made.train.left_out
    assert made.train.texts[0] == "system: Be brief.\n\nuser: Hello\n\nassistant: Hi.\n\nuser: 2 + 2?"
    assert made.train.columns(0)[key] == prompt


def test_parquet_gives_the_same_conversation(task):
    rows = [{"prompt": TURNS, "answer": "4"}, {"prompt": [QUESTION], "answer": "4"}]
    assert rendered(task(rows, form="parquet")) == RENDERED


def test_one_turn_of_the_user_is_its_text(task):
    made = task(rows_of([QUESTION], "2 + 2?", [{"from": "human", "value": "2 + 2?"}]))
    assert list(made.train.texts) == ["2 + 2?"]
    assert [item[1:3] for item in made.train.left_out] == [(1, "duplicate"), (2, "duplicate")]


def test_rows_that_differ_in_earlier_turns_are_no_duplicates(task):
    other = [{"role": "system", "content": "Be long."}, *TURNS[1:]]
    made = task(rows_of(TURNS, other, TURNS[1:], [QUESTION], TURNS))
    assert len(made.train.lengths) == 4 and [item[1:3] for item in made.train.left_out] == [(4, "duplicate")]
    assert len(set(made.train.content().tolist())) == 4


def test_tools_reach_the_template(task):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    turns = [QUESTION, call | {"content": "I add."}, {"role": "tool", "content": "4", "name": "add"}]
    assert "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n" in rendered(task(rows_of(turns)))
    assert read_prompt([QUESTION, call, turns[2]])[1] == call | {"content": ""}


def test_the_users_message_is_made_around_the_last_question(task):
    made = task(rows_of(TURNS), prompt__question="Q: {question}")
    assert rendered(made) == RENDERED.replace("2 + 2?", "Q: 2 + 2?")


def test_options_stand_after_the_last_question(task):
    row = {"prompt": TURNS, "choices": ["3", "x"], "answer": "x"}
    made = task([row, row | {"prompt": "held out"}], task__name="multiple_choice")
    assert rendered(made) == RENDERED.replace("2 + 2?", "2 + 2?\nA. 3\nB. x") and made.train.answers[0] == "B"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([QUESTION, {"role": "assistant", "content": "4"}], "the last turn is the assistant's"),
        ([{"from": "human", "value": "?"}, {"from": "gpt", "value": "4"}], "the last turn is the assistant's"),
        ([{"role": "system", "content": "x"}], "the last turn is the system's"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "has images, and the model reads text alone",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            "has images, and the model reads text",
        ),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "a part of type video"),
        ([{"role": "user", "content": None}], "a turn of the user without content"),
        ([{"role": "user"}], "a turn of the user without content"),
        ([{"speaker": "x", "text": "y"}], "neither role and content nor from and value"),
        ([["a"]], "a list of which an element is no turn"),
        ({"question": "a"}, "an object, not text"),
        ([], "empty prompt"),
        ([{"role": "user", "content": " "}], "empty prompt"),
        ("\ud800", "surrogates not allowed"),
        ([{"role": "user", "content": "\ud800"}], "surrogates not allowed"),
    ],
)
def test_what_is_no_conversation_is_left_out_with_its_reason(prompt, reason, task):
    made = task(rows_of("2 + 2?", prompt))
    assert [item.row for item in made.train.left_out] == [1] and reason in made.train.left_out[0].reason


def test_a_data_set_of_such_rows_is_refused_with_the_reason(task):
    message = refused(lambda: task([{"conversations": SHAREGPT[:3], "answer": "4"}] * 3))
    assert "task.heldout_prompts" in message and "the last turn is the assistant's" in message


def test_a_template_may_refuse_a_row(task):
    made = task(rows_of("2 + 2?", TURNS, TURNS[1:], [QUESTION, QUESTION]), template="gemma")
    reasons = {item.row: item.reason for item in made.train.left_out}
    assert set(reasons) == {1, 3} and "System role not supported" in reasons[1] and "must alternate" in reasons[3]


def test_a_turn_that_the_template_drops_leaves_its_row_out(task):
    made = task(rows_of("2 + 2?", [QUESTION, {"role": "tool", "content": "It is 4."}]), template="no_tools")
    assert [item.reason for item in made.train.left_out] == ["the chat template leaves out the tool's turn"]


def test_two_system_messages_are_refused(task):
    message = refused(lambda: task(rows_of("2 + 2?", TURNS), prompt__system="open_r1"))
    assert message.startswith("prompt.system='open_r1': row 1 of ") and "has a system message of its own" in message
    assert "Be brief." in rendered(task(rows_of(TURNS[1:]), prompt__system="Be brief."))


@pytest.mark.parametrize("template", ["qwen_math", "r1", "none"])
def test_a_conversation_needs_the_chat_template(template, task):
    message = refused(lambda: task(rows_of("2 + 2?", TURNS), prompt__template=template))
    assert message.startswith(f"prompt.template={template}: row 1 of ") and message.endswith("choose chat")
    assert task(rows_of([QUESTION]), prompt__template=template).train.texts[0] == "2 + 2?"


@pytest.mark.parametrize("text", ["[1, 2]", "[{'a': 1}]", '[{"role": "x"}]', "[{role}]", "[{"])
def test_a_text_that_only_looks_like_a_list_is_text(text):
    assert read_prompt(text) == text == transcript(text)


def test_a_demonstrations_prompt_may_be_a_conversation(task):
    made = task(rows_of("2 + 2?"))
    assert made.tokenizer.decode(made.encode_prompt(TURNS)) == RENDERED
    assert made.tokenizer.decode(made.tokenizer.prompt(TURNS, PromptConfig(prefill="So"))) == RENDERED + "So"
