"""Options of multiple-choice questions, and the way in which a column's gold answers name them, which is decided once
for all rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast, get_args

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ChoicesAnswer
from pspo_jax.data.answers import listed

READINGS: tuple[ChoicesAnswer, ...] = get_args(ChoicesAnswer)
"""The ways to name an option; where several fit and name the same options, the first one is taken."""
_MOST_MISFITS = 0.1
"""Share of rows that a reading need not fit. Those rows are left out; with a larger share the column is refused."""


class Options(NamedTuple):
    """The options of one question."""

    texts: list[str]
    labels: list[str]
    """The data's own names of the options, as in ai2_arc; empty if there are none."""

    @property
    def letters(self) -> list[str]:
        """A, B, C, ... for as many options as there are."""
        return [chr(ord("A") + i) for i in range(len(self.texts))]


def read_options(value: object) -> Options | str:
    """The options in a cell, which holds a list, its text, or {"text": [...], "label": [...]}.

    Returns:
      The options; or, if there are none, a text that says why.
    """
    labels: list[str] = []
    if isinstance(value, dict):
        labels, value = [str(x) for x in value.get("label", [])], value.get("text", [])
    if isinstance(value, str):  # as in a CSV file
        try:
            value = listed(value)
        except (ValueError, SyntaxError):
            return "options are no list"
    texts = [str(option) for option in cast(Iterable[object], value or [])]
    return Options(texts, labels) if 2 <= len(texts) <= 26 else f"{len(texts)} options"


def letter_of(gold: str, options: Options, reading: ChoicesAnswer) -> str | None:
    """The letter of the one option that a gold answer names by one reading; None if it names none, or several."""
    if reading == "letter" and len(gold) == 1 and gold.upper() in options.letters:
        return gold.upper()
    if reading in ("index", "index_from_1") and gold.isascii() and gold.isdecimal():
        place = int(gold) - (reading == "index_from_1")
        return options.letters[place] if 0 <= place < len(options.texts) else None
    names = {"label": options.labels, "text": options.texts}.get(reading, [])
    place = names.index(gold) if names.count(gold) == 1 else len(options.texts)
    return options.letters[place] if place < len(options.texts) else None


def reading_of(rows: Iterable[tuple[str, Options]], field: str) -> ChoicesAnswer | None:
    """The reading of a column's gold answers, (gold, options) for each row: the one that fits most. None for no rows.

    Raises:
      ConfigError: two readings fit equally well and name different options, or none fits nine rows in ten.
    """
    fits = dict.fromkeys(READINGS, 0)
    differ: dict[tuple[str, str], tuple[str, Options]] = {}
    count = 0
    for gold, options in rows:
        letters = {reading: letter_of(gold, options, reading) for reading in READINGS}
        found = {reading: letter for reading, letter in letters.items() if letter}
        count += bool(found)
        for reading in found:
            fits[reading] += 1
            for other in found:
                if found[other] != found[reading]:
                    differ.setdefault((reading, other), (gold, options))
    if not count:
        return None
    most = max(fits.values())
    best = [reading for reading in READINGS if fits[reading] == most]
    if "label" in best:
        return "label"
    if clash := next((pair for pair in differ if pair[0] in best and pair[1] in best), None):
        gold, options = differ[clash]
        raise ConfigError(
            f"{field}: the answers fit as {clash[0]} and as {clash[1]}, and {gold!r} of {options.texts} means another "
            f"option each way; set task.choices_answer to one of them"
        )
    if most < (1 - _MOST_MISFITS) * count:
        counts = ", ".join(f"{fits[reading]} as {reading}" for reading in READINGS if fits[reading])
        raise ConfigError(
            f"{field}: the answers of {count} rows name options in several ways ({counts}); write letters, or set "
            f"task.choices_answer, and the other rows are left out"
        )
    return best[0]
