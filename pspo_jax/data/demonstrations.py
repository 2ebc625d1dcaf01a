"""Demonstrations from a JSONL file: rows of prompt and completion, or of messages, as token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig
from pspo_jax.data.conversations import Conversation, content_of, read_prompt
from pspo_jax.data.rendering import PromptError, render
from pspo_jax.data.task import (
    CompletionBatch,
    Demonstrations,
    PromptDataset,
    PromptEncoder,
    RewardResult,
    Task,
    Tokenizer,
    json_lines,
)
from pspo_jax.data.tokenizer import TextTokenizer

_FORMS = '{"prompt": ..., "completion": ...} or {"messages": [..., {"role": "assistant", "content": ...}]}'


def read_text(path: Path) -> str:
    """The text of the file that sft.data names.

    Raises:
      ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"sft.data={path}: {error.strerror}; name a JSONL file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"sft.data={path}: is not UTF-8 ({error}); convert it") from error


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    encode_prompt: PromptEncoder,
    stop_ids: tuple[int, ...],
    config: PromptConfig,
) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt and ids of the completion of each line; a completion without a stop token gets EOS at its end.

    A row is `{"prompt": text, "completion": text}`, whose prompt is put into the template of the config, or messages,
    which the tokenizer's chat template renders: `{"messages": [...]}`, of which the last one is the assistant's and the
    only one that is learnt, or `{"prompt": [...], "completion": [...]}`.

    Raises:
      ConfigError: a line has another form, or there is none.
    """
    found = []
    for number, line in enumerate(json_lines(read_text(path)), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError("no object")
            prompt, completion = _parts(record)
            if isinstance(prompt, str):
                ids = encode_prompt(prompt), tokenizer.encode(completion)
            else:
                ids = _turns(tokenizer, prompt, completion, stop_ids, config)
        except ConfigError as error:
            raise ConfigError(f"sft.data={path} line {number}: {error}") from error
        except PromptError as error:
            raise ConfigError(f"sft.data={path} line {number}: its prompt {error}") from error
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"sft.data={path} line {number}: needs {_FORMS}, got {line[:60]!r}") from error
        ended = ids[1] if ids[1] and ids[1][-1] in stop_ids else [*ids[1], tokenizer.eos_token_id]
        found.append((ids[0], ended))
    if not found:
        raise ConfigError(f"sft.data={path}: holds no rows; name another")
    return found


def _parts(record: dict[str, object]) -> tuple[str | Conversation, str]:
    """Prompt and completion of a row: two texts, or messages and the assistant's text.

    Raises:
      KeyError, TypeError, IndexError: the row has another form.
    """
    if "messages" in record:
        *prompt, last = _messages(record["messages"])
    elif isinstance(record["prompt"], list):
        completion = record["completion"]
        if not isinstance(completion, list) or len(completion) != 1:
            completion = [{"role": "assistant", "content": completion}]
        prompt, last = _messages(record["prompt"]), _messages(completion)[0]
    else:
        if not isinstance(record["prompt"], str) or not isinstance(record["completion"], str):
            raise TypeError("no text")
        return record["prompt"], record["completion"]
    if last["role"] != "assistant" or not prompt:
        raise TypeError("the last message is to be the assistant's answer to another one")
    return prompt, content_of(last)


def _messages(value: object) -> Conversation:
    """Messages whose role and content are texts."""
    if not isinstance(value, list) or not value:
        raise TypeError("no messages")
    for message in value:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise TypeError("no text")
    return value


def _turns(
    tokenizer: Tokenizer, messages: Conversation, completion: str, stop_ids: tuple[int, ...], config: PromptConfig
) -> tuple[list[int], list[int]]:
    """Ids of a conversation up to the assistant's turn, and of that turn up to the token that ends it."""
    if not isinstance(tokenizer, TextTokenizer) or not tokenizer.hf.chat_template:
        raise ConfigError("has messages, and the tokenizer has no chat template; write prompt and completion as text")
    try:
        before = render(tokenizer.hf, messages, config)
        whole = render(tokenizer.hf, [*messages, {"role": "assistant", "content": completion}], config, generate=False)
    except PromptError as error:
        raise ConfigError(f"its messages: {error}") from error
    # A template may rewrite the assistant's turn, for example with a block of thought; then the row's text is taken.
    ids = tokenizer.encode(whole.removeprefix(before) if whole.startswith(before) else completion)
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return tokenizer.encode(before), ids[: end + 1]


def demonstration_task(config: Config, tokenizer: TextTokenizer) -> Task:
    """A task for supervised fine-tuning alone: its prompts are placeholders, and it has no reward."""

    def encode(prompt: object) -> list[int]:
        return tokenizer.prompt(prompt if isinstance(prompt, str) else read_prompt(prompt), config.prompt)

    assert config.sft.data is not None
    examples = read_examples(Path(config.sft.data), tokenizer, encode, tokenizer.stop_ids, config.prompt)
    bucket = config.rollout.prompt_bucket
    width = -(-min(max(len(prompt) for prompt, _ in examples), config.prompt.max_tokens) // bucket) * bucket
    rows = config.rollout.prompts
    placeholders = PromptDataset(
        np.full((rows, width), tokenizer.pad_token_id, np.int32), np.ones(rows, np.int32), [""] * rows
    )
    return Task(
        name="sft",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        forbidden=tokenizer.forbidden,
        stop_ids=tokenizer.stop_ids,
        train=placeholders,
        heldout=placeholders,
        reward_fn=_no_reward,
        demonstrations=_no_demonstrations,
        encode_prompt=encode,
    )


def _no_demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
    raise ConfigError("sft.data=None: needs a JSONL file; a task of text has no demonstrations of its own")


def _no_reward(completions: CompletionBatch) -> Callable[[], RewardResult]:
    raise ConfigError("task: supervised fine-tuning alone has no reward; name a task")
