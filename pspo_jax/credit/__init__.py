"""What a reward is worth. A credit is pure functions over its own per-prompt state; a new one is a file and a line."""

from pspo_jax.credit.base import Credit
from pspo_jax.credit.ers import ers
from pspo_jax.credit.group import group, group_advantages

CREDITS = {"group": group, "ers": ers}

__all__ = ["CREDITS", "Credit", "ers", "group", "group_advantages"]
