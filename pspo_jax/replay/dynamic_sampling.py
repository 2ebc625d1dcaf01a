"""The queue of dynamic sampling (DAPO, Yu et al.): effective groups wait in it until there are enough for a batch."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.groups import Groups, empty_groups, keep, put, take


@struct.dataclass
class Queue:
    """Groups that wait for a batch."""

    groups: Groups
    """Slots, the groups that wait in front, the oldest first."""
    held: Int[Array, ""]
    """Number of groups that wait."""
    sampling_log_probs: Float[Array, "room G T"] | None = None
    """Log-probs of the groups' tokens under the distribution that was drawn from; None = that
    is the policy's own, because neither top-k nor top-p cuts it."""


def new_queue(groups: int, group_size: int, prompt_length: int, max_new_tokens: int, truncates: bool = False) -> Queue:
    """An empty queue.

    Args:
      groups: the number of slots.
      truncates: whether tokens are drawn from a truncated distribution, by top-k or top-p.
    """
    return Queue(
        empty_groups(groups, group_size, prompt_length, max_new_tokens),
        jnp.zeros((), jnp.int32),
        jnp.zeros((groups, group_size, max_new_tokens), jnp.float32) if truncates else None,
    )


def append(
    queue: Queue, groups: Groups, wanted: Bool[Array, "B"], sampling_log_probs: Float[Array, "B G T"] | None = None
) -> Queue:
    """The queue after the wanted groups have joined its end, in their order.

    A group whose prompt waits already does not enter. There must be room for all of them.
    """
    room = queue.groups.step.shape[0]
    ids = groups.prompts.ids
    waiting = jnp.where(jnp.arange(room) < queue.held, queue.groups.prompts.ids, -1)
    before = jnp.tril(ids[:, None] == ids, -1) & wanted
    wanted = wanted & ~jnp.isin(ids, waiting) & ~before.any(axis=1)
    slot = jnp.where(wanted, queue.held + jnp.cumsum(wanted) - 1, room)
    sampling = queue.sampling_log_probs
    if sampling is not None:
        sampling = sampling.at[slot].set(sampling_log_probs, mode="drop")
    return Queue(put(queue.groups, slot, groups), queue.held + wanted.sum(dtype=jnp.int32), sampling)


def take_first(queue: Queue, batch: int) -> tuple[Groups, Queue]:
    """The first `batch` groups of the queue, and the queue without them. Slots that are empty are not counted."""
    room = queue.groups.step.shape[0]
    there = jnp.arange(batch) < queue.held
    first = keep(take(queue.groups, jnp.arange(batch)), there)
    left = jnp.minimum(jnp.arange(room) + batch, room - 1)
    sampling = None if queue.sampling_log_probs is None else queue.sampling_log_probs[left]
    rest = Queue(take(queue.groups, left), jnp.maximum(queue.held - batch, 0), sampling)
    return dataclasses.replace(first, counted=there), rest
