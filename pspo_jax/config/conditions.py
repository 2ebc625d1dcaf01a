"""Conditions for a run to read a field, each with the words that say why it does not and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pspo_jax.config.fields import Value
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import SURROGATES
from pspo_jax.config.text_fields import parse_terms


class Condition(NamedTuple):
    """A condition for a field to be read. Its functions take a resolved config."""

    holds: Callable[[Config], bool]
    why: Callable[[Config], str]
    """Clause that says why the field is not read when the condition does not hold."""
    choose: str
    """Clause, beginning with a verb, that says how to make the condition hold."""


Conditions = tuple[Condition, ...]
ALWAYS: Conditions = ()


def when(field: str, *values: Value) -> Condition:
    """The condition that another field has one of these values."""
    return Condition(lambda c: field_value(c, field) in values, unread(field), f"set {field} to {any_of(values)}")


def unless(field: str, value: Value, choose: str) -> Condition:
    """The condition that another field does not have this value."""
    return Condition(lambda c: field_value(c, field) != value, unread(field), choose)


def by_name(field: str, table: dict[str, tuple[str, ...]], name: str) -> Condition:
    """The condition that the strategy which `field` names reads the field `name` of its stage."""
    readers = [strategy for strategy, reads in table.items() if name in reads]

    def holds(c: Config) -> bool:
        chosen = field_value(c, field)
        return chosen not in table or chosen in readers

    return Condition(holds, unread(field), f"set {field} to {any_of(readers)}")


def term(name: str) -> Condition:
    """The condition that the reward has a term of this name."""
    return Condition(lambda c: name in parse_terms(c.reward), unread("reward.terms"), f"add {name} to reward.terms")


def surrogate(*names: str) -> Condition:
    """The condition that the loss has one of these surrogates, or a user's own, which may read every field."""
    return Condition(
        lambda c: c.loss.surrogate in names or c.loss.surrogate not in SURROGATES,
        unread("loss.surrogate"),
        f"set loss.surrogate to {any_of(names)}",
    )


def task(*names: str) -> Condition:
    """The condition that the task has one of these names."""
    return when("task.name", *names)


def any_of(values: Sequence[Value]) -> str:
    """The values in words: "a", "a or b", "a, b or c"."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def shown(value: Value) -> str:
    """A value as messages print it, at most 80 characters."""
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if value == "" else str(value)[:80]


def field_value(c: Config, field: str) -> Value:
    """The value of a field, by its dotted name."""
    stage, _, name = field.partition(".")
    value: Value = getattr(getattr(c, stage), name)
    return value


def unread(*fields: str) -> Callable[[Config], str]:
    """A function that says that these fields, with their values, do not read the field in question."""
    verb = "does not" if len(fields) == 1 else "do not"
    return lambda c: f"{' and '.join(f'{field}={shown(field_value(c, field))}' for field in fields)} {verb} read it"


def _has_surrogate(c: Config) -> bool:
    """Whether the surrogate of the loss may differ from 0: a divergence alone leaves no advantage to it."""
    t = c.teacher
    return t.source is None or t.divergence == "sampled" or t.reward_weight > 0 or c.loss.surrogate not in SURROGATES


SURROGATE = Condition(
    _has_surrogate,
    lambda c: f"with teacher.divergence={c.teacher.divergence} and teacher.reward_weight=0 the loss has no surrogate",
    "raise teacher.reward_weight",
)
