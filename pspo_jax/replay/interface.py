"""The contract of a replay, the groups that pass through it, and those that store nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.state import Prompts, Rollouts
from pspo_jax.config.schema import Config


@struct.dataclass
class Groups:
    """What the optimizer sees: whole groups with their rewards and advantages."""

    prompts: Prompts
    tokens: Int[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    log_probs: Float[Array, "B G T"]
    """Of the policy that drew the tokens: the behaviour policy."""
    rewards: Float[Array, "B G"]
    advantages: Float[Array, "B G"]
    """The group's own, from the step that sampled it."""
    ended: Bool[Array, "B G"]
    step: Int[Array, "B"]
    """Step that sampled the group; -1 = there is none."""
    counted: Bool[Array, "B"]
    """Whether the group is in the batch: no mean counts the others."""


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


def groups_of(
    rollouts: Rollouts, rewards: Float[Array, "B G"], advantages: Float[Array, "B G"], step: Int[Array, ""]
) -> Groups:
    """Fresh rollouts as groups, all in the batch."""
    batch = rewards.shape[0]
    return Groups(
        prompts=rollouts.prompts,
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        log_probs=rollouts.log_probs,
        rewards=rewards,
        advantages=advantages,
        ended=rollouts.ended,
        step=jnp.full(batch, step, jnp.int32),
        counted=jnp.ones(batch, bool),
    )


def empty_groups(groups: int, group_size: int, prompt_length: int, max_new_tokens: int) -> Groups:
    """Room for groups, none of them there."""
    # Every leaf has a buffer of its own: donated states may not share any.
    prompts = Prompts(
        jnp.zeros(groups, jnp.int32),
        jnp.zeros((groups, prompt_length), jnp.int32),
        jnp.ones(groups, jnp.int32),
        jnp.ones(groups, jnp.float32),
    )
    rows, tokens = (groups, group_size), (groups, group_size, max_new_tokens)
    return Groups(
        prompts=prompts,
        tokens=jnp.zeros(tokens, jnp.int32),
        mask=jnp.zeros(tokens, bool),
        log_probs=jnp.zeros(tokens, jnp.float32),
        rewards=jnp.zeros(rows, jnp.float32),
        advantages=jnp.zeros(rows, jnp.float32),
        ended=jnp.zeros(rows, bool),
        step=jnp.full(groups, -1, jnp.int32),
        counted=jnp.zeros(groups, bool),
    )


def effective(groups: Groups, by: str = "rewards") -> Bool[Array, "B"]:
    """Groups in the batch that carry a gradient: rewards differ, or (by "advantages") an advantage is not 0."""
    if by == "advantages":
        found = (groups.advantages != 0).any(axis=1)
    else:
        stats = group_statistics(groups.rewards, ddof=1)
        found = (stats.variance > 0) & (stats.verdicts > 1)
    return found & groups.counted


def keep(groups: Groups, kept: Bool[Array, "B"]) -> Groups:
    """`groups` with the others out of the batch: their tokens masked, their advantages 0."""
    return dataclasses.replace(
        groups,
        mask=groups.mask & kept[:, None, None],
        advantages=jnp.where(kept[:, None], groups.advantages, 0),
        counted=groups.counted & kept,
    )


def take(groups: Groups, rows: Int[Array, "m"]) -> Groups:
    """Some groups."""
    return jax.tree.map(lambda x: x[rows], groups)


def put(groups: Groups, rows: Int[Array, "m"], values: Groups) -> Groups:
    """`groups` with some replaced; a row beyond the end is none."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), groups, values)


def none(config: Config) -> Replay:
    """Every batch is its own: nothing is stored, nothing comes back."""
    return Replay(
        init=lambda prompts, group_size, prompt_length, max_new_tokens: (),
        exchange=lambda state, groups, step, key, distance=None: (groups, state),
    )


def filtered(config: Config) -> Replay:
    """GRPO-filter: ineffective groups leave the batch, and means are over the others."""
    by = config.replay.effective
    return Replay(
        init=lambda prompts, group_size, prompt_length, max_new_tokens: (),
        exchange=lambda state, groups, step, key, distance=None: (keep(groups, effective(groups, by)), state),
    )
