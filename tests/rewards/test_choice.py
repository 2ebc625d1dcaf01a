"""Multiple choice: the letter that a completion settles on."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.verifiers.multiple_choice import chosen
from pspo_jax.verifiers.workers.process import verify_choice

TEXTS = ("pear", "apple", "a plum", "42 cm")
WRITINGS = [
    json.loads(line) for line in (Path(__file__).parent / "graded_choices.jsonl").read_text("utf-8").splitlines()
]


def test_letters_are_found_in_all_usual_writings_and_hedges_settle_on_none():
    found = [(w["completion"], chosen(w["completion"], len(TEXTS), TEXTS)) for w in WRITINGS]
    assert found == [(w["completion"], w["letter"]) for w in WRITINGS]


def test_a_text_of_two_options_settles_on_none():
    assert chosen("\\boxed{one}", 3, ("one", "two", "one")) is None
    assert chosen("\\boxed{3}", 4, ("4", "3", "2", "1")) == "B"


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{ (B) }", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("\\boxed{B.}", "B"),
        ("\\boxed{A} no, \\boxed{C}", "C"),
        ("\\boxed{A}\nThe answer is B", "A"),
        ("<answer>D</answer>", "D"),
        ("<answer> (D) </answer>", "D"),
        ("<answer>D. a long option</answer>", "D"),
        ("<answer>D) an option</answer>", "D"),
        ("<answer>A</answer><answer>B</answer>", "B"),
        ("The answer is C.", "C"),
        ("the answer is (C)", "C"),
        ("**Answer:** C", "C"),
        ("Answer: **C**", "C"),
        ("ANSWER: C", "C"),
        ("Answer: A, or rather\nAnswer: B", "B"),
        ("We weigh A and B.\nB", "B"),
        ("We weigh A and B.\n(B).", "B"),
        ("<think>The answer is A</think>\nThe answer is B", "B"),
        ("<think>The answer is A</think>\nI cannot say.", None),
        ("The answer is Apple", None),
        ("\\boxed{A, B}", None),
        ("\\boxed{AB}", None),
        ("\\boxed{E}", None),
        ("\\boxed{E} or \\boxed{D}", None),
        ("A and B are both good", None),
        ("", None),
    ],
)
def test_chosen(completion, letter):
    assert chosen(completion, 4) == letter


def test_letters_end_with_the_options():
    assert [chosen("\\boxed{E}", n) for n in (4, 5, 26)] == [None, "E", "E"]


def test_verdict():
    assert verify_choice("B", "\\boxed{B}", 4) == (1.0, "B")
    assert verify_choice("B", "\\boxed{C}", 4) == (0.0, "C")
    assert verify_choice("B", "who knows", 4) == (0.0, None)


@given(
    st.lists(st.sampled_from(("answer", " is ", ":", "*", "(", "A", "B", "Z", ")", "\\boxed{", "}", "\n"))).map("".join)
)
def test_only_letters_of_the_options(completion):
    letter = chosen(completion, 2)
    assert letter in (None, "A", "B") and (letter is None or letter in completion)


PIECES = ("answer", "answer ", "answer is ", " ", "*", " *", ":", "<answer>A. ", "\\boxed{ ", "A", "\n")


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("head", ["answer", "answer is", "<answer>", "\\boxed{"])
def test_hostile_texts_take_little_time(piece, head):
    """White space used to be split in every possible way, for minutes."""
    start = time.process_time()
    for text in (head + piece * (3900 // len(piece)), head + piece * (1_000_000 // len(piece))):
        chosen(text, 4)
    assert time.process_time() - start < 0.5
