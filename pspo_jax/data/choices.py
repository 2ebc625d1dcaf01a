"""Options of multiple-choice questions, and how a column's gold answers name them: decided once for all rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ChoicesAnswer
from pspo_jax.data.answers import listed

READINGS: tuple[ChoicesAnswer, ...] = get_args(ChoicesAnswer)
"""Ways to name an option; the first that fits is taken where several name the same options."""
_MOST_MISFITS = 0.1
"""Share of rows whose gold answer a reading may not fit; they are left out. With more, the column is refused."""


class Options(NamedTuple):
    """The options of one question."""

    texts: list[str]
    labels: list[str]
    """Names that the data gives them, as ai2_arc does; empty without."""

    @property
    def letters(self) -> list[str]:
        return [chr(ord("A") + i) for i in range(len(self.texts))]


def options_of(value: Any) -> Options | str:
    """The options in a cell: a list, its text, or {"text": [...], "label": [...]}; or why there are none."""
    labels: list[str] = []
    if isinstance(value, dict):
        labels, value = [str(x) for x in value.get("label", [])], value.get("text", [])
    if isinstance(value, str):  # as in a CSV file
        try:
            value = listed(value)
        except (ValueError, SyntaxError):
            return "options are no list"
    texts = [str(option) for option in value or []]
    return Options(texts, labels) if 2 <= len(texts) <= 26 else f"{len(texts)} options"


def letter_of(gold: str, options: Options, reading: ChoicesAnswer) -> str | None:
    """The letter of the option that a gold answer names under one reading; None if it names none, or several."""
    if reading == "letter" and len(gold) == 1 and gold.upper() in options.letters:
        return gold.upper()
    if reading in ("index", "index_from_1") and gold.isascii() and gold.isdecimal():
        place = int(gold) - (reading == "index_from_1")
        return options.letters[place] if 0 <= place < len(options.texts) else None
    names = {"label": options.labels, "text": options.texts}.get(reading, [])
    place = names.index(gold) if names.count(gold) == 1 else len(options.texts)
    return options.letters[place] if place < len(options.texts) else None


def reading_of(rows: Iterable[tuple[str, Options]], field: str) -> ChoicesAnswer | None:
    """The one reading of all gold answers of a column: the one that fits most of them. None for no rows.

    Raises:
      ConfigError: two readings fit equally well and name other options, or none fits nine rows in ten.
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
