"""The text suite: short questions of several kinds, from easy to hard for a small instruct model.

A question states the form of its answer, and a completion is one line. Each kind draws from a stream of its own, which
depends on the seed and the kind's name alone. So the first n questions of a kind are the same, whatever the other kinds
are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import Stratum
from pspo_jax.data.files import Record
from pspo_jax.data.loading import Question, Source, quiet_datasets
from pspo_jax.data.strata import counts_of, first_rows, stratum_of
from pspo_jax.data.synthetic.text_suite_words import CATEGORIES, COLORS, NAMES, NOUNS, PLURALS, STORIES

Draw = Callable[[int], int]
"""A function from n to a random whole number in 0..n-1."""
_MOST_TRIES = 20_000
"""Number of draws in a row without a new question after which a kind counts as exhausted."""
_NUMBER_ONLY = "Reply with the number only."
_OPTIONS = 2
"""Number of options of a multiple-choice question."""


class Item(NamedTuple):
    """A question of one kind."""

    question: str
    answer: str
    key: Hashable
    """Value that identifies the question within its kind; questions that differ only in order share it."""
    options: tuple[str, ...] = ()
    """Texts of the options of a multiple-choice question."""


class Kind(NamedTuple):
    """A kind of question."""

    make: Callable[[Draw], Item]
    """Function that draws a question of the kind."""
    verifier: str
    """Name of the task by whose rules its answers are verified, or exact = the answer is the whole completion."""
    difficulty: int
    """Rank of the kind, from 1, by how rarely a small instruct model answers it before training."""


class Row(NamedTuple):
    """A question of the suite."""

    kind: str
    item: Item


def generate(seed: int, count: int, kinds: Sequence[str], enough: bool = True) -> list[Row]:
    """`count` questions of these kinds in turn, all different; a kind that has no more questions is left out.

    Python documents that `random.Random(text).random()` gives the same numbers on every machine and in every version.

    Args:
      enough: whether fewer than `count` questions are an error; if not, as many as there are are returned.
    Raises:
      ValueError: all kinds together have fewer questions.
    """
    streams = {name: _stream(seed, name) for name in kinds}
    seen: set[tuple[str, Hashable]] = set()
    rows: list[Row] = []
    while len(rows) < count and streams:
        for name in list(streams):
            item = _next(name, streams[name], seen)
            if item is None:
                del streams[name]
            elif len(rows) < count:
                rows.append(Row(name, item))
    if len(rows) < count and enough:
        raise ValueError(f"{', '.join(kinds)} have {len(rows)} different questions")
    return rows


def _stream(seed: int, kind: str) -> Draw:
    """The random numbers of a kind."""
    uniform = random.Random(f"{seed} {kind}").random
    return lambda n: int(uniform() * n)


def _next(name: str, draw: Draw, seen: set[tuple[str, Hashable]]) -> Item | None:
    """The next question of a kind whose key is not in `seen`, to which it is added; None if none is found."""
    for _ in range(_MOST_TRIES):
        item = KINDS[name].make(draw)
        if (name, item.key) not in seen:
            seen.add((name, item.key))
            return item
    return None


def _pick(draw: Draw, items: Sequence[str]) -> str:
    return items[draw(len(items))]


def _phrase(draw: Draw) -> str:
    """A color and a noun."""
    return f"{_pick(draw, COLORS)} {_pick(draw, NOUNS)}"


def _compare(draw: Draw) -> Item:
    """Which of two numbers of two digits is larger."""
    a, b = 10 + draw(90), 10 + draw(89)
    b += b >= a
    return _larger(str(a), str(b), a > b)


def _compare_decimals(draw: Draw) -> Item:
    """Which of two numbers is larger; they differ only behind the point, where one has one digit and the other two."""
    whole, tenths = 1 + draw(9), 1 + draw(9)
    hundredths = 11 + 10 * draw(9) + draw(9)  # without 0 at the end
    short, long = f"{whole}.{tenths}", f"{whole}.{hundredths}"
    short_is_larger = 10 * tenths > hundredths
    return _larger(short, long, short_is_larger) if draw(2) else _larger(long, short, not short_is_larger)


def _larger(first: str, second: str, first_is_larger: bool) -> Item:
    question = f"What is the larger number: {first} or {second}?"
    return Item(question, first if first_is_larger else second, frozenset((first, second)))


def _add(draw: Draw) -> Item:
    """A sum of two numbers of two digits, without a carry."""
    units, tens = _digits(draw, 0, 9), _digits(draw, 1, 9)
    return _sum(10 * tens[0] + units[0], 10 * tens[1] + units[1])


def _digits(draw: Draw, low: int, most: int) -> tuple[int, int]:
    """Two digits of at least `low` whose sum is at most `most`."""
    a = low + draw(most - 2 * low + 1)
    return a, low + draw(most - a - low + 1)


def _add_carry(draw: Draw) -> Item:
    """A sum of two numbers of two digits whose units carry."""
    units = 1 + draw(9)
    return _sum(10 * (1 + draw(9)) + units, 10 * (1 + draw(9)) + 10 - units + draw(units))


def _sum(a: int, b: int) -> Item:
    return Item(f"What is {a} + {b}? {_NUMBER_ONLY}", str(a + b), frozenset((a, b)))


def _count_letters(draw: Draw) -> Item:
    """How often a letter occurs in a color and a noun; the letter is the more frequent of two random ones of theirs."""
    phrase = _phrase(draw)
    letters = phrase.replace(" ", "")
    letter = max(_pick(draw, letters), _pick(draw, letters), key=phrase.count)
    question = f'How many times does the letter "{letter}" occur in "{phrase}"? {_NUMBER_ONLY}'
    return Item(question, str(phrase.count(letter)), (letter, phrase))


def _uppercase(draw: Draw) -> Item:
    """A color and a noun in capital letters."""
    phrase = _phrase(draw)
    return Item(f'Write "{phrase}" in capital letters and nothing else.', phrase.upper(), phrase)


def _brackets(draw: Draw) -> Item:
    """A color and a noun in square brackets."""
    phrase = _phrase(draw)
    return Item(f'Write "{phrase}" in square brackets and nothing else.', f"[{phrase}]", phrase)


def _small_sum(draw: Draw) -> tuple[int, int]:
    """A digit and a number of 1..20, in either order."""
    a, b = 1 + draw(9), 1 + draw(20)
    return (a, b) if draw(2) else (b, a)


def _add_small(draw: Draw) -> Item:
    """A sum of a digit and a number up to 20."""
    a, b = _small_sum(draw)
    return Item(f"What is {a} + {b}? {_NUMBER_ONLY}", str(a + b), (a, b))


def _equation(draw: Draw) -> Item:
    """A sum of a digit and a number up to 20, to be written as a whole equation."""
    a, b = _small_sum(draw)
    return Item(f"What is {a} + {b}? Write the whole equation.", f"{a} + {b} = {a + b}", (a, b))


def _first_letter(draw: Draw) -> Item:
    """The first letter of a color or a noun."""
    word = _pick(draw, COLORS + NOUNS).capitalize()
    return Item(f'What is the first letter of the word "{word}"?', word[0], word)


def _multiple_choice(draw: Draw) -> Item:
    """Which of two words of different categories belongs to the category that the question names."""
    names = list(CATEGORIES)
    chosen = [names.pop(draw(len(names))) for _ in range(_OPTIONS)]
    words = tuple(_pick(draw, CATEGORIES[name]) for name in chosen)
    right = draw(_OPTIONS)
    lines = [f"{letter}. {word}" for letter, word in zip("AB", words, strict=True)]
    question = "\n".join([f"Which of these is {chosen[right]}?", *lines, "Answer with the letter only."])
    return Item(question, "AB"[right], (chosen[right], frozenset(words)), words)


def _word_problem(draw: Draw) -> Item:
    """A story of one addition, subtraction or multiplication."""
    story, sign = STORIES[draw(len(STORIES))]
    if sign == "*":
        a, b = 2 + draw(8), 2 + draw(8)
    else:
        a, b = 11 + draw(39), 2 + draw(9)
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    text = story.format(name=_pick(draw, NAMES), things=_pick(draw, PLURALS), a=a, b=b)
    return Item(f"{text} {_NUMBER_ONLY}", str(value), text)


KINDS = {
    "first_letter": Kind(_first_letter, "math", 1),
    "compare": Kind(_compare, "math", 2),
    "compare_decimals": Kind(_compare_decimals, "math", 3),
    "add_small": Kind(_add_small, "math", 4),
    "multiple_choice": Kind(_multiple_choice, "multiple_choice", 5),
    "add": Kind(_add, "math", 6),
    "count_letters": Kind(_count_letters, "math", 7),
    "add_carry": Kind(_add_carry, "math", 8),
    "equation": Kind(_equation, "exact", 9),
    "word_problem": Kind(_word_problem, "math", 10),
    "uppercase": Kind(_uppercase, "exact", 11),
    "brackets": Kind(_brackets, "exact", 12),
}
"""The kinds of questions by name."""


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds that task.kinds names; "all" = every kind.

    Raises:
      ConfigError: there is no such kind.
    """
    names = tuple(KINDS) if text.strip() == "all" else tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"task.kinds={text!r}: {unknown[0]!r} is no kind; choose all, or among {', '.join(KINDS)}")
    return names


def source(config: Config, seed: int, count: int, strata: Sequence[Stratum] = ()) -> Source:
    """`count` questions of the kinds in task.kinds. The last rows, which are held out, are drawn first.

    Held-out questions therefore do not depend on the number of training prompts, and each kind is equally frequent.
    With strata, further questions follow (see `Generator`).

    Raises:
      ConfigError: a kind is unknown, or the kinds have too few questions.
    """
    kinds = kinds_of(config.task.kinds)
    try:
        rows = generate(seed, count, kinds)[::-1]
    except ValueError as error:
        raise ConfigError(f"task.train_prompts={config.task.train_prompts}: {error}; lower it") from error
    rows += _further(strata, seed, count, count - config.task.heldout_prompts, kinds)
    records = quiet_datasets().Dataset.from_dict(
        {
            "question": [row.item.question for row in rows],
            "answer": [row.item.answer for row in rows],
            "kind": [row.kind for row in rows],
            "difficulty": [KINDS[row.kind].difficulty for row in rows],
            "options": [list(row.item.options) for row in rows],
        }
    )

    def convert(record: Record, exact: Record | None = None) -> Question:
        extra: dict[str, object] = {"verifier": KINDS[str(record["kind"])].verifier}
        if record["options"]:
            extra |= {"options": _OPTIONS, "texts": record["options"]}
        return Question(str(record["question"]), str(record["answer"]), extra)

    return Source("text_suite", "text_suite", records, convert, json.dumps(["1", *kinds]))


def _further(strata: Sequence[Stratum], seed: int, count: int, total: int, kinds: Sequence[str]) -> list[Row]:
    """Questions after the first `count` of these kinds: for each stratum, its share of `total`, or all there are."""
    if not strata:
        return []
    counts = counts_of(total, strata)
    of_kind = stratum_of(np.array([KINDS[kind].difficulty for kind in kinds]), strata)
    kinds_in = np.bincount(1 + of_kind, minlength=len(strata) + 1)[1:]
    turns = max(n / max(k, 1) for n, k in zip(counts, kinds_in, strict=True))
    rows = generate(seed, count + len(kinds) * (int(turns) + 1), kinds, enough=False)[count:]
    stratum = stratum_of(np.array([KINDS[row.kind].difficulty for row in rows]), strata)
    return [rows[i] for i in first_rows(stratum, counts)]
