"""Mathematical answers: where a completion gives one, and whether it equals the gold answer (math-verify).

Runs in worker processes, as math-verify can hang on hostile input; only `final_answer` runs in the main one.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from pspo_jax.rewards.naming import name_of

ALTERNATIVES = "\x1e"
"""Between gold answers any of which is right."""
RULES = 1
"""Of this file; to be raised when a verdict may change."""
MAX_ANSWER = 2000
"""Characters; a longer answer is wrong unless the gold answer is as long."""
_TAIL = 500
_BOX = "\\boxed{"
_MOST_BOXES = 20
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|(?:, )?(?:and|or))[\s$]*")
_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[,!;:]|\{,\})(?=\d{3}(?!\d))")
_SCIENTIFIC = re.compile(r"\\boxed\{\s*([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)\s*\}")
_FULL_STOP = re.compile(r"(?<!\.)\.\s*\}$")
_APPROXIMATELY = re.compile(r"\\boxed\{\s*\\approx\s*")
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
    parsed = _parse(tidy(answer))
    readable = False
    for alternative in golds:
        wanted = _parse(tidy(_wrapped(alternative)))
        readable |= bool(wanted)
        # No time limit here: the pool has the deadline, and signals would be lost in C code.
        if parsed and wanted and verify(list(wanted), list(parsed), **_places(wanted), timeout_seconds=None):
            if _differs(alternative, answer):
                continue
            return 1.0, canonical(_wrapped(alternative))
    return (0.0 if readable else None), canonical(answer)


def _places(wanted: tuple[Any, ...]) -> dict[str, int]:
    """More decimals for a small gold answer: math-verify compares 6, so 8.2e-19 and 4.2e-19 would be equal."""
    try:
        size = abs(float(wanted[0]))
    except (TypeError, ValueError, OverflowError):
        return {}  # no number
    places = -math.floor(math.log10(size)) if 0 < size < 1e-3 else 3
    return {"float_rounding": 3 + places, "numeric_precision": 12 + places}


def _wrapped(gold: str) -> str:
    """math-verify leaves a fifth of right MATH answers unrewarded if gold is not marked as mathematics."""
    return gold if "\\boxed{" in gold else "\\boxed{" + gold + "}"


def tidy(answer: str) -> str:
    """Spellings that math-verify misreads, respelled: 1\\,000 as 0, 1e-5 as a product with e; a full stop, \\approx."""
    answer = _THOUSANDS.sub("", answer)
    answer = _SCIENTIFIC.sub(r"\\boxed{\1 \\times 10^{\2}}", answer)
    return _FULL_STOP.sub("}", _APPROXIMATELY.sub(r"\\boxed{", answer))


def _differs(gold: str, answer: str) -> bool:
    """What math-verify overlooks: the base of a number (52_8, 52_5), the power of a unit, a wrong equation (8=7)."""
    inner = answer.replace("\\boxed{", "", 1).rstrip("}") if answer.startswith("\\boxed{") else answer
    bases = [_IN_BASE.fullmatch(text.strip("$ ")) for text in (gold, inner)]
    if bases[0] and bases[1] and bases[0][2] != bases[1][2]:
        return True
    if _false_equation(inner):
        return True
    powers = [_UNIT_POWER.findall(text) for text in (gold, inner)]
    return bool(powers[0] and powers[1] and powers[0] != powers[1])


def _false_equation(text: str) -> bool:
    """True for `a = b` with two numbers that are not equal, not even rounded."""
    sides = text.split("=")
    if len(sides) != 2:
        return False
    try:
        left, right = (float(_parse(_wrapped(side.strip()))[0]) for side in sides)
    except (TypeError, ValueError, OverflowError, IndexError):
        return False  # x = 7
    return abs(left - right) > 0.01 * max(abs(left), abs(right))


@lru_cache(4096)
def _parse(text: str) -> tuple[Any, ...]:
    from math_verify import parse
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    # A box that is no LaTeX it can read must be matched as text: the other reader would take its last number for all.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    targets = (latex,) if _BOX in text else (latex, ExprExtractionConfig())
    return tuple(parse(text, extraction_config=targets, parsing_timeout=None))


def canonical(answer: str) -> str | None:
    """A short name of an answer's value, for majority votes: equal numbers get equal names. None = nothing was read.

    It names the expression that the check has parsed, whose parse is remembered, so that a name costs next to nothing.
    """
    parsed = _parse(tidy(answer))
    return name_of(parsed[0]) if parsed else None
