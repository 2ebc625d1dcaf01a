"""Countdown: an expression that uses each given number once and hits the target.

Completions are written by a policy that is paid to find holes, so an expression has to pass an alphabet and a walk
over its syntax tree that knows integers and four operators; nothing is ever evaluated as code.
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
"""Longer expressions are rejected unread: what the parser costs, and how deep it nests, stays bounded."""
WRONG = 0.1
"""Reward of an expression in the right place with the wrong value."""

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
    """Exact value of an expression of + - * / and parentheses with each number used once; None for anything else."""
    value, used = evaluated(text)
    return value if Counter(used) == Counter(numbers) else None


def evaluated(text: str) -> tuple[Fraction | None, list[int]]:
    """Value of an expression of + - * / and parentheses, None for anything else; and its numbers."""
    if len(text) > MAX_CHARS:
        return None, []
    for sign, ascii_sign in _TYPOGRAPHY.items():
        text = text.replace(sign, ascii_sign)
    text = text.strip()
    # Python reads 00 as 0; nobody who writes numbers does.
    if not _ALPHABET.fullmatch(text) or _LEADING_ZERO.search(text):
        return None, []
    used: list[int] = []
    try:
        return _walk(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, []


def _walk(node: ast.expr, used: list[int]) -> Fraction:
    """Value of a syntax tree; its numbers are appended to `used`. ValueError for what is not arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.left, used), _walk(node.right, used))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def answer_of(completion: str) -> str | None:
    """Text in the last complete <answer></answer>; without one, in the last complete \\boxed{}; None without both."""
    # The last opening tag that is closed at all, up to the first tag that closes it: each search is one pass.
    start = completion.rfind("<answer>", 0, max(0, completion.rfind("</answer>")))
    if start >= 0:
        start += len("<answer>")
        return completion[start : completion.find("</answer>", start)]
    return boxed.last_complete(completion)


def score(expression: str | None, numbers: Sequence[int], target: int) -> float:
    """1 for an expression of the numbers with the target's value, 0.1 for any other text, 0 for none.

    One trailing `= target` is forgiven; a right side other than the target's digits is not.
    """
    if expression is None or not expression.strip():
        return 0.0
    left, _, right = expression.rpartition("=")
    if left and right.strip() == str(target):
        expression = left
    return 1.0 if expression_value(expression, numbers) == target else WRONG
