"""Names of answers: the number that the check has read, never the prose around it, and never slower than the check."""

import json

import pytest

from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.verifiers.math_answer import canonical, final_answer, score
from pspo_jax.verifiers.workers.pool import Pool, Request
from tests.conftest import DATA

PROSE = (
    "Each of the 3 boxes holds 4*5 = 20 pens. He gives 2 away. So the total number of pens that are left is 58.",
    "She makes 9 * 2 = $18 every day at the farmer's market.",
    "So the total amount of fabric is 2+1=3 bolts of fabric",
    "So he made a profit of 200,000-130,000=$70,000",
)


def test_a_name_is_the_number_in_the_prose():
    """Whether or not the verdict is right: a wrong answer is named by what was read of it, too."""
    assert [canonical(text) for text in PROSE] == ["58", "18", "3", "70000"]
    assert [score("17", text) for text in PROSE] == [(0.0, "58"), (0.0, "18"), (0.0, "3"), (0.0, "70000")]
    assert score("58", PROSE[0]) == (1.0, "58")
    assert canonical("I do not know.") is None and score("5", "I do not know.") == (0.0, None)


@pytest.mark.parametrize("gold", [None, "-0.123"], ids=["right", "wrong"])
def test_solutions_without_a_box_have_verdicts_and_numbers(gold):
    lines = (DATA / "math" / "gsm8k_test.jsonl").read_text().split("\n")
    rows = [json.loads(line)["answer"].rpartition("####") for line in lines if line]
    asks = [Request("math", {"gold": gold or n.strip(), "answer": final_answer(text)}) for text, _, n in rows]
    with Pool(VerifierConfig(workers=2)) as pool:
        replies = pool.submit(asks).result()
    assert [reply.reason for reply in replies if reply.score is None] == []
    assert sum(reply.answer == canonical(n) for reply, (_, _, n) in zip(replies, rows, strict=True)) >= 0.95 * len(rows)


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (("\\boxed{\\frac12}", "0.5", "\\boxed{\\frac{2}{4}}", "\\boxed{50\\%}"), "0.5"),
        (("\\boxed{18}", "18.0", "\\boxed{x = 18}", "\\boxed{18\\text{ cm}}", "18 cups", "9 * 2 = 18"), "18"),
        (("\\boxed{12345678901}", "12345678901.0"), "12345678901"),
        (("12345678902",), "12345678902"),
        (("\\boxed{-0.0}", "0"), "0"),
        (("\\boxed{\\sqrt 2}", "\\boxed{2^{1/2}}"), "1.414213562"),
        (("\\boxed{\\frac{1}{0}}",), "zoo"),
        (("\\boxed{0/0}",), "nan"),
        (("\\boxed{\\text{Evelyn}}",), "evelyn"),
        (("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}",), "Matrix([[1], [2]])"),
    ],
)
def test_equal_values_have_one_name(answers, name):
    assert [canonical(answer) for answer in answers] == [name] * len(answers)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^5}",
        "9^{9^5} + x",
        "\\{9^{9^5}, 2\\}",
        "\\begin{pmatrix}9^{9^5}\\\\2\\end{pmatrix}",
        "\\int_0^1 \\sin(x^x) dx",
        "\\sum_{n=1}^{1000000000} \\frac{1}{n^2+1}",
        "1" * 1900 + "x",
        "+".join(f"x^{{{i}}}" for i in range(100)),
    ],
)
def test_what_would_take_long_to_evaluate_has_a_short_name(answer):
    name = canonical(f"\\boxed{{{answer}}}")
    assert name and len(name) <= 200


def test_long_names_that_differ_at_their_end_differ():
    first, second = (canonical("\\boxed{" + "+".join(f"x^{{{i}}}" for i in range(n, 100)) + "}") for n in (2, 3))
    assert first != second and len(first) == len(second) == 200
