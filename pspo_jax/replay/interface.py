"""The contract of a replay, the groups that pass through it, and those that store nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.groups import Groups, keep
from pspo_jax.config.schema import Config


class Replay(NamedTuple):
    """Which old groups come back, as pure functions over a state S of stored groups.

    init(prompts B, group_size G, prompt_length P, max_new_tokens T) -> S
    exchange(S, groups: Groups, step, key, distance=None) -> (Groups, S): same shapes; some groups replaced by stored
        ones, some no longer counted. distance(groups) -> [C] says how far the policy is from stored groups'.
    settle(S, ess) -> S: told of the effective sample size of the replayed tokens, as a share of them.
    """

    init: Callable[[int, int, int, int], Any]
    exchange: Callable[..., tuple[Groups, Any]]
    settle: Callable[..., Any] = lambda state, ess: state


def effective(groups: Groups, by: str = "rewards") -> Bool[Array, "B"]:
    """Groups in the batch that carry a gradient: rewards differ, or (by "advantages") an advantage is not 0."""
    if by == "advantages":
        found = (groups.advantages != 0).any(axis=1)
    else:
        stats = group_statistics(groups.rewards, ddof=1)
        found = (stats.variance > 0) & (stats.verdicts > 1)
    return found & groups.counted


def identity(config: Config) -> Replay:
    """Every batch is its own: nothing is stored, nothing comes back."""
    return Replay(
        init=lambda prompts, group_size, prompt_length, max_new_tokens: (),
        exchange=lambda state, groups, step, key, distance=None: (groups, state),
    )


def filter_ineffective(config: Config) -> Replay:
    """GRPO-filter: ineffective groups leave the batch, and means are over the others."""
    by = config.replay.effective
    return Replay(
        init=lambda prompts, group_size, prompt_length, max_new_tokens: (),
        exchange=lambda state, groups, step, key, distance=None: (keep(groups, effective(groups, by)), state),
    )
