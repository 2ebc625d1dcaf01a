"""Values that JSON can hold."""

from __future__ import annotations

import math
from typing import SupportsFloat, TypeAlias

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
"""A value as `json.loads` returns it."""


def json_number(value: SupportsFloat) -> int | float | None:
    """A number of Python or NumPy as JSON writes it; None for NaN and infinities, which JSON cannot write."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
