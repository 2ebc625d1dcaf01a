"""The contract of a replay, and the one that replays nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
from jaxtyping import Array, Float

from pspo_jax.state import Rollouts


@struct.dataclass
class Groups:
    """What the optimizer sees: rollouts with their rewards and advantages, whole groups."""

    rollouts: Rollouts
    rewards: Float[Array, "B G"]
    advantages: Float[Array, "B G"]


class Replay(NamedTuple):
    """Which old groups come back, as pure functions over a state S of stored groups.

    init(prompts B, group_size G, prompt_length P, max_new_tokens T) -> S
    exchange(S, groups: Groups, step) -> (Groups, S): same shapes; some groups replaced by stored ones.
    """

    init: Callable[[int, int, int, int], Any]
    exchange: Callable[..., tuple[Groups, Any]]


def none() -> Replay:
    """Every batch is its own: nothing is stored, nothing comes back."""
    return Replay(
        init=lambda prompts, group_size, prompt_length, max_new_tokens: (),
        exchange=lambda state, groups, step: (groups, state),
    )
