"""Which old groups or completions come back into a batch. A replay is pure functions over a state that stores them."""

from pspo_jax.arrays.groups import Groups
from pspo_jax.replay.aper import aper
from pspo_jax.replay.buffer import popo
from pspo_jax.replay.interface import MakeReplay, Replay, effective, filter_ineffective, identity

REPLAYS: dict[str, MakeReplay] = {"none": identity, "filter": filter_ineffective, "popo": popo, "aper": aper}
"""Constructor of each replay, by the name that `replay.name` gives it."""

__all__ = ["REPLAYS", "Groups", "Replay", "aper", "effective", "filter_ineffective", "identity", "popo"]
