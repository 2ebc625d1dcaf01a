"""Conversations rendered by a tokenizer's chat template, on a date that the config fixes."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, cast

import jinja2

from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.conversations import IMAGE_PLACE, Conversation, content_of, content_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_SYSTEM = "has a system message of its own beside prompt.system"
SEVERAL_TURNS = "is a conversation, for which prompt.template must be chat"
_DIRECTIVES = "aAwdbBmyYHIMpSfjUWcxXGuV%"
# transformers hands a template plain data only, so the function is written in the template's language.
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- set now = namespace(directive='') -%}{%- for c in format -%}"
    "{%- if now.directive == '' and c != '%' -%}{{- c -}}"
    "{%- elif now.directive == '' or c == '-' -%}{%- set now.directive = now.directive ~ c -%}"
    "{%- else -%}{{- date_directives[now.directive ~ c] -}}{%- set now.directive = '' -%}{%- endif -%}"
    "{%- endfor -%}{%- endmacro +%}"
)


class PromptError(ValueError):
    """A prompt that cannot be rendered; the message is a reason to leave a row out."""


def chat_template(hf: PreTrainedTokenizerBase) -> str | None:
    """The template by which a tokenizer renders conversations; None if it has none.

    Raises:
      PromptError: it has several named ones, and no default.
    """
    if not hf.chat_template:
        return None
    try:
        return str(hf.get_chat_template())
    except ValueError as error:
        names = ", ".join(hf.chat_template) if isinstance(hf.chat_template, dict) else "?"
        raise PromptError(f"it has templates named {names}, and no default") from error


def render(hf: PreTrainedTokenizerBase, messages: Conversation, config: PromptConfig, generate: bool = True) -> str:
    """A conversation as text.

    Args:
      generate: whether the beginning of the assistant's next turn is added.
    Raises:
      PromptError: the template refuses the conversation, or is broken.
    """
    template = chat_template(hf)
    parts = [content_parts(content_of(m)) for m in messages]
    whole = [m if isinstance(found, str) else m | {"content": found} for m, found in zip(messages, parts, strict=True)]
    turns = cast("list[dict[str, str]]", whole)
    extra: dict[str, Any] = {} if config.thinking is None else {"enable_thinking": config.thinking}
    if config.date is not None and template is not None and "strftime_now" in template:
        template = _STRFTIME + template
        extra["date_directives"] = date_directives(datetime.date.fromisoformat(config.date))
    try:
        return str(
            hf.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
                **extra,
            )
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise PromptError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from error


def render_whole(hf: PreTrainedTokenizerBase, messages: Conversation, config: PromptConfig) -> str:
    """A conversation as text, with every one of its turns.

    Raises:
      PromptError: the template refuses the conversation, or leaves a turn out.
    """
    text = render(hf, messages, config)
    for message in messages:
        # Templates may drop the thoughts of earlier answers, and nothing else.
        told = content_of(message).rpartition("</think>")[2]
        if any(piece.strip() not in text for piece in told.split(IMAGE_PLACE)):
            raise PromptError(f"the chat template leaves out the {message['role']}'s turn")
    return text


def date_directives(date: datetime.date) -> dict[str, str]:
    """The texts of strftime's directives, such as %d and %-d, for midnight of a date."""
    midnight = datetime.datetime(date.year, date.month, date.day)
    plain = {f"%{c}": midnight.strftime(f"%{c}") for c in _DIRECTIVES}
    return plain | {f"%-{name[1:]}": text.lstrip("0") or "0" for name, text in plain.items()}
