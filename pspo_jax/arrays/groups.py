"""Whole groups with their rewards and advantages, as the optimizer sees them and a replay buffer stores them.

Letters: B groups, G completions per group, T completion length.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.state import Prompts, Rollouts


@struct.dataclass
class Groups:
    """Completions of each prompt with their rewards and advantages."""

    prompts: Prompts
    """The prompt of each group."""
    tokens: Int[Array, "B G T"]
    """Completions with their EOS, then padding."""
    mask: Bool[Array, "B G T"]
    """Whether the place holds a token that was drawn."""
    log_probs: Float[Array, "B G T"]
    """Log-probs under the behaviour policy, the one that drew the tokens."""
    rewards: Float[Array, "B G"]
    """Reward of each completion; NaN = none."""
    advantages: Float[Array, "B G"]
    """Advantages, computed in the step that sampled the group."""
    ended: Bool[Array, "B G"]
    """Whether a stop token ended the completion, and not the length limit."""
    step: Int[Array, "B"]
    """Step that sampled the group; -1 = the slot is empty."""
    counted: Bool[Array, "B"]
    """Whether the group is in the batch; no mean counts the others."""
    versions: Int[Array, "B J"] | None = None
    """`Rollouts.versions`; None = one policy drew all tokens of a group, that of `step`."""


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
        versions=rollouts.versions,
    )


def empty_groups(groups: int, group_size: int, prompt_length: int, max_new_tokens: int) -> Groups:
    """Empty slots for `groups` groups."""
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


def with_images(tree: PyTree, images: Images | None) -> PyTree:
    """The tree with room for images in the prompts of all of its `Groups`; None = the data has no images.

    Args:
      images: the empty images of one prompt.
    """

    def one(x: PyTree) -> PyTree:
        if not isinstance(x, Groups):
            return x
        count = x.step.shape[0]
        room = jax.tree.map(lambda y: jnp.repeat(y, count, axis=0), images)
        return dataclasses.replace(x, prompts=dataclasses.replace(x.prompts, images=room))

    return tree if images is None else jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Groups))


def keep(groups: Groups, kept: Bool[Array, "B"]) -> Groups:
    """`groups` with those that are not kept out of the batch: their tokens are masked, their advantages 0."""
    return dataclasses.replace(
        groups,
        mask=groups.mask & kept[:, None, None],
        advantages=jnp.where(kept[:, None], groups.advantages, 0),
        counted=groups.counted & kept,
    )


def split_groups(groups: Groups) -> Groups:
    """Each completion as a group of its own, [B, G, ...] -> [B G, 1, ...]."""
    size = groups.rewards.shape[1]

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, size, axis=0)

    def alone(x: Array) -> Array:
        return x.reshape(-1, 1, *x.shape[2:])

    return Groups(
        prompts=jax.tree.map(repeated, groups.prompts),
        tokens=alone(groups.tokens),
        mask=alone(groups.mask),
        log_probs=alone(groups.log_probs),
        rewards=alone(groups.rewards),
        advantages=alone(groups.advantages),
        ended=alone(groups.ended),
        step=repeated(groups.step),
        counted=repeated(groups.counted),
    )


def take(groups: Groups, rows: Int[Array, "m"]) -> Groups:
    """The groups in these rows."""
    return jax.tree.map(lambda x: x[rows], groups)


def put(groups: Groups, rows: Int[Array, "m"], values: Groups) -> Groups:
    """`groups` with those in `rows` replaced by `values`; rows beyond the end are ignored."""
    return jax.tree.map(lambda x, v: x.at[rows].set(v, mode="drop"), groups, values)
