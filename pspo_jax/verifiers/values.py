"""Formulas compared by their values: complex numbers, and logarithms at points where they are defined.

All functions take expressions as math-verify parses them: unevaluated, with i as a symbol.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import mpmath
    import sympy

Parsed: TypeAlias = "sympy.Basic | str"
"""A value that math-verify reads in a text: a sympy object, or a text that is no mathematics."""
_DIGITS = 120
"""Decimal digits of computed values."""
_ALIKE = 1e-100
"""Relative difference up to which two values of _DIGITS digits are equal. It is so small that no large part of a value
hides a small one."""
_LONGEST = 300
"""Nodes of the longest expression whose value is computed."""
_POINTS = 48
"""Points at which two formulas are compared."""
_MOST_VARIABLES = 8
_LARGEST = 1000
"""Exponents and arguments beyond it are not evaluated."""


def complex_verdict(gold: Parsed, answer: Parsed, decimal: bool) -> bool | None:
    """Whether an answer equals a complex gold answer; None where gold is real or no number, or i may be a variable.

    i is the imaginary unit where a gold answer has no other letter and is linear in it, or holds a root of a negative
    number or a quotient; i(i+1)/2 remains a formula.

    Args:
      decimal: whether one of them is written with a decimal point; then six decimals have to agree.
    """
    import sympy

    if isinstance(gold, str):
        return None
    gold, answer = _right_sides(gold, answer)
    unit = [symbol for symbol in _symbols(gold) if symbol.name == "i"]
    if not isinstance(gold, sympy.Expr) or len(_symbols(gold)) != len(unit):
        return None
    if not unit and not any(power.base.is_negative for power in gold.atoms(sympy.Pow)):
        return None
    if unit and gold.is_polynomial(*unit) and sympy.degree(gold, unit[0]) != 1:
        return None
    wanted = _complex_value(gold)
    if wanted is None or abs(wanted[1]) < 1e-12 * max(1, abs(wanted[0])):
        return None
    given = _complex_value(answer)
    if given is None:
        return None if _symbols(answer) else False
    size = max(abs(part) for part in wanted)
    margin = max(5e-7 * min(1, size), 1e-14 * size) if decimal else _ALIKE * size
    return all(abs(one - other) <= margin for one, other in zip(wanted, given, strict=True))


def _symbols(expression: Parsed) -> set[sympy.Symbol]:
    return getattr(expression, "free_symbols", set())


def _right_sides(gold: sympy.Basic, answer: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """The expressions behind `z =`; two equations for different names stay as they are."""
    import sympy

    named = [isinstance(one, sympy.Eq) and one.lhs.is_Symbol and one.lhs.name != "i" for one in (gold, answer)]
    if all(named) and gold.lhs.name != answer.lhs.name:
        return gold, answer
    return gold.rhs if named[0] else gold, answer.rhs if named[1] else answer


def _complex_value(expression: sympy.Basic) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The real and the imaginary part of a number; None for anything that is no number, or not finite."""
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit):
        return None
    number = expression.xreplace({symbol: sympy.I for symbol in _symbols(expression) if symbol.name == "i"})
    if _symbols(number):
        return None
    try:
        parts = number.evalf(_DIGITS).as_real_imag()
        return parts if all(part.is_Float or part.is_Integer for part in parts) else None
    except (ArithmeticError, TypeError, ValueError, NotImplementedError):
        return None


def equal_logarithms(gold: Parsed, answer: Parsed) -> bool:
    """Whether two formulas with logarithms are equal wherever they are defined as real numbers.

    Both must be defined at the same points, of either sign, so that ln x is neither ln |x| nor half of ln x^2. Where
    logarithms are of products of single variables only, these stand for positive quantities: ln(x/y) is ln x - ln y.
    """
    import sympy

    gold, answer = _right_sides(gold, answer)
    both = (gold, answer)
    if not all(isinstance(one, sympy.Expr) for one in both) or not any(one.has(sympy.log) for one in both):
        return False
    names = [{symbol.name for symbol in _symbols(one)} for one in both]
    if names[0] != names[1] or not 1 <= len(names[0]) <= _MOST_VARIABLES:
        return False
    if any(sum(1 for _ in sympy.preorder_traversal(one)) > _LONGEST for one in both):
        return False
    positive = all(_is_monomial(log.args[0]) for one in both for log in one.atoms(sympy.log))
    try:
        return _agree(gold, answer, sorted(names[0]), positive)
    except (_Unreadable, OverflowError, TypeError, ValueError):
        return False


def _is_monomial(argument: sympy.Expr) -> bool:
    """Whether an argument is a positive number times powers of different variables, all of them odd."""
    import sympy

    seen = []
    for factor in sympy.Mul.make_args(argument):
        base, exponent = factor.as_base_exp()
        if factor.is_number and factor.is_positive:
            continue
        if not (exponent.is_Rational and exponent.p % 2 and (base.is_Symbol or (base.is_Mul and _is_monomial(base)))):
            return False
        seen += list(base.free_symbols)
    return len(seen) == len(set(seen))


def _agree(gold: sympy.Expr, answer: sympy.Expr, names: list[str], positive: bool) -> bool:
    """Whether two formulas have equal values at random points; `positive` = negative points may differ."""
    import mpmath

    rng = random.Random(0)
    shared = 0
    with mpmath.workdps(_DIGITS):
        for i in range(_POINTS):
            point = {
                name: mpmath.mpf(rng.randrange(101, 2999)) / 1009 * (1 if i % 2 else rng.choice([1, -1]))
                for name in names
            }
            one, other = (_real_value(side, point) for side in (gold, answer))
            if one is None or other is None:
                if (one is None) != (other is None) and not (positive and min(point.values()) < 0):
                    return False
                continue
            if abs(one - other) > _ALIKE * max(abs(one), abs(other)):
                return False
            shared += 1
    return shared >= 6


class _Unreadable(Exception):
    """The value of an expression cannot be computed here."""


class _Undefined(Exception):
    """An expression has no real value at a point."""


def _real_value(expression: sympy.Expr, point: Mapping[str, mpmath.mpf]) -> mpmath.mpf | None:
    """The value at a point; None where the expression has no real value."""
    try:
        return _real(expression, point)
    except (_Undefined, ZeroDivisionError):
        return None


def _real(expression: sympy.Expr, point: Mapping[str, mpmath.mpf]) -> mpmath.mpf:
    """The value at a point.

    Raises:
      _Undefined, ZeroDivisionError: the expression has no real value there.
      _Unreadable: the value cannot be computed here.
    """
    import mpmath
    import sympy

    if expression.is_Symbol:
        return point[expression.name]
    if expression.is_Rational:
        return mpmath.mpf(expression.p) / expression.q
    if expression.is_Float or expression in (sympy.pi, sympy.E):
        return mpmath.mpf(expression.evalf(_DIGITS)._mpf_)
    arguments = [_real(argument, point) for argument in expression.args]
    if expression.is_Add:
        return mpmath.fsum(arguments)
    if expression.is_Mul:
        return mpmath.fprod(arguments)
    if isinstance(expression, sympy.log):
        if min(arguments) <= 0:
            raise _Undefined
        return mpmath.log(*arguments)
    if arguments and abs(arguments[-1]) > _LARGEST:
        raise _Unreadable
    if isinstance(expression, sympy.exp):
        return mpmath.exp(arguments[0])
    if expression.is_Pow:
        return _power(*arguments)
    functions = {sympy.Abs: abs, sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan}
    if expression.func not in functions:
        raise _Unreadable
    return functions[expression.func](arguments[0])


def _power(base: mpmath.mpf, exponent: mpmath.mpf) -> mpmath.mpf:
    """A power of real numbers. Conventions on odd roots of negative numbers differ, so these are not computed."""
    import mpmath

    if base > 0 or exponent == int(exponent):
        return mpmath.power(base, exponent)
    if exponent * 2 == int(exponent * 2):
        if not base and exponent > 0:
            return mpmath.mpf(0)
        raise _Undefined
    raise _Unreadable
