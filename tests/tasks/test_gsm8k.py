"""GSM8K rows in their native columns, and the last number of a completion."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest

from pspo_jax.config import ConfigError
from pspo_jax.tasks.gsm8k import answered, gsm8k, number_of, read_rows
from pspo_jax.tasks.tokenizer import load_tokenizer
from tests.conftest import DATA
from tests.helpers import tiny_config

ROWS, TOKENIZER = DATA / "math" / "gsm8k_test.jsonl", DATA / "tokenizers" / "qwen2.5"
needs_data = pytest.mark.skipif(not ROWS.exists(), reason=f"GSM8K is not at {ROWS}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_config(policy__tokenizer=str(TOKENIZER)), None, 151_936)


def config(**fields):
    values = {"task__name": "gsm8k", "task__train_data": str(ROWS), "task__train_prompts": 0, "rollout__prompts": 4}
    return tiny_config(**(values | fields))


@needs_data
def test_every_gold_answer_is_read_and_rewarded(tokenizer):
    rows = read_rows(ROWS, "task.train_data")
    assert len(rows) == 1319 and all(number_of(r.answer) is not None for r in rows)
    for row in rows[:200]:
        assert answered(f"So the total is \\boxed{{{row.answer}}}.") == number_of(row.answer)
        assert answered(f"#### {row.answer}") == number_of(row.answer)


@needs_data
def test_train_and_heldout_share_no_row(tokenizer):
    task = gsm8k(config(task__heldout_prompts=100, task__train_prompts=50), tokenizer)
    assert len(task.train.lengths) == 50 and len(task.heldout.lengths) == 100
    assert task.train.tokens.shape[1] == task.heldout.tokens.shape[1] and task.train.tokens.shape[1] % 16 == 0
    train = {bytes(row) for row in task.train.tokens}
    assert not train & {bytes(row) for row in task.heldout.tokens}
    assert task.forbidden[0] == 151_665 and task.vocab_size == 151_936
    assert tokenizer.decode(task.train.tokens[0, : task.train.lengths[0]]).endswith("<|im_start|>assistant\n")


@needs_data
def test_long_prompts_are_left_out_and_counted(tokenizer):
    whole = gsm8k(config(prompt__max_tokens=512, task__heldout_prompts=100), tokenizer)
    cut = gsm8k(config(prompt__max_tokens=100, task__heldout_prompts=100), tokenizer)
    assert cut.train.left_out > 0 and cut.train.left_out + len(cut.train.lengths) == len(whole.train.lengths)
    assert cut.train.lengths.max() <= 100
    with pytest.raises(ConfigError, match=r"prompt\.max_tokens=3: every prompt"):
        gsm8k(config(prompt__max_tokens=3), tokenizer)


@needs_data
def test_reward_wants_the_number_and_an_end(tokenizer):
    task = gsm8k(config(task__heldout_prompts=10), tokenizer)
    gold = task.train.answers[0]
    texts = [f"The answer is {gold}.", f"{gold} or rather 1{gold}", "no number", f"\\boxed{{{gold}}} in 77 words"]
    rows = [[*tokenizer.encode(t), 151_645] for t in texts] + [tokenizer.encode(f"The answer is {gold}.")]
    lengths = np.array([[len(r) for r in rows]])
    tokens = np.zeros((1, len(rows), lengths.max()), np.int32)
    for i, r in enumerate(rows):
        tokens[0, i, : len(r)] = r
    assert task.verify(task.train, np.array([0]), tokens, lengths)["accuracy"].tolist() == [[1, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", "1234"),
        ("$5.50", "5.50"),
        ("-.5 then -3", "-3"),
        ("\\boxed{12} 9", "12"),
        ("x=7.", "7"),
        ("none", None),
    ],
)
def test_numbers(text, value):
    assert answered(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no rows"]),
        ('{"q": 1}', ["line 1", "columns question and answer"]),
        ('{"question": "a", "answer": "#### 1"}\n[', ["line 2"]),
        ('{"question": "a", "answer": "seven"}', ["line 1", "#### n"]),
    ],
)
def test_bad_files_are_named(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_rows(path, "task.train_data")
    assert all(w in str(error.value) for w in ["task.train_data=", *words])


def test_lines_are_cut_at_newlines_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b\x85c", "answer": "#### 1"}, ensure_ascii=False) + "\n")
    assert read_rows(path, "f")[0].question == "a\u2028b\x85c"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "none", "f")
