"""The contract of a replay, which groups are effective, and the two replays that store nothing.

Letters: B groups in a batch, C stored groups.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.groups import Groups, keep
from pspo_jax.config.schema import Config


class DistanceFn(Protocol):
    """Measures how far the current policy is from those that sampled stored groups."""

    def __call__(self, stored: Groups, /) -> Float[Array, "C"]:
        """Estimate of KL(behaviour policy || current policy) per token for each stored group, in nats."""
        ...


class InitFn(Protocol):
    """Makes a replay's state before the first step."""

    def __call__(self, prompts: int, group_size: int, prompt_length: int, max_new_tokens: int, /) -> PyTree:
        """A state without stored groups, for batches of `prompts` groups."""
        ...


class MixBatchFn(Protocol):
    """Exchanges groups between a batch and the store."""

    def __call__(
        self,
        state: PyTree,
        groups: Groups,
        step: Int[Array, ""],
        key: Key[Array, ""],
        distance: DistanceFn | None = None,
        /,
    ) -> tuple[Groups, PyTree]:
        """The batch that trains, and the state after it.

        The batch has the shapes of `groups`; some of its groups may be stored ones, and some may no longer be counted.

        Args:
          groups: the fresh groups of the step.
          key: key of this step's draws.
          distance: None = a replay that needs one raises ValueError.
        """
        ...


class AdaptShareFn(Protocol):
    """Changes the share of a batch that is replayed."""

    def __call__(self, state: PyTree, ess: Float[Array, ""], /) -> PyTree:
        """The state after a step.

        Args:
          ess: effective sample size of the replayed tokens, as a share of their number.
        """
        ...


class AddRolloutsFn(Protocol):
    """Exchanges single completions between a batch and the store."""

    def __call__(
        self, state: PyTree, groups: Groups, step: Int[Array, ""], key: Key[Array, ""], /
    ) -> tuple[Groups | None, PyTree]:
        """Stored completions that train beside the batch, and the state after the batch has entered it.

        Each completion is a group of its own, so that completions of any prompts stand side by side. Their number is
        `config.schema.extra_completions`; places that stay empty are not counted. None = the replay has none.

        Args:
          groups: the batch that trains, with the advantages by which it trains.
          key: key of this step's draws.
        """
        ...


def _keep_share(state: PyTree, ess: Float[Array, ""]) -> PyTree:
    del ess
    return state


def _add_none(state: PyTree, groups: Groups, step: Int[Array, ""], key: Key[Array, ""]) -> tuple[Groups | None, PyTree]:
    del groups, step, key
    return None, state


class Replay(NamedTuple):
    """Which old groups or completions come back, as pure functions over a state that stores them."""

    init: InitFn
    mix_batch: MixBatchFn
    adapt_share: AdaptShareFn = _keep_share
    add_rollouts: AddRolloutsFn = _add_none


class MakeReplay(Protocol):
    """Makes a replay from a resolved config."""

    def __call__(self, config: Config, /) -> Replay:
        """The replay that `config.replay` describes."""
        ...


def effective(groups: Groups, by: str = "rewards") -> Bool[Array, "B"]:
    """Groups of the batch that carry a gradient.

    Args:
      by: rewards = their rewards differ; advantages = an advantage is not 0.
    """
    if by == "advantages":
        found = (groups.advantages != 0).any(axis=1)
    else:
        stats = group_statistics(groups.rewards, ddof=1)
        found = (stats.variance > 0) & (stats.judged > 1)
    return found & groups.counted


def identity(config: Config) -> Replay:
    """The replay that leaves every batch as it is and stores nothing."""
    del config
    return Replay(_init_nothing, keep_batch)


def keep_batch(
    state: PyTree,
    groups: Groups,
    step: Int[Array, ""],
    key: Key[Array, ""],
    distance: DistanceFn | None = None,
) -> tuple[Groups, PyTree]:
    """The batch and the state as they are."""
    del step, key, distance
    return groups, state


def filter_ineffective(config: Config) -> Replay:
    """The replay of GRPO-filter: ineffective groups leave the batch, and means are over the others."""
    by = config.replay.effective
    return Replay(
        _init_nothing, lambda state, groups, step, key, distance=None: (keep(groups, effective(groups, by)), state)
    )


def _init_nothing(prompts: int, group_size: int, prompt_length: int, max_new_tokens: int) -> tuple[()]:
    del prompts, group_size, prompt_length, max_new_tokens
    return ()
