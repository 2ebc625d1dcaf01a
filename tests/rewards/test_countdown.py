"""The Countdown score: expressions count, and nothing else does."""

from __future__ import annotations

import re
import time
import warnings
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.verifiers.countdown import MAX_CHARS, answer_of, expression_value, score

MEGABYTE = 1_000_000

# --- two evaluators that share nothing with the reward: one of trees, one of text ---

leaves = st.integers(0, 120)
trees = st.recursive(leaves, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=7)
signs = {"+": ["+", " + "], "-": ["-", " − "], "*": ["*", "×", "·", r" \times ", r"\cdot "], "/": ["/", "÷", r" \div "]}


def calculate(op, a, b):
    """`a op b`; None if that is no number."""
    if a is None or b is None or (op == "/" and b == 0):
        return None
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: Fraction(a) / b}[op]()


def tree_value(tree):
    return Fraction(tree) if isinstance(tree, int) else calculate(tree[1], tree_value(tree[0]), tree_value(tree[2]))


def numbers_of(tree):
    return [tree] if isinstance(tree, int) else numbers_of(tree[0]) + numbers_of(tree[2])


def written(tree, draw):
    """A tree as text, operators in any of their spellings and every operation in parentheses."""
    if isinstance(tree, int):
        return str(tree)
    return f"({written(tree[0], draw)}{draw(st.sampled_from(signs[tree[1]]))}{written(tree[2], draw)})"


def read(text):
    """Value of an expression by recursive descent; None for what is none."""
    tokens = [*re.findall(r"\d+|[-+*/()]", text), "end"]
    if any(len(t) > 1 and t[0] == "0" for t in tokens) or re.search(r"\d\s+\d", text):
        return None
    at = 0

    def atom():
        nonlocal at
        token = tokens[at]
        at += 1
        if token.isdigit():
            return Fraction(token)
        assert token == "("
        value = chain("+-")
        assert tokens[at] == ")"
        at += 1
        return value

    def chain(ops):
        nonlocal at
        inner = atom if ops == "*/" else lambda: chain("*/")
        value = inner()
        while tokens[at] in ops:
            at += 1
            value = calculate(tokens[at - 1], value, inner())
        return value

    try:
        value = chain("+-")
        return value if tokens[at] == "end" else None
    except AssertionError:
        return None


@given(st.data())
def test_random_trees(data):
    tree = data.draw(trees)
    text, numbers = written(tree, data.draw), numbers_of(tree)
    assert len(text) > MAX_CHARS or expression_value(text, data.draw(st.permutations(numbers))) == tree_value(tree)
    assert expression_value(text, [*numbers, 1]) is None
    assert expression_value(text, numbers[1:]) is None
    assert expression_value(text, [numbers[0] + 1, *numbers[1:]]) is None


@given(st.text("123+-*/() ", max_size=12) | st.lists(st.sampled_from(["10", "0", "7", *"+-*/()"])).map("".join))
def test_agrees_with_recursive_descent(text):
    assert expression_value(text, [int(n) for n in re.findall(r"\d+", text)]) == read(text)


# --- tables ---


@pytest.mark.parametrize(
    ("text", "numbers", "value"),
    [
        ("3*5", [5, 3], 15),
        (" (55-36) * 2/1\n", [55, 36, 1, 2], 38),
        ("55 − 36 ÷ 2", [2, 36, 55], 37),
        (r"3 \times 5 \cdot 2 \div 4", [2, 3, 4, 5], Fraction(15, 2)),
        ("3×5·2", [2, 3, 5], 30),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),
        ("3-5", [3, 5], -2),
        ("((7))", [7], 7),
        ("5+0\t*3", [0, 3, 5], 5),
        ("10*100", [100, 10], 1000),
    ],
)
def test_expressions(text, numbers, value):
    assert expression_value(text, numbers) == value


HOLES = [
    ("3.5*2", [3, 5, 2]),
    ("3.*5", [3, 5]),
    (".3*5", [3, 5]),
    ("3e0+5", [3, 5]),
    ("3j+5", [3, 5]),
    ("2**3", [2, 3]),
    ("2* *3", [2, 3]),
    (r"2*\times 3", [2, 3]),
    ("2××3", [2, 3]),
    ("97**98**99", [97, 98, 99]),
    ("7//2", [7, 2]),
    ("7÷÷2", [7, 2]),
    (r"7\div\div 2", [7, 2]),
    ("7%2", [7, 2]),
    ("7@2", [7, 2]),
    ("7<<2", [7, 2]),
    ("7|2", [7, 2]),
    ("7^2", [7, 2]),
    ("~7+2", [7, 2]),
    ("--3", [3]),
    ("-3", [3]),
    ("-3", [-3]),
    ("+3", [3]),
    ("3+-5", [3, 5]),
    ("3-(-5)", [3, 5]),
    ("3−−5", [3, 5]),
    ("not 3", [3]),
    ("abs(3)", [3]),
    ("abs(abs(3))", [3]),
    ("x", []),
    ("__import__('os').system('x')", []),
    ("(lambda: 3)()", [3]),
    ("3 if 1 else 2", [3, 1, 2]),
    ("[3 for _ in (5,)]", [3, 5]),
    ("(n:=3)+5", [3, 5]),
    ("3,5", [3, 5]),
    ("(3,)", [3]),
    ("()", []),
    ("[3][0]", [3, 0]),
    ("{3}", [3]),
    ("*3", [3]),
    ("(3).real", [3]),
    ("'3'+'5'", [3, 5]),
    ("f'{3}'", [3]),
    ("0x3", [3]),
    ("0o3", [3]),
    ("0b11", [3]),
    ("1_0", [10]),
    ("00", [0]),
    ("03+5", [3, 5]),
    ("00+5", [0, 5]),
    ("5+00", [0, 5]),
    ("1_0+5", [10, 5]),
    ("３+５", [3, 5]),
    ("٣+5", [3, 5]),
    ("3²", [3, 2]),
    ("3\uff0b5", [3, 5]),
    ("3\u200b+5", [3, 5]),
    ("3+5\0", [3, 5]),
    ("3+5#2", [3, 5]),
    ("3+5#2", [3, 5, 2]),
    ("3+\n5", [3, 5]),
    ("(3+\n5)", [3, 5]),
    ("3\\\n+5", [3, 5]),
    ("3+5\r*2", [3, 5, 2]),
    ("3==3", [3, 3]),
    ("3<5", [3, 5]),
    ("3;5", [3, 5]),
    ("3=3", [3, 3]),
    ("3+5 = 8", [3, 5]),
    ("8 = 3+5", [3, 5]),
    ("= 8", [8]),
    ("3+5 apples", [3, 5]),
    ("$3+5$", [3, 5]),
    ("3 and 5", [3, 5]),
    ("True+5", [1, 5]),
    ("None", []),
    ("...", []),
    ("2(3+4)", [2, 3, 4]),
    ("(2)(3)", [2, 3]),
    ("3 5", [3, 5]),
    ("3 5", [35]),
    ("35", [3, 5]),
    ("3+3", [3, 5]),
    ("3+3", [3]),
    ("3+5+5", [3, 5]),
    ("3", [3, 5]),
    ("3+5", [3, 5, 5]),
    ("3+5+1", [3, 5]),
    ("8", [3, 5]),
    ("3/0", [3, 0]),
    ("3/(5-5)", [3, 5, 5]),
    ("(3+5", [3, 5]),
    ("3+5)", [3, 5]),
    (")3+5(", [3, 5]),
    ("3+", [3]),
    ("", []),
    (" ", []),
    ("\ud800", []),
]


@pytest.mark.parametrize(("text", "numbers"), HOLES)
def test_holes(text, numbers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expression_value(text, numbers) is None


def test_a_zero_factor_hides_no_foreign_number():
    assert expression_value("24+0*17", [24, 0]) is None
    assert expression_value("24*17/17", [24]) is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * MEGABYTE,
        "1" + "+1" * (MEGABYTE // 2),
        "-" * MEGABYTE + "1",
        "9" * MEGABYTE,
        " " * MEGABYTE + "1",
        "=" * MEGABYTE,
        "1=" * (MEGABYTE // 2),
        "×" * MEGABYTE,
        r"\times" * (MEGABYTE // 6),
        "(" * 99 + "1" + ")" * 99 + " " * 3,
        "1+(" * 50 + "1" + ")" * 50,
        "(" * 200,
        "1(" * 100,
        "-" * 199 + "1",
    ],
)
def test_large_expressions_are_refused_at_once(text):
    start = time.perf_counter()
    assert expression_value(text, [1]) is None and score(text, [1], 1) == 0.1
    assert time.perf_counter() - start < 0.5


def test_longest_expression():
    text = "1" + "+1" * 99
    assert expression_value(text + " ", [1] * 100) == 100
    assert expression_value(text + "  ", [1] * 100) is None
    assert expression_value("(" * 99 + "7" + ")" * 99, [7]) == 7


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>3+5</think> <answer>3*5</answer>", "3*5"),
        ("<answer> 3*5\n</answer> done", " 3*5\n"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1</answer> no: <answer>2", "1"),
        ("<answer>1</answer> 2</answer>", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("1</answer>", None),
        ("<ANSWER>1</ANSWER>", None),
        ("3*5", None),
        ("", None),
        (r"<answer>1</answer> \boxed{2}", "1"),
        (r"<answer>1 \boxed{2}", "2"),
        (r"<answer>\boxed{2}</answer>", r"\boxed{2}"),
        (r"so \boxed{3*5}.", "3*5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{1} and \boxed{{2}", "1"),
        (r"\boxed{\frac{6}{2}} {}", r"\frac{6}{2}"),
        (r"\boxed{1+\boxed{2}}", "2"),
        (r"\boxed{1+\boxed{2}", "2"),
        (r"}} {{ \boxed{1} }", "1"),
        (r"\boxed{", None),
        (r"\boxed 3", None),
    ],
)
def test_answers(completion, answer):
    assert answer_of(completion) == answer


@pytest.mark.parametrize(
    "part", ["<answer>", "</answer>", "</answer><answer>", r"\boxed{", "{", "}", r"\boxed{}", r"\boxed", "<", "\\"]
)
@pytest.mark.parametrize("end", ["", "</answer>", "}", "<answer>"])
def test_answers_in_large_texts(part, end):
    start = time.perf_counter()
    score(answer_of(part * (MEGABYTE // len(part)) + end), [1], 1)
    assert time.perf_counter() - start < 3  # a quadratic search takes minutes


@pytest.mark.parametrize(
    ("expression", "reward"),
    [
        ("(55-36)*2/1", 1),
        ("(55-36)*2/1 = 38", 1),
        ("(55 − 36) × 2 ÷ 1 =38\n", 1),
        ("(55-36)*2/1 = 38 = 38", 0.1),
        ("(55-36)*2/1 == 38", 0.1),
        ("(55-36)*2/1 = 038", 0.1),
        ("(55-36)*2/1 = 38.0", 0.1),
        ("(55-36)*2/1 = 19*2", 0.1),
        ("(55-36)*2/1 = 39", 0.1),
        ("(55-36)*2/1 = ３８", 0.1),
        ("(55-36)*2/1 =", 0.1),
        ("38 = (55-36)*2/1", 0.1),
        ("55+36+2+1 = 38", 0.1),
        ("= 38", 0.1),
        ("38", 0.1),
        ("(55-36)*2", 0.1),
        ("55-36*2/1", 0.1),
        ("I do not know", 0.1),
        (" \n", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_scores(expression, reward):
    assert score(expression, [1, 2, 36, 55], 38) == reward


def test_values_are_exact():
    assert score("1/3*3", [1, 3, 3], 1) == 1
    assert score("9007199254740993-1", [9007199254740993, 1], 9007199254740993) == 0.1
    assert score("8/3", [8, 3], 2) == 0.1


@given(st.text() | st.text("0123456789+-*/()=<>{}\\ \n._#×÷") | st.none(), st.lists(st.integers()), st.integers())
def test_score_never_raises(text, numbers, target):
    assert score(text, numbers, target) in (0, 0.1, 1)
    assert score(answer_of(f"<answer>{text}</answer>"), numbers, target) in (0, 0.1, 1)
