"""The tokens that end a completion: the tokenizer's, the checkpoint's, the template's and the config's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.config.text_fields import stop_texts
from pspo_jax.data.conversations import Conversation
from pspo_jax.data.rendering import PromptError, chat_template, render
from pspo_jax.data.templates import TURN_ENDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "stop-token-probe"


def stop_ids(hf: PreTrainedTokenizerBase, folders: list[Path], prompt: PromptConfig, stop: str) -> tuple[int, ...]:
    """Ids that end a completion, each once. The first one is added to a demonstration that ends with none of them.

    They are the token that ends a turn in the template, the tokenizer's EOS, those of generation_config.json and
    config.json, and those of rollout.stop. The template's comes first where prompt.template writes turns.

    Raises:
      ConfigError: rollout.stop holds a text that is not one token, or a file's eos_token_id is no id.
    """
    turn_ends = [i for i in (turn_end(hf), _token_id(hf, TURN_ENDS.get(prompt.template, ""))) if i is not None]
    found = [] if hf.eos_token_id is None else [int(hf.eos_token_id)]
    for folder in folders:
        for name in ("generation_config.json", "config.json"):
            found += _eos_of(folder / name)
    writes_turns = prompt.template == "chat" or prompt.template in TURN_ENDS
    found = turn_ends + found if writes_turns else found + turn_ends
    return tuple(dict.fromkeys([*found, *_ids_of_config(hf, stop)]))


def describe(hf: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The stop tokens in words."""
    return ", ".join(f"{hf.decode([i])!r} ({i})" for i in ids)


def turn_end(hf: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows the assistant's text in the chat template; None if there is none."""
    messages: Conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        if chat_template(hf) is None:
            return None
        text = render(hf, messages, PromptConfig(), generate=False)
    except PromptError:  # it cannot render an answer; whether it can render a prompt is found out elsewhere
        return None
    _, answer, tail = text.rpartition(_ANSWER)
    ids = hf.encode(tail.lstrip(), add_special_tokens=False) if answer else []
    special = {*hf.added_tokens_decoder, *hf.all_special_ids}
    return int(ids[0]) if ids and ids[0] in special else None


def _eos_of(path: Path) -> list[int]:
    """The ids under eos_token_id in a JSON file; none if there is no such file."""
    if not path.exists():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"model.source={path.parent}: {path.name} is not a JSON object") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(
            f"model.source={path.parent}: {path.name}: eos_token_id={value!r} is no id, nor a list of ids"
        )
    return ids


def _ids_of_config(hf: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """The ids of rollout.stop."""
    out = []
    for text in stop_texts(stop):
        token = _token_id(hf, text)
        if token is None:
            parts = [hf.decode([i]) for i in hf.encode(text, add_special_tokens=False)]
            raise ConfigError(
                f"rollout.stop={stop!r}: {text!r} is not one token of the vocabulary but {len(parts)} "
                f"({', '.join(map(repr, parts[:6]))}); name tokens, such as <|im_end|>"
            )
        out.append(token)
    return out


def _token_id(hf: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of a text that is one token; None if it is not."""
    if not text:
        return None
    if text in hf.get_added_vocab():
        return int(hf.get_added_vocab()[text])
    ids = hf.encode(text, add_special_tokens=False)
    if len(ids) == 1 and hf.decode(ids) == text:
        return int(ids[0])
    whole = hf.get_vocab().get(text)
    return int(whole) if whole is not None and hf.decode([whole]) == text else None
