"""What fields of the configuration are made of: ranges, and the error that names a field."""

from __future__ import annotations

from dataclasses import dataclass


class ConfigError(ValueError):
    """Bad input: the message is one line that names the field, the value and the fix."""


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number; `above` is an exclusive lower bound."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def complaint(self, value: float) -> str | None:
        if self.low is not None and value < self.low:
            return f"must be at least {self.low}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high}"
        return None
