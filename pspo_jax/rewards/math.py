"""Mathematical answers: where a completion gives one, and whether it equals the gold answer (math-verify).

Runs in worker processes, as math-verify can hang on hostile input; only `final_answer` runs in the main one.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

ALTERNATIVES = "\x1e"
"""Between gold answers any of which is right."""
MAX_ANSWER = 2000
"""Characters; a longer answer is wrong unless the gold answer is as long."""
_TAIL = 500
_BOX = "\\boxed{"
_MOST_BOXES = 20
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|(?:, )?(?:and|or))[\s$]*")
_IN_BASE = re.compile(r"\s*([0-9A-Za-z]+)\s*_\s*\{?\s*(\d+)\s*\}?\s*")
_UNIT_POWER = re.compile(r"\\(?:mbox|text|textrm|mathrm)\s*\{[^{}]*\}\s*\^\s*\{?\s*(-?\w+)\s*\}?")


def final_answer(completion: str) -> str | None:
    """The part of a completion that states its answer, or None if nothing is there. Linear in the text's length.

    Reasoning up to the last `</think>` is dropped. Of what is left: the last `\\boxed{}` with those joined to it ("3
    and 5"), else the last `<answer>` block, else the last 500 characters, from which math-verify takes the last number
    or formula.
    """
    text = completion.rpartition("</think>")[2]
    if boxes := _last_boxes(text):
        return boxes
    _, tag, tail = text.rpartition("<answer>")
    if tag and "</answer>" in tail:
        text = tail.partition("</answer>")[0]
    return text[-_TAIL:].strip() or None


def _last_boxes(text: str) -> str | None:
    begin = end = None
    start = len(text)
    for _ in range(_MOST_BOXES):
        start = text.rfind(_BOX, 0, start)
        if start < 0:
            break
        close = _closing_brace(text, start + len(_BOX), len(text) if begin is None else begin)
        if begin is None and close is None:
            continue  # cut off: an earlier one may be whole
        if close is None:
            break
        if begin is not None and not (begin - close <= _TAIL and _BETWEEN_BOXES.fullmatch(text, close, begin)):
            break
        begin, end = start, end or close
    return None if begin is None else text[begin:end]


def _closing_brace(text: str, begin: int, stop: int) -> int | None:
    """Index after the brace that closes the one before `begin`; a box that opens at or after `stop` is not entered."""
    depth = 1
    for i in range(begin, min(stop, begin + 4 * MAX_ANSWER)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if not depth:
                return i + 1
    return None


def score(gold: str, answer: str) -> tuple[float | None, str | None]:
    """1 if the answer equals a gold alternative, 0 if none, None if no gold can be read; and the answer, canonical.

    Args:
      gold: LaTeX or plain, alternatives separated by ALTERNATIVES.
      answer: what `final_answer` gave.
    """
    from math_verify import verify

    golds = [g.strip() for g in gold.split(ALTERNATIVES)]
    if len(answer) > max(MAX_ANSWER, 2 * max(map(len, golds))):
        return 0.0, None
    parsed = _parse(answer)
    readable = False
    for alternative in golds:
        wanted = _parse(_wrapped(alternative))
        readable |= bool(wanted)
        # No time limit here: the pool has the deadline, and signals would be lost in C code.
        if parsed and wanted and verify(list(wanted), list(parsed), **_places(wanted), timeout_seconds=None):
            if _differs(alternative, answer):
                continue
            return 1.0, canonical(alternative)
    return (0.0 if readable else None), canonical(answer)


def _places(wanted: tuple[Any, ...]) -> dict[str, int]:
    """math-verify compares 6 decimals, so that any two numbers near 0 are equal: 8.2e-19 and 4.2e-19. More for those."""
    try:
        size = abs(float(wanted[0]))
    except (TypeError, ValueError, OverflowError):
        return {}  # no number
    places = -math.floor(math.log10(size)) if 0 < size < 1e-3 else 3
    return {"float_rounding": 3 + places, "numeric_precision": 12 + places}


def _wrapped(gold: str) -> str:
    """math-verify leaves a fifth of right MATH answers unrewarded if gold is not marked as mathematics."""
    return gold if "\\boxed{" in gold else "\\boxed{" + gold + "}"


def _differs(gold: str, answer: str) -> bool:
    """What math-verify overlooks: the base of a number, 52_8 and 52_5, and the power of a unit."""
    inner = answer.replace("\\boxed{", "", 1).rstrip("}") if answer.startswith("\\boxed{") else answer
    bases = [_IN_BASE.fullmatch(text.strip("$ ")) for text in (gold, inner)]
    if bases[0] and bases[1] and bases[0][2] != bases[1][2]:
        return True
    powers = [_UNIT_POWER.findall(text) for text in (gold, inner)]
    return bool(powers[0] and powers[1] and powers[0] != powers[1])


@lru_cache(4096)
def _parse(text: str) -> tuple[Any, ...]:
    from math_verify import parse
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return tuple(parse(text, extraction_config=targets, parsing_timeout=None))


def canonical(answer: str) -> str | None:
    """A short name of an answer's value, for majority votes: equal numbers get equal names."""
    parsed = _parse(answer if "\\boxed{" in answer else _wrapped(answer))
    if not parsed:
        return None
    first = parsed[0]
    name = str(first)[:200]
    return str(first.evalf(10)) if getattr(first, "is_number", False) and len(name) < 100 else name
