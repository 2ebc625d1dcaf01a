"""Which old groups come back. A replay is pure functions over its own state of stored groups."""

from pspo_jax.replay.base import Groups, Replay, none

__all__ = ["Groups", "Replay", "none"]
