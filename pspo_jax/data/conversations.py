"""What a prompt column may hold: text, or a conversation in the forms in which data sets write one."""

from __future__ import annotations

import ast
import json
from typing import Any

Message = dict[str, Any]
"""A turn: its role, its content, and what else a chat template may read, such as tool calls."""
Conversation = list[Message]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of roles; others are taken as they are."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_prompt(value: Any) -> str | Conversation:
    """A prompt column's value as text, or as a conversation whose last turn is to be answered.

    A conversation is a list of turns with role and content, or from and value as ShareGPT has them, or the text of such
    a list. A conversation of one user turn is its text.

    Raises:
      TypeError: it is neither; the message says what stands there.
      UnicodeError: bytes that are no UTF-8, or text with half a surrogate pair.
    """
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, dict) and ("content" in value or "value" in value):
        value = [value]
    turns = _listed(value) if isinstance(value, str) else value
    if not isinstance(turns, list):
        text = scalar_text(value)
        text.encode()
        return text
    if not turns:
        return ""
    out = [_message(turn) for turn in turns]
    json.dumps(out, ensure_ascii=False, default=str).encode()
    last = out[-1]
    if last["role"] in ("assistant", "system"):
        raise TypeError(f"the last turn is the {last['role']}'s; a prompt ends with the user's turn or a tool's")
    if len(out) == 1 and set(last) == {"role", "content"}:
        return str(last["content"])
    return out


def scalar_text(value: Any) -> str:
    """A value as text: a number as its file writes it, true and false as JSON has them, nothing as "".

    Raises:
      TypeError: an object or a list.
    """
    if isinstance(value, dict | list | tuple | set):
        raise TypeError("an object, not text" if isinstance(value, dict) else "a list, not text")
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def transcript(prompt: str | Conversation) -> str:
    """A prompt as a reader sees it: its text, or every turn after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _listed(text: str) -> Any:
    """The turns of a list that a column of text holds, as CSV files do; None where it is no such list."""
    if not text.lstrip().startswith(("[{", "[ {", "[\n")) or not ("role" in text or "from" in text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    keys = ({"role", "content"}, {"from", "value"})
    turns = isinstance(found, list) and found and all(isinstance(t, dict) for t in found)
    return found if turns and all(any(k <= set(t) for k in keys) for t in found) else None


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise TypeError("a list of which an element is no turn")
    if turn.get("role") is None and turn.get("from") is not None:
        role, content = _ROLES.get(str(turn["from"]), str(turn["from"])), turn.get("value")
    elif turn.get("role") is not None:
        role, content = str(turn["role"]), turn.get("content")
    else:
        raise TypeError("a turn with neither role and content nor from and value")
    rest = {k: v for k, v in turn.items() if k not in ("role", "content", "from", "value") and v is not None}
    if content is None and not (role == "assistant" and rest):
        raise TypeError(f"a turn of the {role} without content")
    return {"role": role, "content": _content(content), **rest}


def _content(content: Any) -> str:
    """The text of a turn: as it is, or its parts joined."""
    if not isinstance(content, dict | list):
        return scalar_text(content)
    return "".join(_part(part) for part in (content if isinstance(content, list) else [content]))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise TypeError(f"a part of type {kind}; the policy reads text alone" if kind else "a part that is no text")
    return str(part["text"])
