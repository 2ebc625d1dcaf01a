"""Short names of mathematical values, for majority votes and for the logs that show which answer was found.

Runs in worker processes after a check, on the expression that the check has parsed. A name must cost less than the
check, so only expressions are evaluated that need a bounded amount of arithmetic.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pspo_jax.verifiers.values import Parsed

if TYPE_CHECKING:
    import sympy

_LONGEST_NAME = 200
_LONGEST_INTEGER = 4000
"""Bits; Python refuses to write much longer whole numbers as decimals."""
_DIGITS = 10
"""Numbers that are not whole are equal if they agree in so many digits."""
_LARGEST_FIXED = 1e15
"""From here on a number that is not whole is written with an exponent."""


def name_of(value: Parsed) -> str:
    """A name of at most 200 characters for a value that math-verify read: a sympy object, or a text.

    Equal numbers get equal names: 1/2 and 0.5, 18 and 18.0. Whole numbers are named exactly; `x = 5` and `2 + 3 = 5`
    are named 5, as the check takes them. An integral, a limit, or a sum over a range is named as it is written; a value
    that sympy can neither evaluate nor write is named by its type.
    """
    try:
        return _name(value)
    except (ArithmeticError, TypeError, ValueError, NotImplementedError, RecursionError):
        return type(value).__name__  # the verdict stands, and must not be lost over a name


def _name(value: Parsed) -> str:
    import sympy

    if isinstance(value, sympy.MatrixBase):
        value = value.as_immutable()
    if not isinstance(value, sympy.Basic):
        return _shortened(str(value).strip())
    if isinstance(value, sympy.Eq) and (value.lhs.is_Symbol or value.lhs.is_number) and value.rhs.is_number:
        value = value.rhs
    if getattr(value, "is_number", False) and not value.is_Matrix and not value.has(*_unbounded()):
        return _number_name(value.xreplace({per: per.args[0] for per in value.atoms(sympy.UnevaluatedExpr)}))
    lengthy = any(max(abs(n.p), n.q).bit_length() > _LONGEST_INTEGER for n in value.atoms(sympy.Rational))
    return _shortened(str(value.evalf(_DIGITS) if lengthy else value))


def _unbounded() -> tuple[type, ...]:
    """Types of expressions whose evaluation has no bound on its time."""
    import sympy
    from sympy.concrete.expr_with_limits import ExprWithLimits

    return (ExprWithLimits, sympy.Derivative, sympy.Limit)


def _number_name(number: sympy.Expr) -> str:
    whole = _whole(number)
    if whole is not None and whole.bit_length() <= _LONGEST_INTEGER:
        return str(whole)
    value = number.evalf(_DIGITS)
    if value.is_real and value.is_finite and abs(value) < _LARGEST_FIXED:
        return f"{float(value):.{_DIGITS}g}"
    return _shortened(str(value))


def _whole(number: sympy.Expr) -> int | None:
    """The whole number that a rational or a decimal equals; None if it equals none."""
    if number.is_Integer:
        return int(number)
    if number.is_Float and number.is_finite and (number - int(number)).is_zero:
        return int(number)
    return None


def _shortened(text: str) -> str:
    """A text, or its beginning and a hash, so that different texts keep different names."""
    if len(text) <= _LONGEST_NAME:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{text[: _LONGEST_NAME - len(digest) - 4]}... {digest}"
