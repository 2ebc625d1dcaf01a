"""Which old groups come back. A replay is pure functions over its own state of stored groups."""

from pspo_jax.replay.base import Groups, Replay, effective, filtered, none
from pspo_jax.replay.ring import fill

REPLAYS = {"none": none, "filter": filtered, "fill": fill}
"""Constructor of each replay, from a Config."""

__all__ = ["REPLAYS", "Groups", "Replay", "effective", "fill", "filtered", "none"]
