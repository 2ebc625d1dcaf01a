"""Types and ranges of the configuration's fields, and the error that names a field.

A value enters a field in one way, whether it is typed on the command line, read from YAML or given to `replace`:
`convert` takes a Python value, `parse` takes text. Both refuse a value with the same message.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

LARGEST = 2**31 - 1
"""Largest magnitude of any whole number: steps and sizes are int32 on devices."""
Value: TypeAlias = str | int | float | bool | None
"""The value of a field."""
JSON_FIELDS = ("task.mixture", "task.options")
"""Text fields that hold JSON; Python lists and dicts are also accepted."""
LIST_FIELDS = (
    "lora.targets",
    "task.numbers",
    "task.dataset",
    "selection.pool_weights",
    "reward.cosine_right",
    "reward.cosine_wrong",
    "loss.vespo_positive",
    "loss.vespo_negative",
    "log.to",
)
"""Text fields that hold entries separated by commas; a list is also accepted."""
PATH_FIELDS = (
    "run.dir",
    "run.compilation_cache",
    "task.train_data",
    "task.heldout_data",
    "task.cache",
    "model.source",
    "model.tokenizer",
    "sft.data",
    "teacher.source",
    "reward.model",
)
"""Text fields that may name a file or folder; ~ means the home folder."""
SHARE_FIELDS = ("selection.quotas", "reward.terms", "task.strata")
"""Text fields that hold name=number pairs separated by commas; a dict is also accepted."""
_NOTHING = ("None", "null")
_TRUTH = {"true": True, "false": False}


class ConfigError(ValueError):
    """An error of the user's input. Its message is one line that names the field, the value and the fix."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `low` and `high` are inclusive, `above` and `below` are not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def complaint(self, value: float) -> str | None:
        """What a value that is out of bounds must be; None for a value within them."""
        if self.low is not None and value < self.low:
            return f"must be at least {self.low}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}"
        return None

    def words(self) -> str:
        """The bounds, such as "at least 1, less than 2"; "" where there are none."""
        bounds = {
            "at least": self.low,
            "greater than": self.above,
            "at most": self.high,
            "less than": self.below,
        }
        return ", ".join(f"{words} {bound:.10g}" for words, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class FieldType:
    """The parts of a field's type."""

    base: type
    """bool, int, float or str."""
    optional: bool
    """Whether the field may be None."""
    choices: tuple[str, ...]
    """Permitted texts; () = any text."""
    ranges: tuple[Range, ...]


def field_types(section: object) -> dict[str, FieldType]:
    """Field name -> type, for a stage of the configuration."""
    stage: type = type(section)
    return _field_types(stage)


@functools.cache
def _field_types(stage: type) -> dict[str, FieldType]:
    return {name: _field_type(hint) for name, hint in typing.get_type_hints(stage, include_extras=True).items()}


def _field_type(hint: object) -> FieldType:
    """The parts of a field's type annotation."""
    ranges = tuple(m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range))
    bare = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    is_union = typing.get_origin(bare) is not Literal and bool(typing.get_args(bare))
    options = typing.get_args(bare) if is_union else (bare,)
    (base,) = (option for option in options if option is not type(None))
    choices = typing.get_args(base) if typing.get_origin(base) is Literal else ()
    return FieldType(str if choices else base, type(None) in options, choices, ranges)


def convert(field: str, field_type: FieldType, value: object) -> Value:
    """A Python value, NumPy scalar or path in the form in which the field holds it.

    Raises:
      ConfigError: the value has another type than the field, or is not finite.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None:
        if field_type.optional:
            return None
        raise ConfigError(f"{field}=None: must have a value: {_wanted(field_type)}")
    if field_type.base is str:
        return _text(field, field_type, value)
    if field_type.base is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{field}={value!r}: must be true or false")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}={value!r}: must be {_wanted(field_type)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field}={value}: must be a finite number")
    if field_type.base is int:
        if not isinstance(value, int):
            raise ConfigError(f"{field}={value}: must be a whole number")
        return int(value)
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{field}={str(value)[:20]}...: is too large for a number") from error


def parse(field: str, field_type: FieldType, text: str) -> Value:
    """Text from the command line in the form in which the field holds it.

    Raises:
      ConfigError: the text is no value of the field's type.
    """
    if field_type.optional and text in _NOTHING:
        return None
    if field_type.base is str:
        return convert(field, field_type, text)
    if field_type.base is bool:
        if text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        raise ConfigError(f"{field}={text!r}: must be true or false")
    try:
        value = field_type.base(text)
    except ValueError as error:
        raise ConfigError(f"{field}={text!r}: must be {_wanted(field_type)}") from error
    return convert(field, field_type, value)


def from_yaml(field: str, field_type: FieldType, value: object) -> Value:
    """A value from YAML in the form in which the field holds it. YAML reads 1e-3 as text and 1.0e-3 as a number."""
    if field_type.base is float and isinstance(value, str):
        return parse(field, field_type, value)
    return convert(field, field_type, value)


def check_range(field: str, field_type: FieldType, value: Value) -> None:
    """Raise ConfigError for a converted value that is out of its field's range."""
    if not isinstance(value, int | float) or field_type.base not in (int, float):
        return
    if field_type.base is int and abs(value) > LARGEST:
        raise ConfigError(f"{field}={value}: must be at most {LARGEST}")
    for bound in field_type.ranges:
        if complaint := bound.complaint(value):
            raise ConfigError(f"{field}={value}: {complaint}")


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?", or nothing where no name is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _text(field: str, field_type: FieldType, value: object) -> str:
    """A value of a text field."""
    if not isinstance(value, str):
        value = _written(field, value)
    if not value.isprintable() and any(ch == "\x00" or "\ud800" <= ch <= "\udfff" for ch in value):
        raise ConfigError(f"{field}={value!r}: contains bytes that are not UTF-8 text; write it in UTF-8")
    if field in PATH_FIELDS:
        return _path(field, value)
    if field_type.choices and value not in field_type.choices:
        close = nearest(value, field_type.choices)
        raise ConfigError(f"{field}={value!r}: choose one of {', '.join(field_type.choices)}{close}")
    return value


def _path(field: str, value: str) -> str:
    """A path with ~ expanded."""
    if not value.strip():
        raise ConfigError(f"{field}={value!r}: must name a file or folder; leave it out for the default")
    if any(ord(ch) < 32 or ord(ch) == 127 for ch in value):
        raise ConfigError(f"{field}={value!r}: contains a control character; remove it")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{field}={value}: this home folder does not exist; write ./{value} for a name that begins with ~"
        )
    return expanded


def _written(field: str, value: object) -> str:
    """A list or dict as the text that the field holds."""
    try:
        if field in JSON_FIELDS and isinstance(value, list | tuple | dict):
            return json.dumps(value)
        if field in SHARE_FIELDS and isinstance(value, dict):
            return ", ".join(f"{name}={number}" for name, number in value.items())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}={str(value)[:80]}: cannot be written as JSON ({error})") from error
    items = value if isinstance(value, list | tuple) else [value]
    plain = all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items)
    if plain and (field in LIST_FIELDS or (field in SHARE_FIELDS and items is value)):
        return ",".join(map(str, items))
    raise ConfigError(f"{field}={str(value)[:80]}: must be text; put it in quotes")


def _wanted(field_type: FieldType) -> str:
    """The values that a field takes, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return f"one of {', '.join(field_type.choices)}" if field_type.choices else names[field_type.base]
