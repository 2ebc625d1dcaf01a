"""The contract of a selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pspo_jax.state import follow_rows


class Selector(NamedTuple):
    """Which prompts next, as pure functions over a per-prompt state S.

    init(num_prompts) -> S
    select(S, key, step, batch) -> (ids [batch] int32, loss_weight [batch] float32 <= 1, S)
        `batch` is static; ids are distinct.
    observe(S, ids [B], outcome: Outcome, step) -> S
        Called once a step with what the selected prompts gave.
    follow(S, fresh, places [N]) -> S
        The state for changed data: `fresh` is init's for the new prompts, `places` their old rows, -1 = new.
    """

    init: Callable[[int], Any]
    select: Callable[..., tuple[Any, Any, Any]]
    observe: Callable[..., Any]
    follow: Callable[..., Any] = follow_rows
