"""Pairs of gold answers and completions with verdicts by hand: writings that a reader takes, and ways to look right.

`graded_answers.jsonl` holds them, a line each: gold, completion, and whether it is right.
"""

import json
import logging
from pathlib import Path

import pytest

from pspo_jax.verifiers import notation, quantities
from pspo_jax.verifiers.math_answer import canonical, final_answer
from pspo_jax.verifiers.workers.process import verify_math

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "graded_answers.jsonl").read_text("utf-8").splitlines()]
ALLOWED_REFUSALS = 0.03
"""Share of right answers that may be refused; of wrong ones, none may be accepted."""


@pytest.fixture(autouse=True)
def quiet():
    """math-verify warns that it is left without a time limit; here it has none."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def wrong_verdicts(right):
    """(gold, completion) of pairs that are right, or of those that are wrong, with another verdict."""
    pairs = [(pair["gold"], pair["completion"]) for pair in PAIRS if pair["right"] == right]
    return [pair for pair in pairs if (verify_math(pair[0], final_answer(pair[1]))[0] == 1.0) != right]


def test_no_wrong_answer_is_accepted():
    assert wrong_verdicts(right=False) == []


def test_right_answers_are_accepted_however_they_are_written():
    refused = wrong_verdicts(right=True)
    assert len(refused) <= ALLOWED_REFUSALS * sum(pair["right"] for pair in PAIRS), refused


def test_there_are_enough_pairs_of_either_verdict():
    assert min(sum(pair["right"] for pair in PAIRS), sum(not pair["right"] for pair in PAIRS)) >= 250


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "1 ",
            "1,",
            "1 hours ",
            "\\text{a}",
            "(",
            "{",
            "$",
            " and ",
            "1:",
            "1-",
            "\\pm",
            "answer is ",
            "or ",
            "°",
            "a.",
        ),
        *(
            "\\boxed{",
            "\\frac{1}{",
            "not ",
            "=",
            "^2",
            "½",
            "٤",
            "<<",
            "1/",
            "is ",
            "\\\\",
            "a^2 ",
            "between 1 and ",
            "a ",
            "\\mathrm{m}/",
            "\\frac{\\text{a}}{\\text{b}",
            "3 have ",
            "/(m",
            "cis ",
            "cis(1",
            "x_{",
        ),
    ],
)
@pytest.mark.parametrize("head", ["", "5 ", "answer: ", "5\\text{"])
def test_hostile_texts_are_read_at_once(head, piece):
    """White space and words that a pattern could split in every possible way would take it minutes."""
    text = (head + piece * 2000)[:2000]
    for spelled in (text, notation.respelled(text), notation.plain(text)):
        notation.group(spelled)
        notation.words(spelled)
        notation.stated(spelled)
        notation.hedged(spelled)
        notation.is_bare(spelled)
        notation.marked_unit(spelled)
        notation.tells(spelled)
        notation.sides(spelled)
        notation.larger_part(spelled)
        quantities.may_be_unit(spelled)
        quantities.same_unit(spelled, "m/s")
        quantities.PER.fullmatch(spelled)
        for read in (quantities.quantity, quantities.amounts, quantities.literal, quantities.number):
            read(spelled)


@pytest.mark.parametrize(
    "answers",
    [
        ("\\boxed{\\frac12}", "0.5", "\\boxed{\\dfrac{1}{2}}", "1/2", "The answer is $\\frac{2}{4}$."),
        ("\\boxed{\\text{March}}", "<answer>March</answer>", "<answer> **March** </answer>"),
        ("\\boxed{42}", "Answer: 42", "It is 42.", "42 apples", "\\boxed{42\\text{ cm}}"),
    ],
)
def test_equal_answers_have_one_name(answers):
    assert len({canonical(answer) for answer in answers}) == 1


def test_prose_that_states_nothing_has_no_name():
    assert [canonical(text) for text in ("I do not know.", "It is not 5.")] == [None, None]
