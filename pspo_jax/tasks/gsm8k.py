"""Grade-school word problems from JSONL files with columns question and answer, the answer ending in `#### n`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pspo_jax.config import Config, ConfigError
from pspo_jax.tasks.base import Demonstrations, PromptSet, Task, Verifier, json_lines, pad_rows
from pspo_jax.tasks.tokenizer import TextTokenizer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Row(NamedTuple):
    question: str
    answer: str


def gsm8k(config: Config, tokenizer: TextTokenizer) -> Task:
    """The task of `config.task`'s files. Questions longer than prompt.max_tokens are left out."""
    c = config.task
    assert c.train_data is not None
    rows = read_rows(Path(c.train_data), "task.train_data")
    if c.heldout_data is None:
        if len(rows) <= c.heldout_prompts:
            raise ConfigError(
                f"task.heldout_prompts={c.heldout_prompts}: task.train_data has {len(rows)} rows; lower it, or set "
                "task.heldout_data"
            )
        rows, heldout = rows[: -c.heldout_prompts], rows[-c.heldout_prompts :]
    else:
        heldout = read_rows(Path(c.heldout_data), "task.heldout_data")[: c.heldout_prompts]
    train = prompt_set(rows[: c.train_prompts or None], config, tokenizer, "task.train_data")
    if len(train.lengths) < config.rollout.prompts:
        raise ConfigError(
            f"rollout.prompts={config.rollout.prompts}: prompts are drawn without replacement from "
            f"{len(train.lengths)} rows of task.train_data; lower it"
        )
    return Task(
        name="gsm8k",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        forbidden=tokenizer.forbidden,
        stop_ids=tokenizer.stop_ids,
        train=train,
        heldout=prompt_set(heldout, config, tokenizer, "task.heldout_data", train.tokens.shape[1]),
        verify=last_number(tokenizer),
        demonstrations=_none,
        encode_prompt=lambda question: tokenizer.prompt(question, config.prompt),
    )


def _none(seed: int, count: int) -> Iterator[Demonstrations]:
    raise ConfigError("sft.data=None: gsm8k has no demonstrations of its own; set sft.data, or sft.steps 0")


def read_rows(path: Path, field: str) -> list[Row]:
    """Questions and gold numbers of a JSONL file."""
    try:
        lines = json_lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}={path}: cannot be read ({error}); name a JSONL file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            rows.append(Row(str(record["question"]), str(record["answer"]).rpartition("####")[2].strip()))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{field}={path} line {number}: needs columns question and answer, got {line[:60]!r}"
            ) from error
        if number_of(rows[-1].answer) is None:
            raise ConfigError(f"{field}={path} line {number}: the answer must end in `#### n`, got {line[-60:]!r}")
    if not rows:
        raise ConfigError(f"{field}={path}: holds no rows")
    return rows


def prompt_set(rows: list[Row], config: Config, tokenizer: TextTokenizer, field: str, at_least: int = 1) -> PromptSet:
    """Tokenised prompts, padded to a multiple of rollout.prompt_bucket; `at_least` is the smallest padded length."""
    encoded = [(tokenizer.prompt(row.question, config.prompt), row.answer) for row in rows]
    fits = [(ids, answer) for ids, answer in encoded if len(ids) <= config.prompt.max_tokens]
    if not fits:
        raise ConfigError(
            f"prompt.max_tokens={config.prompt.max_tokens}: every prompt of {field} is longer; the shortest has "
            f"{min(len(ids) for ids, _ in encoded)} tokens"
        )
    bucket = config.rollout.prompt_bucket
    width = -(-max(at_least, *(len(ids) for ids, _ in fits)) // bucket) * bucket
    tokens, lengths = pad_rows([ids for ids, _ in fits], width, tokenizer.pad_token_id)
    return PromptSet(tokens, lengths, tuple(answer for _, answer in fits), left_out=len(encoded) - len(fits))


def last_number(tokenizer: TextTokenizer) -> Verifier:
    """accuracy: 1 if the completion ended and its last number, in \\boxed{} if there is one, is the gold number."""

    def verify(
        prompts: PromptSet,
        rows: Int[np.ndarray, "B"],
        completions: Int[np.ndarray, "B G T"],
        lengths: Int[np.ndarray, "B G"],
    ) -> dict[str, Float[np.ndarray, "B G"]]:
        reward = np.zeros(lengths.shape, np.float32)
        for (i, j), length in np.ndenumerate(lengths):
            ids = completions[i, j, :length].tolist()
            if ids and ids[-1] in tokenizer.stop_ids:
                gold = number_of(prompts.answers[int(rows[i])])
                reward[i, j] = answered(tokenizer.answer(ids)) == gold
        return {"accuracy": reward}

    return verify


def answered(text: str) -> Decimal | None:
    """The number a completion ends on."""
    boxed = text.rpartition("\\boxed{")
    found = _NUMBER.findall(boxed[2].partition("}")[0] if boxed[1] else text)
    return number_of(found[-1]) if found else None


def number_of(text: str) -> Decimal | None:
    """`1,234.50` as a number, without rounding; None if it is none."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
