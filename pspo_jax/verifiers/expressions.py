"""Formulas as math-verify reads and compares them, with checks for differences that it overlooks."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypedDict

from pspo_jax.verifiers import values
from pspo_jax.verifiers.boxed import BOX
from pspo_jax.verifiers.values import Parsed

if TYPE_CHECKING:
    pass

_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
_IN_BASE = re.compile(r"(?<![A-Za-z\d])\(?[0-9A-Z]*\d[0-9A-Z]*\)?\s*_\s*(?:\{\s*\(?\s*(\d+)\s*\)?\s*\}|(\d))")
_VARIABLE = re.compile(
    r"\\[A-Za-z]+|[A-Za-z]{4,}|(?<![A-Za-z])(?:sin|cos|tan|log|exp|max|min|gcd|lcm)(?![A-Za-z])|"
    r"([A-Za-z])(?:_(?:\{([^{}]*)\}|([A-Za-z0-9])))?"
)
"""A command, a word, or a letter and its index; nRT is three letters."""
_CAPITAL = re.compile(r"\\(Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![A-Za-z_])")


Readings = tuple[Parsed, ...]
"""Readings of one text by math-verify, the best first."""


class _Rounding(TypedDict, total=False):
    """Arguments of math-verify's `verify` that say how many decimals count."""

    float_rounding: int
    numeric_precision: int


def verified(gold: str, answer: str) -> bool:
    """Whether two respelled expressions are equal: as numbers, as formulas, or where their logarithms are defined."""
    from math_verify import verify

    gold, answer = _distinct_cases(gold, answer)
    wanted, parsed = parse(in_box(gold)), parse(in_box(answer))
    if not wanted or not parsed or _differs(gold, answer):
        return False
    verdict = values.complex_verdict(wanted[0], parsed[0], "." in gold + answer)
    if verdict is not None:
        return verdict
    wanted, parsed = _same_symbols(wanted, parsed)
    # No time limit here: the pool has the deadline, and signals would be lost in C code.
    if verify(list(wanted), list(parsed), allow_set_relation_comp=True, timeout_seconds=None, **_places(wanted)):
        return not _without_solutions(wanted[0], parsed[0])
    return values.equal_logarithms(wanted[0], parsed[0])


def _same_symbols(wanted: Readings, parsed: Readings) -> tuple[Readings, Readings]:
    """Gives equal letters of two expressions equal assumptions.

    math-verify takes all letters for complex where an i stands alone, as in 3 i; in 3i they are real. Where two
    expressions differ in that, the assumptions are dropped, so that x in the one is x in the other.
    """
    kinds = [{symbol.name: symbol for symbol in getattr(each[0], "free_symbols", ())} for each in (wanted, parsed)]
    if all(kinds[1].get(name, symbol) == symbol for name, symbol in kinds[0].items()):
        return wanted, parsed
    return _without_assumptions(wanted), _without_assumptions(parsed)


def _without_assumptions(parsed: Readings) -> Readings:
    import sympy

    if isinstance(parsed[0], str):
        return parsed
    symbols = parsed[0].free_symbols
    bare = parsed[0].xreplace({symbol: sympy.Symbol(symbol.name) for symbol in symbols})
    if len(getattr(bare, "free_symbols", ())) != len(symbols):
        return parsed  # an equation that has become true, or false
    return (bare, *parsed[1:])


def _distinct_cases(gold: str, answer: str) -> tuple[str, str]:
    """Gives capitals an index, or a longer one, where the small letter occurs too.

    math-verify takes N for n, and \\Delta for \\delta. Letters within words and other commands stay.
    """
    texts = gold + " " + answer
    letters = {match[1] for match in _VARIABLE.finditer(texts) if match[1]}
    both = {letter for letter in letters if letter.isupper() and letter.lower() in letters}
    greek = {name for name in _CAPITAL.findall(texts) if "\\" + name.lower() in texts}

    def renamed(match: re.Match[str]) -> str:
        return f"{match[1]}_{{9{match[2] or match[3] or ''}}}" if match[1] in both else match[0]

    def indexed(match: re.Match[str]) -> str:
        return match[0] + ("_{9}" if match[1] in greek else "")

    first, second = (_CAPITAL.sub(indexed, _VARIABLE.sub(renamed, text)) for text in (gold, answer))
    return first, second


def _places(wanted: Readings) -> _Rounding:
    """More decimals for a small gold answer: math-verify compares 6, so 8.2e-19 and 4.2e-19 would be equal."""
    try:
        size = abs(float(wanted[0]))
    except (TypeError, ValueError, OverflowError):
        return {}  # no number
    places = -math.floor(math.log10(size)) if 0 < size < 1e-3 else 3
    return {"float_rounding": 3 + places, "numeric_precision": 12 + places}


def in_box(text: str) -> str:
    """A respelled expression in a box, as math-verify reads it best: 1e-5 as a power of ten, not a product with e."""
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text.replace("°", "^\\circ "))
    return BOX + text + "}"


def _differs(gold: str, answer: str) -> bool:
    """Whether two expressions differ where math-verify overlooks it.

    Their numbers have different bases (52_8 and 52_5), or the answer holds a false equation (8=7).
    """
    bases = [{match[1] or match[2] for match in _IN_BASE.finditer(text)} for text in (gold, answer)]
    if bases[0] != bases[1]:
        return True
    return _false_equation(answer)


def _false_equation(text: str) -> bool:
    """True for `a = b`, or `a = x = b`, with two numbers that are not equal, not even rounded."""
    sides = re.split(r"=|\\approx(?![A-Za-z])", text)
    if not 2 <= len(sides) <= 8:
        return False
    values = [value for side in sides if (value := float_of(side)) is not None]
    return any(abs(one - values[0]) > 0.01 * max(abs(one), abs(values[0])) for one in values[1:])


def float_of(text: str) -> float | None:
    """The value of an expression that is a real number; None for any other."""
    try:
        return float(parse(in_box(text.strip()))[0])
    except (TypeError, ValueError, OverflowError, IndexError):
        return None  # x


def _without_solutions(gold: Parsed, answer: Parsed) -> bool:
    """Whether two equations are called equal as neither has a real solution, and are not multiples of each other."""
    import sympy

    if not (isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq)) or gold == answer:
        return False
    try:
        if sympy.solve(gold, list(gold.free_symbols)):
            return False
    except NotImplementedError:
        pass  # sympy cannot solve for f and x at once
    sides = [equation.lhs - equation.rhs for equation in (gold, answer)]
    return not sympy.simplify(sides[0] / sides[1]).is_number


@lru_cache(4096)
def parse(text: str) -> Readings:
    """The readings of a text by math-verify, the best first; empty where it finds none."""
    from math_verify import parse
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    # A box that is no LaTeX it can read must be matched as text: the other reader would take its last number for all.
    # Units are read here, as math-verify would take a last letter for one: 1 + s, 1 + m and 1 would be the same.
    spelling = replace(LatexExtractionConfig().normalization_config, units=False)
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)
    targets = (latex,) if BOX in text else (latex, ExprExtractionConfig())
    return tuple(parse(text, extraction_config=targets, parsing_timeout=None))
