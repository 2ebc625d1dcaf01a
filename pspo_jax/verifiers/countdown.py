"""Countdown: whether an expression uses each given number once and has the target's value.

Completions are written by a model that is rewarded for finding holes. So an expression may hold the characters of an
alphabet only, and its value comes from a walk over its syntax tree that knows integers and four operators. Nothing is
ever evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from pspo_jax.verifiers import boxed

MAX_CHARS = 200
"""Characters of the longest expression that is read, which bounds the parser's time and depth."""
WRONG = 0.1
"""Score of an expression in the right place with the wrong value."""

_TYPOGRAPHY = {"×": "*", "·": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
_ALPHABET = re.compile(r"[0-9+\-*/() \t]+")
_LEADING_ZERO = re.compile(r"(?<![0-9])0[0-9]")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def expression_value(text: str, numbers: Sequence[int]) -> Fraction | None:
    """The exact value of an expression of + - * / and parentheses with each number used once; None for others."""
    value, used = evaluated(text)
    return value if Counter(used) == Counter(numbers) else None


def evaluated(text: str) -> tuple[Fraction | None, list[int]]:
    """The value of an expression of + - * / and parentheses (None for anything else), and the numbers in it."""
    if len(text) > MAX_CHARS:
        return None, []
    for sign, ascii_sign in _TYPOGRAPHY.items():
        text = text.replace(sign, ascii_sign)
    text = text.strip()
    # Python reads 00 as 0, but 00 is no number.
    if not _ALPHABET.fullmatch(text) or _LEADING_ZERO.search(text):
        return None, []
    used: list[int] = []
    try:
        return _walk(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, []


def _walk(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a syntax tree, whose numbers are appended to `used`.

    Raises:
      ValueError: the tree holds something other than arithmetic.
      ZeroDivisionError: it divides by 0.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.left, used), _walk(node.right, used))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def answer_of(completion: str) -> str | None:
    """The text in the last complete <answer></answer>, or else in the last complete \\boxed{}; None without both."""
    # The answer lies between the last opening tag that is closed and the next closing tag. The searches are linear.
    start = completion.rfind("<answer>", 0, max(0, completion.rfind("</answer>")))
    if start >= 0:
        start += len("<answer>")
        return completion[start : completion.find("</answer>", start)]
    return boxed.last_complete(completion)


def score(expression: str | None, numbers: Sequence[int], target: int) -> float:
    """1 for an expression of the numbers with the target's value, 0.1 for any other text, 0 for no text.

    One `= target` at the end is ignored, if its right side is the target's digits.
    """
    if expression is None or not expression.strip():
        return 0.0
    left, _, right = expression.rpartition("=")
    if left and right.strip() == str(target):
        expression = left
    return 1.0 if expression_value(expression, numbers) == target else WRONG
