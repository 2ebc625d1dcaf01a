"""Prompts letter for letter, with Qwen2.5's template."""

from __future__ import annotations

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.templates import QUESTIONS, SYSTEM_PROMPTS, TEXTS
from pspo_jax.data.tokenizer import load_tokenizer
from tests.conftest import DATA
from tests.helpers import tiny_config

TOKENIZER = DATA / "tokenizers" / "qwen2.5-small"

OPEN_RS = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer, and put your "
    "final answer within \\boxed{{}} . The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here "
    "</answer>. Note that respond by English, NOT use other languages."
)
GEO3K = (
    "2 + 2? You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
OPEN_R1 = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You first think about the "
    "reasoning process as an internal monologue and then provide the user with the answer. Respond in the following "
    "format: <think>\n...\n</think>\n<answer>\n...\n</answer>"
)
QWEN_MATH = "Please reason step by step, and put your final answer within \\boxed{}."
R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: 2 + 2?\nAssistant: <think>"
)

LIGHTEVAL = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
    "answering.\n\n2 + 2?"
)


def chat(system, question="2 + 2?"):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER)), None, None)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (PromptConfig(system="open_rs"), chat(OPEN_RS)),
        (PromptConfig(system="open_r1"), chat(OPEN_R1)),
        (PromptConfig(system="qwen_math"), chat(QWEN_MATH)),
        (PromptConfig(system="Be brief."), chat("Be brief.")),
        (PromptConfig(), chat("You are a helpful assistant.")),
        (PromptConfig(system="open_r1", prefill="<think>\n"), chat(OPEN_R1) + "<think>\n"),
        (PromptConfig(template="qwen_math"), chat(QWEN_MATH)),
        (PromptConfig(template="qwen_math", prefill="Step"), chat(QWEN_MATH) + "Step"),
        (PromptConfig(template="r1"), R1),
        (PromptConfig(template="r1", prefill="\n"), R1 + "\n"),
        (PromptConfig(template="none"), "2 + 2?"),
        (PromptConfig(template="none", question="boxed"), f"2 + 2?\n{QWEN_MATH}"),
        (PromptConfig(template="none", question="Q: {question} A:"), "Q: 2 + 2? A:"),
        (PromptConfig(question="geo3k"), chat("You are a helpful assistant.", GEO3K)),
        (PromptConfig(system="open_rs", question="lighteval"), chat(OPEN_RS, LIGHTEVAL)),
        (PromptConfig(template="qwen_math", question="boxed"), chat(QWEN_MATH, f"2 + 2?\n{QWEN_MATH}")),
        (PromptConfig(template="none", prefill=" It is"), "2 + 2? It is"),
    ],
)
def test_prompts(config, text, tokenizer):
    ids = tokenizer.prompt("2 + 2?", config)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text) or config.prefill  # a prefill begins a token of its own under "none"


def test_every_published_text_is_tested():
    assert set(SYSTEM_PROMPTS) == {"open_rs", "open_r1", "qwen_math"}
    assert set(TEXTS) == {"qwen_math", "r1"} and set(QUESTIONS) == {"lighteval", "boxed", "geo3k"}


def test_a_message_without_the_question_is_refused():
    with pytest.raises(
        ConfigError, match=r"^prompt\.question='Hm\.': must hold {question}, or be one of lighteval, boxed, geo3k$"
    ):
        load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER), prompt__question="Hm."), None, None)


@pytest.mark.parametrize(
    "question", ["{question}", "a {question} b {question}", "{} {0} {x} {{y}}", "{% x %} {{ 1 }}", "%s"]
)
@pytest.mark.parametrize("message", ["{question}", "lighteval"])
@pytest.mark.parametrize("template", ["chat", "qwen_math", "r1", "none"])
def test_braces_in_a_question_are_left_as_they_are(template, message, question, tokenizer):
    config = PromptConfig(template=template, system="S.", question=message)
    text = tokenizer.decode(tokenizer.prompt(question, config))
    plain = tokenizer.decode(tokenizer.prompt("2 + 2?", config))
    assert text == plain.replace("2 + 2?", question) and text.count(question) == 1


def test_what_a_template_begins_of_the_answer(tokenizer):
    assert (
        tokenizer.answer_beginning(PromptConfig())
        == tokenizer.answer_beginning(PromptConfig(template="qwen_math"))
        == ""
    )
    assert tokenizer.answer_beginning(PromptConfig(prefill="<think>\n")) == "<think>\n"
    assert tokenizer.answer_beginning(PromptConfig(template="r1")) == "<think>"
    assert tokenizer.answer_beginning(PromptConfig(template="r1", prefill="\n")) == "<think>\n"
    assert tokenizer.answer_beginning(PromptConfig(template="none", prefill="So")) == "So"


def test_a_chat_template_may_begin_the_answer():
    tokenizer = load_tokenizer(tiny_config(model__tokenizer=str(TOKENIZER)), None, None)
    for tail in ("<think>\n", "<think>"):
        tokenizer.hf.chat_template = "{{ messages[-1].content }}|{{ " + repr(tail) + " }}"
        assert tokenizer.decode(tokenizer.prompt("2 + 2?", PromptConfig())) == "2 + 2?|" + tail
        assert tokenizer.answer_beginning(PromptConfig()) == tail
        assert tokenizer.answer_beginning(PromptConfig(prefill="Now")) == tail + "Now"
