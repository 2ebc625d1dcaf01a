"""Multiple choice: the option that a row's answer names is decided for a whole column."""

import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.choices import read_options, reading_of
from pspo_jax.data.loading import with_choices

OPTIONS = ["red", "green", "10"]


@pytest.mark.parametrize(
    ("gold", "options", "reading", "letter"),
    [
        ("B", OPTIONS, "letter", "B"),
        ("b", OPTIONS, "letter", "B"),
        ("1", OPTIONS, "index", "B"),
        ("1", OPTIONS, "index_from_1", "A"),
        ("green", OPTIONS, "text", "B"),
        ("10", OPTIONS, "text", "C"),
        ("B", "['red', 'green', '10']", "letter", "B"),
        ("2", {"text": OPTIONS, "label": ["1", "2", "3"]}, "label", "B"),
        ("C", {"text": OPTIONS, "label": ["A", "B", "C"]}, "label", "C"),
        ("green", {"text": OPTIONS}, "text", "B"),
    ],
)
def test_choices(gold, options, reading, letter):
    q = with_choices("Which?", gold, options, reading)
    assert q == ("Which?\nA. red\nB. green\nC. 10", letter, {"options": 3, "texts": OPTIONS}, "")


@pytest.mark.parametrize(
    ("gold", "options", "reading", "reason"),
    [
        ("D", OPTIONS, "letter", "names no one option by its letter"),
        ("3", OPTIONS, "index", "names no one option by its index"),
        ("0", OPTIONS, "index_from_1", "names no one option by its index_from_1"),
        ("²", OPTIONS, "index", "names no one option"),
        ("x", ["x", "x"], "text", "names no one option by its text"),
        ("A", OPTIONS, None, "names no one option"),
        ("A", ["one"], "letter", "1 options"),
        ("A", None, "letter", "0 options"),
        ("A", [str(i) for i in range(27)], "letter", "27 options"),
        ("A", "red, green", "letter", "options are no list"),
        ("A", "7", "letter", "options are no list"),
    ],
)
def test_bad_choices_are_left_out(gold, options, reading, reason):
    assert reason in with_choices("Which?", gold, options, reading).reason


@pytest.mark.parametrize(
    ("golds", "options", "reading"),
    [
        ("ABC", OPTIONS, "letter"),
        ("012", OPTIONS, "index"),
        ("123", OPTIONS, "index_from_1"),
        (("red", "green", "10"), OPTIONS, "text"),
        ("1234", ["1", "2", "3", "4"], "text"),
        ("0123", ["1", "2", "3", "4"], "index"),
        (("10", "20", "30"), ["10", "20", "30"], "text"),
        (("2", "3"), {"text": OPTIONS, "label": ["1", "2", "3"]}, "label"),
        ("A" * 19 + "?", OPTIONS, "letter"),
        ((), OPTIONS, None),
    ],
)
def test_answers_of_a_column_are_read_in_one_way(golds, options, reading):
    assert reading_of([(gold, read_options(options)) for gold in golds], "f") == reading


@pytest.mark.parametrize(
    ("golds", "options", "words"),
    [
        ("123", ["1", "2", "3", "4"], "fit as text and as index"),
        ("12", OPTIONS, "fit as index and as index_from_1"),
        ("AB", ["B", "A"], "fit as letter and as text"),
        (("A", "green", "red", "B"), OPTIONS, "2 as letter, 2 as text"),
    ],
)
def test_a_column_that_can_be_read_in_two_ways_is_refused(golds, options, words):
    with pytest.raises(ConfigError, match=words) as error:
        reading_of([(gold, read_options(options)) for gold in golds], "task.answer_column=a")
    assert "set task.choices_answer" in str(error.value) or "set\n" in str(error.value)
