"""Whole groups with their rewards and advantages: what the optimizer sees and what a replay buffer stores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.state import Prompts, Rollouts


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
