"""Which old groups come back. A replay is pure functions over its own state of stored groups."""

from pspo_jax.arrays.groups import Groups
from pspo_jax.replay.buffer import popo
from pspo_jax.replay.interface import Replay, effective, filter_ineffective, identity

REPLAYS = {"none": identity, "filter": filter_ineffective, "popo": popo}
"""Constructor of each replay, from a Config."""

__all__ = ["REPLAYS", "Groups", "Replay", "effective", "filter_ineffective", "identity", "popo"]
