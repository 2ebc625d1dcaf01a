"""Dynamic sampling's queue: effective groups wait in it until a batch of them is there. (DAPO, Yu et al.)"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from pspo_jax.replay.base import Groups, empty_groups, keep, put, take


@struct.dataclass
class Queue:
    """Groups that wait, oldest first."""

    groups: Groups
    held: Int[Array, ""]


def new_queue(groups: int, group_size: int, prompt_length: int, max_new_tokens: int) -> Queue:
    return Queue(empty_groups(groups, group_size, prompt_length, max_new_tokens), jnp.zeros((), jnp.int32))


def append(queue: Queue, groups: Groups, wanted: Bool[Array, "B"]) -> Queue:
    """The queue with the wanted groups behind it, in their order; a prompt that waits already does not enter again.

    There must be room for all of them.
    """
    room = queue.groups.step.shape[0]
    ids = groups.prompts.ids
    waiting = jnp.where(jnp.arange(room) < queue.held, queue.groups.prompts.ids, -1)
    before = jnp.tril(ids[:, None] == ids, -1) & wanted
    wanted = wanted & ~jnp.isin(ids, waiting) & ~before.any(axis=1)
    slot = jnp.where(wanted, queue.held + jnp.cumsum(wanted) - 1, room)
    return Queue(put(queue.groups, slot, groups), queue.held + wanted.sum(dtype=jnp.int32))


def take_first(queue: Queue, batch: int) -> tuple[Groups, Queue]:
    """The first `batch` groups, those that are not there not counted, and the queue without them."""
    room = queue.groups.step.shape[0]
    there = jnp.arange(batch) < queue.held
    first = keep(take(queue.groups, jnp.arange(batch)), there)
    rest = take(queue.groups, jnp.minimum(jnp.arange(room) + batch, room - 1))
    return dataclasses.replace(first, counted=there), Queue(rest, jnp.maximum(queue.held - batch, 0))
