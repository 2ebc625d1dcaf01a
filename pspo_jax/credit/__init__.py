"""What a reward is worth. A credit is pure functions over its own per-prompt state; a new one is a file and a line."""

from collections.abc import Callable

from pspo_jax.credit.base import Credit
from pspo_jax.credit.ers import ers, released
from pspo_jax.credit.group import group, group_advantages, opo, opo_advantages, rloo, rloo_advantages
from pspo_jax.credit.tracked import tracked_baseline
from pspo_jax.strategies import CreditConfig, ForgettingConfig

CREDITS: dict[str, Callable[[CreditConfig, ForgettingConfig], Credit]] = {
    "group": group,
    "ers": ers,
    "rloo": rloo,
    "tracked_baseline": tracked_baseline,
    "opo": opo,
}

__all__ = [
    "CREDITS",
    "Credit",
    "ers",
    "group",
    "group_advantages",
    "opo",
    "opo_advantages",
    "released",
    "rloo",
    "rloo_advantages",
    "tracked_baseline",
]
