"""Verdicts on mathematical answers: real data sets, perturbed answers, and the part of a text that is its answer."""

import json
import logging
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.verifiers.math_answer import ALTERNATIVES, canonical, final_answer
from pspo_jax.verifiers.workers.pool import Pool, Request
from pspo_jax.verifiers.workers.process import verify_gold, verify_math
from tests.conftest import DATA, EVERY_ROW, every_row

MEGABYTE = 1_000_000
MATH = DATA / "math"
FOLDERS = [pytest.param(MATH, id="sample"), pytest.param(EVERY_ROW, marks=every_row, id="every row")]

pytestmark = pytest.mark.xdist_group("pool")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """math-verify warns that it is left without a time limit; the pool has one."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


@pytest.fixture(scope="module")
def pool():
    with Pool(VerifierConfig(workers=2, deadline=20.0)) as pool:
        yield pool


def golds(name, folder=MATH):
    """Gold answers of a data set, each a list of alternatives."""
    path = folder / f"{name}.jsonl"
    found = [json.loads(line)["answer"] for line in path.read_text().split("\n") if line]
    if name.startswith("gsm8k"):
        found = [answer.rpartition("####")[2] for answer in found]
    return [[str(a).strip() for a in (answer if isinstance(answer, list) else [answer])] for answer in found if answer]


def scores(pool, pairs):
    """Verdicts on (alternatives, what the box holds)."""
    answers = [(gold, final_answer(f"So the answer is $\\boxed{{{answer}}}$.")) for gold, answer in pairs]
    requests = [Request("math", {"gold": ALTERNATIVES.join(gold), "answer": answer}) for gold, answer in answers]
    return [reply.score for reply in pool.submit(requests).result()]


def perturbed(gold, rng):
    """A wrong answer: another digit, or one more."""
    digits = [i for i, char in enumerate(gold) if char in "0123456789"]
    if not digits:
        return gold + "+1"
    i = rng.choice(digits)
    return gold[:i] + rng.choice([d for d in "0123456789" if d != gold[i]]) + gold[i + 1 :]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("math500", (24, 500)),
        ("aime24", (4, 30)),
        ("amc23", (4, 40)),
        ("gsm8k_test", (40, 1319)),
        ("minerva", (8, 272)),
        ("olympiadbench", (10, 675)),
        ("math_train", (16, 7470)),
    ],
)
def test_gold_answers_are_right(pool, folder, name, sizes):
    rows = golds(name, folder)
    assert len(rows) == sizes[folder != MATH]
    pairs = [(gold, answer) for gold in rows for answer in gold]
    assert [pair for pair, score in zip(pairs, scores(pool, pairs), strict=True) if score != 1] == []


def test_whole_numbers_written_as_floats(pool):
    rows = golds("amc23")
    assert all(gold[0].endswith(".0") for gold in rows)
    assert scores(pool, [(gold, gold[0].removesuffix(".0")) for gold in rows]) == [1.0] * len(rows)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["math500", "aime24", "amc23"])
def test_perturbed_answers_are_wrong(pool, folder, name, seed):
    rng = random.Random(seed)
    pairs = [(gold, perturbed(gold[0], rng)) for gold in golds(name, folder)]
    assert [pair for pair, score in zip(pairs, scores(pool, pairs), strict=True) if score != 0] == []


SAME = [
    ("52_8", "52_{8}"),
    ("4210_{5}", "4210_5"),
    ("50\\%", "50"),
    ("50\\%", "0.5"),
    ("50", "50\\%"),
    ("10\\text{ cm}", "10"),
    ("10", "10 \\text{ cm}"),
    ("10\\text{ cm}^2", "10\\mbox{ cm}^{2}"),
    ("864 \\mbox{ inches}^2", "864"),
    ("\\$5", "5"),
    ("30^\\circ", "30"),
    ("\\frac12", "0.5"),
    ("\\frac{1}{2}", "\\frac{2}{4}"),
    ("\\frac{3}{2}", "1\\frac{1}{2}"),
    ("\\frac13", "0.3333333"),
    ("1,000", "1000"),
    ("1000", "1{,}000"),
    ("3\\times 10^8", "300000000"),
    ("10^{-5}", "0.00001"),
    ("8.224 \\times 10^{-19}", "82.24 \\cdot 10^{-20}"),
    ("\\frac{1}{2^{98}}", "2^{-98}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("\\sqrt{2}", "2^{1/2}"),
    ("5!", "120"),
    ("3 \\pm 2\\sqrt{2}", "3+2\\sqrt2, 3-2\\sqrt2"),
    ("[0,1)", "[0,1)"),
    ("x \\in [1,2]", "[1,2]"),
    ("x>3", "(3,\\infty)"),
    ("(-\\infty,3)\\cup(5,\\infty)", "(5,\\infty)\\cup(-\\infty,3)"),
    ("\\{1,2,3\\}", "\\{3,2,1\\}"),
    ("1,2,3", "3, 2, 1"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{Evelyn}", "\\text{evelyn}"),
    ("\\text{(B)}", "B"),
    ("B", "\\text{B}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]

DIFFERENT = [
    ("52_8", "52_5"),
    ("52_{8}", "52_{5}"),
    ("1010_2", "10_{10}"),
    ("50\\%", "5\\%"),
    ("10\\text{ cm}^2", "10\\text{ cm}^3"),
    ("\\frac13", "0.333"),
    ("2", "2.0001"),
    ("-1", "1"),
    ("33", "33.3"),
    ("8.224 \\times 10^{-19}", "4.224 \\times 10^{-19}"),
    ("4.6 \\times 10^{-24}", "4.6 \\times 10^{-21}"),
    ("1.325 \\times 10^{-27}", "0"),
    ("\\frac{1}{2^{98}}", "\\frac{3}{2^{98}}"),
    ("x^2+2x+1", "(x+1)^3"),
    ("p-q", "q-p"),
    ("3+4i", "4+3i"),
    ("7", "7 \\text{ or } 8"),
    ("5", "6, 5"),
    ("5", "\\{5,6\\}"),
    ("1,2", "1"),
    ("3 \\pm 2", "5"),
    ("[1,2]", "(1,2)"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("x>3", "x<3"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("-\\infty", "\\infty"),
    ("6:30", "6:45"),
    ("\\text{Evelyn}", "\\text{Angela}"),
    ("\\text{even}", "\\text{odd}"),
    ("\\text{(B)}", "C"),
    ("A", "ABCDE"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
]


def test_notations_of_the_same_answer(pool):
    found = scores(pool, [([gold], answer) for gold, answer in SAME])
    assert [pair for pair, score in zip(SAME, found, strict=True) if score != 1] == []


def test_answers_that_differ(pool):
    found = scores(pool, [([gold], answer) for gold, answer in DIFFERENT])
    assert [pair for pair, score in zip(DIFFERENT, found, strict=True) if score != 0] == []


def test_any_alternative_is_right():
    gold = ALTERNATIVES.join(["\\text{none}", "0", "\\emptyset"])
    assert [verify_math(gold, f"\\boxed{{{a}}}")[0] for a in ("0", "\\emptyset", "none", "1")] == [1.0, 1.0, 1.0, 0.0]


def test_unreadable_answers():
    """No answer is wrong; no gold answer is no verdict, and does not verify itself; a megabyte is wrong unread."""
    assert verify_math("5", None) == (0.0, None)
    assert verify_math("5", "\\boxed{}")[0] == 0.0
    assert verify_math("", "\\boxed{5}")[0] is None
    assert verify_math("5", "5" * MEGABYTE) == (0.0, None)
    assert verify_gold("\\frac12") == (1.0, canonical("0.5"))
    assert verify_gold("") == (0.0, None)


def test_canonical_names_for_votes():
    assert canonical("\\boxed{\\frac12}") == canonical("0.5") == canonical("\\boxed{\\frac{2}{4}}")
    assert canonical("\\boxed{3}") != canonical("\\boxed{4}")
    assert canonical("\\boxed{}") is None
    # A right answer has the name of the gold one, however it is written.
    assert verify_math("x^2+2x+1", "\\boxed{(x+1)^2}")[1] == verify_math("x^2+2x+1", "\\boxed{1+2x+x^2}")[1]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("first \\boxed{1}, then \\boxed{2}.", "\\boxed{2}"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\boxed{\\frac{1}{\\sqrt{2}}}"),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("\\boxed{7} and then \\boxed{8", "\\boxed{7}"),
        ("$\\boxed{3}$ and $\\boxed{5}$", "\\boxed{3}$ and $\\boxed{5}"),
        ("\\boxed{3}, \\boxed{5}", "\\boxed{3}, \\boxed{5}"),
        ("\\boxed{3}, and \\boxed{5}", "\\boxed{3}, and \\boxed{5}"),
        ("\\boxed{3} or\n\\boxed{5}", "\\boxed{3} or\n\\boxed{5}"),
        ("\\boxed{3}\n\\boxed{5}", "\\boxed{5}"),
        ("\\boxed{3}. Check: \\boxed{5}", "\\boxed{5}"),
        ("<think>\\boxed{1}</think>\n\\boxed{2}", "\\boxed{2}"),
        ("<think>\\boxed{1}</think>\nIt is 2.", "It is 2."),
        ("<think>\\boxed{1}", "\\boxed{1}"),
        ("<answer>4</answer>", "<answer>4</answer>"),
        ("<answer>3</answer> no, <answer> 4 </answer> bye", "<answer> 4 </answer>"),
        ("It is 3, not <answer>4</answer>", "It is 3, not <answer>4</answer>"),
        ("<answer>\\boxed{4}</answer>", "\\boxed{4}"),
        ("<answer>4", "<answer>4"),
        ("It is 12.", "It is 12."),
        ("x" * 600 + "12", "x" * 498 + "12"),
        ("", None),
        (" \n ", None),
        ("<think>12</think>", None),
        ("<answer> </answer>", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


PIECES = ("\\boxed{", "{", "}", "\\boxed", "<answer>", "</answer>", "</think>", " and ", ",", "$", "1", "x", "\n", "é")


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60))
def test_final_answer_is_part_of_the_completion(completion):
    found = final_answer(completion)
    assert found is None or (found and found in completion.rpartition("</think>")[2])
    if found and found.startswith("\\boxed{"):
        assert found.count("{") == found.count("}") or "<answer>" in completion or not found.endswith("}")


@pytest.mark.parametrize(
    "piece", [*PIECES, "\\boxed{1},", "\\boxed{1} and ", "\\boxed{}", "{}", "<answer></answer>", " $"]
)
def test_final_answer_takes_linear_time(piece):
    for text in (piece * (MEGABYTE // len(piece)), "\\boxed{" + piece * (MEGABYTE // len(piece)) + "\\boxed{2}"):
        start = time.process_time()
        final_answer(text)
        assert time.process_time() - start < 0.5
