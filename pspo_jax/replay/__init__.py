"""Which old groups come back into a batch. A replay is pure functions over a state of stored groups."""

from pspo_jax.arrays.groups import Groups
from pspo_jax.replay.buffer import popo
from pspo_jax.replay.interface import MakeReplay, Replay, effective, filter_ineffective, identity

REPLAYS: dict[str, MakeReplay] = {"none": identity, "filter": filter_ineffective, "popo": popo}
"""Constructor of each replay, by the name that `replay.name` gives it."""

__all__ = ["REPLAYS", "Groups", "Replay", "effective", "filter_ineffective", "identity", "popo"]
