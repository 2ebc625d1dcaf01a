"""Prompts as columns hold them: a text, or a conversation in one of the forms that data sets use."""

from __future__ import annotations

import ast
import json

Message = dict[str, object]
"""A turn: its role, its content, and other fields that a chat template may read, such as tool calls."""
Conversation = list[Message]
"""Turns in their order."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of roles; other names are kept."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_MARK = "<image>"
"""Text that marks the place of an image in the text of a data set."""
IMAGE_PLACE = "\ufffcimage\ufffc"
"""Text that stands for an image in the texts that `read_prompt` gives."""


def read_prompt(value: object) -> str | Conversation:
    """A prompt column's value as text, or as a conversation whose last turn is to be answered.

    A conversation is a list of turns with role and content, or from and value as ShareGPT has them, or the text of such
    a list. A conversation of one user turn is its text. IMAGE_PLACE stands for the images among a turn's parts.

    Raises:
      TypeError: it is neither a text nor a conversation; the message says what it is.
      UnicodeError: it holds bytes that are no UTF-8, or half a surrogate pair.
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
    out = read_turns(turns)
    last = out[-1]
    if last["role"] in ("assistant", "system"):
        raise TypeError(f"the last turn is the {last['role']}'s; a prompt ends with the user's turn or a tool's")
    if len(out) == 1 and set(last) == {"role", "content"}:
        return str(last["content"])
    return out


def read_turns(turns: list[object]) -> Conversation:
    """The turns of a conversation, each in either form, with IMAGE_PLACE for the images among its parts.

    Raises:
      TypeError: an element of the list is no turn.
      UnicodeError: a turn holds bytes that are no UTF-8, or half a surrogate pair.
    """
    out = [_message(turn) for turn in turns]
    json.dumps(out, ensure_ascii=False, default=str).encode()
    return out


def scalar_text(value: object) -> str:
    """A value as text: a number as its file writes it, true and false as in JSON, None as "".

    Raises:
      TypeError: it is an object or a list.
    """
    if isinstance(value, dict | list | tuple | set):
        raise TypeError("an object, not text" if isinstance(value, dict) else "a list, not text")
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def transcript(prompt: str | Conversation) -> str:
    """A prompt as a reader sees it: its text, or every turn after its role; IMAGE_MARK stands for images."""
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return prompt.replace(IMAGE_PLACE, IMAGE_MARK)


def content_parts(text: str) -> str | list[dict[str, str]]:
    """A turn's text as chat templates take it: as it is, or the list of its texts and images if it has images."""
    if IMAGE_PLACE not in text:
        return text
    out: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE_PLACE)):
        out += [{"type": "image"}] if i else []
        out += [{"type": "text", "text": piece}] if piece else []
    return out


def image_parts(value: object) -> list[dict[str, object]]:
    """The parts of a prompt column's value that are images, in their order; none if it is plain text."""
    turns = _listed(value) if isinstance(value, str) else [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        return []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return [part for part in parts if isinstance(part, dict) and is_image_part(part)]


def content_of(message: Message) -> str:
    """The text of a turn."""
    return str(message["content"])


def _listed(text: str) -> list[object] | None:
    """The turns of a conversation that is written as text, as in CSV files; None where the text is none."""
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
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        return None
    return found if all(any(k <= set(t) for k in keys) for t in found) else None


def _message(turn: object) -> Message:
    """A turn with role and content, from either form."""
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


def _content(content: object) -> str:
    """The text of a turn; the parts of a list are joined."""
    if not isinstance(content, dict | list):
        return scalar_text(content)
    return "".join(_part(part) for part in (content if isinstance(content, list) else [content]))


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and is_image_part(part):
        return IMAGE_PLACE
    raise TypeError(f"a part of type {kind}; only text and still images are read" if kind else "a part that is no text")


def is_image_part(part: dict[str, object]) -> bool:
    """Whether a part is an image, or marks the place of one."""
    return part.get("type", "image" if part.get("image") is not None else "text") in _IMAGE_PARTS
