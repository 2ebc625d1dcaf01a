"""Which old groups come back. A replay is pure functions over its own state of stored groups."""

from pspo_jax.arrays.groups import Groups
from pspo_jax.replay.buffer import fill
from pspo_jax.replay.interface import Replay, effective, filtered, none

REPLAYS = {"none": none, "filter": filtered, "fill": fill}
"""Constructor of each replay, from a Config."""

__all__ = ["REPLAYS", "Groups", "Replay", "effective", "fill", "filtered", "none"]
