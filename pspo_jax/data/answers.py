"""Gold answers: from the value of a column to a text that a verifier reads."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable

from pspo_jax.data.conversations import scalar_text
from pspo_jax.data.files import exact_json
from pspo_jax.verifiers import boxed
from pspo_jax.verifiers.math_answer import ALTERNATIVES

PROSE = "gold answer is prose without a box"
_MOST_WORDS = 7
"""Words of an answer in plain text; those of the benchmarks have fewer."""
_FEW_WORDS = 3
"""Words of a name with a full stop in it, such as St. Petersburg."""
_TYPESET = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\$[^$]*\$|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SENTENCES = re.compile(r"[a-z0-9)][.!?]\s+[A-Z]|[a-z]{2,}[.:]?\s*\n\s*\S*[A-Za-z]{2,}")
_CONCLUSION = re.compile(r"####|\b(?:final answer|answer is|answer:|therefore|hence|thus)\b", re.IGNORECASE)


def missing(value: object) -> bool:
    """Whether a column holds no answer: null, NaN or an infinity."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def gold_text(value: object, transform: str | None) -> str:
    """A gold answer as text, its alternatives joined by ALTERNATIVES.

    Args:
      transform: a name of TRANSFORMS; None = the members of a list, and any other value as it is.
    Raises:
      ValueError, TypeError, SyntaxError: the transform cannot read it.
    """
    if isinstance(value, bytes):
        value = value.decode()
    gold = TRANSFORMS[transform or ("stringified_list" if isinstance(value, list) else "none")](value)
    gold.encode()
    return gold


def any_text(exact: object, plain: object, transform: str | None) -> str:
    """A gold answer of any type as text, for tasks whose function is given the value itself; objects and lists as JSON.

    Args:
      exact: the value with numbers as its file writes them.
      plain: the value itself.
    """
    try:
        return "" if missing(exact) else gold_text(exact, transform or "none")
    except (ValueError, SyntaxError, TypeError):
        return json.dumps(plain, default=str)


def is_prose(gold: str) -> bool:
    """Whether a gold answer is a solution in words, which no completion's answer equals.

    It has no `\\\\boxed{}`, and more words than an answer, several sentences or lines of words, or a conclusion such as
    "the answer is".
    """
    if boxed.BOX in gold:
        return False
    words = _WORD.findall(_TYPESET.sub(" ", gold))
    told = len(words) > _FEW_WORDS and _SENTENCES.search(gold) is not None
    return told or len(words) > _MOST_WORDS or _CONCLUSION.search(gold) is not None


def listed(text: str) -> list[object]:
    """The members of a list in JSON or Python notation; numbers as they are written.

    Raises:
      ValueError, SyntaxError: the text is no list.
    """
    try:
        found = exact_json(text)
    except ValueError:
        found = _python_list(text.strip())
    if not isinstance(found, list):
        raise ValueError(f"{text!r} is no list")
    return found


def _python_list(text: str) -> list[object]:
    try:
        node = ast.parse(text, mode="eval").body
    except (RecursionError, MemoryError) as error:
        raise ValueError("a list that is nested too deeply") from error
    if not isinstance(node, ast.List | ast.Tuple):
        raise ValueError(f"{text!r} is no list")
    return [_member(text, item) for item in node.elts]


def _member(text: str, node: ast.expr) -> object:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | bytes | bool)):
        return node.value
    ast.literal_eval(node)  # ValueError for what is no literal
    return ast.get_source_segment(text, node)


def _as_it_is(value: object) -> str:
    return scalar_text(value).strip()


def _after_hashes(value: object) -> str:
    head, mark, tail = scalar_text(value).rpartition("####")
    if not mark:
        raise ValueError(f"no #### in {head!r}")
    return tail.strip().replace(",", "")


def _members(value: object) -> str:
    found = value if isinstance(value, list | tuple) else listed(scalar_text(value))
    return ALTERNATIVES.join(dict.fromkeys(scalar_text(v).strip() for v in found if not missing(v)))


def _in_last_box(value: object) -> str:
    text = scalar_text(value)
    found = boxed.last_if_complete(text)
    if found is None:
        raise ValueError(f"no complete \\boxed{{}} at the end of {text!r}")
    return found.strip()


TRANSFORMS: dict[str, Callable[[object], str]] = {
    "none": _as_it_is,
    "gsm8k": _after_hashes,
    "stringified_list": _members,
    "boxed": _in_last_box,
}
