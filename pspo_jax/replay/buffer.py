"""POPO's replay: ineffective groups are replaced by recent effective ones from a ring buffer.

Only fresh effective groups enter, whole, with their own advantages and the log-probs of the policy that drew them; the
oldest leaves first. Inside one step the group of larger reward variance counts as the newer one. A stored group comes
back while it is young enough and has not come back too often, and never beside another group of its prompt. Slots for
which nothing is stored leave the batch. (Mao et al., arXiv 2606.01281, except that capacity, age and number of uses are
this package's.)

Letters: B groups in a batch, C stored groups.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, Num

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.groups import Groups, empty_groups, keep, put, take
from pspo_jax.config.schema import Config
from pspo_jax.config.strategies import ReplayConfig
from pspo_jax.replay.interface import DistanceFn, Replay, effective


@struct.dataclass
class ReplayBuffer:
    """The stored groups, in a ring."""

    groups: Groups
    """C slots; a slot that is empty is not counted."""
    uses: Int[Array, "C"]
    """Number of times that each group has come back."""
    place: Int[Array, ""]
    """Slot that the next group goes to, which holds the oldest one."""
    share: Float[Array, ""]
    """Largest share of the next batch that is replayed."""


def popo(config: Config) -> Replay:
    """The ring buffer as a replay."""
    settings = config.replay

    def init(prompts: int, group_size: int, prompt_length: int, max_new_tokens: int) -> ReplayBuffer:
        capacity = settings.capacity or prompts
        return ReplayBuffer(
            groups=empty_groups(capacity, group_size, prompt_length, max_new_tokens),
            uses=jnp.zeros(capacity, jnp.int32),
            place=jnp.zeros((), jnp.int32),
            share=jnp.full((), settings.max_share, jnp.float32),
        )

    def mix_batch(
        buffer: ReplayBuffer,
        groups: Groups,
        step: Int[Array, ""],
        key: Key[Array, ""],
        distance: DistanceFn | None = None,
    ) -> tuple[Groups, ReplayBuffer]:
        fresh = effective(groups, settings.effective)
        order, usable = replay_order(settings, buffer, groups, fresh, step, key, distance)
        # The k-th ineffective slot takes the k-th stored group.
        turn = jnp.cumsum(~fresh) - 1
        limit = jnp.floor(buffer.share * fresh.shape[0] + 1e-4).astype(jnp.int32)
        replaced = ~fresh & (turn < jnp.minimum(usable, limit))
        source = order[jnp.clip(turn, 0, order.shape[0] - 1)]
        stored = take(buffer.groups, source)
        mixed = jax.tree.map(
            lambda old, new: jnp.where(replaced.reshape(-1, *[1] * (new.ndim - 1)), old, new), stored, groups
        )
        capacity = buffer.uses.shape[0]
        uses = buffer.uses.at[jnp.where(replaced, source, capacity)].add(1, mode="drop")
        return keep(mixed, fresh | replaced), insert(dataclasses.replace(buffer, uses=uses), groups, fresh)

    def adapt_share(buffer: ReplayBuffer, ess: Float[Array, ""]) -> ReplayBuffer:
        if not settings.ess_floor:
            return buffer
        # One group at least is replayed: without any, the effective sample size could not be measured any more.
        least = jnp.float32(min(settings.max_share, 1 / config.rollout.prompts))
        grown = jnp.minimum(buffer.share * 1.25, settings.max_share)
        return dataclasses.replace(
            buffer, share=jnp.where(ess < settings.ess_floor, jnp.maximum(buffer.share / 2, least), grown)
        )

    return Replay(init, mix_batch, adapt_share)


def replay_order(
    settings: ReplayConfig,
    buffer: ReplayBuffer,
    groups: Groups,
    fresh: Bool[Array, "B"],
    step: Int[Array, ""],
    key: Key[Array, ""],
    distance: DistanceFn | None = None,
) -> tuple[Int[Array, "C"], Int[Array, ""]]:
    """Slots of the buffer in the order in which they come back, and how many of them may.

    Args:
      groups: the batch.
      fresh: groups of the batch that stay; no stored group of their prompts comes back.
      key: key of the random order.
      distance: the policy's distance from stored groups, for the order kl.
    """
    stored = buffer.groups
    capacity = buffer.uses.shape[0]
    age = step - stored.step
    able = stored.counted & (age >= settings.min_age) & (age <= settings.max_age) & (buffer.uses < settings.max_uses)
    able &= ~jnp.isin(stored.prompts.ids, jnp.where(fresh, groups.prompts.ids, -1))
    newness = (jnp.arange(capacity, dtype=jnp.int32) - buffer.place) % capacity
    preferred = _preference(settings, stored, age, key, distance)
    order = jnp.lexsort((-newness, -preferred, ~able))
    # Of a prompt's groups only the first one in this order may come back.
    ids = stored.prompts.ids[order]
    by_prompt = jnp.lexsort((jnp.arange(capacity), ids, ~able[order]))
    sorted_ids = ids[by_prompt]
    again = jnp.concatenate([jnp.zeros(1, bool), sorted_ids[1:] == sorted_ids[:-1]])
    first = able[order] & ~jnp.zeros(capacity, bool).at[by_prompt].set(again)
    return order[jnp.argsort(~first, stable=True)].astype(jnp.int32), first.sum()


def _preference(
    settings: ReplayConfig, stored: Groups, age: Int[Array, "C"], key: Key[Array, ""], distance: DistanceFn | None
) -> Num[Array, "C"]:
    """A number for each stored group: the larger it is, the earlier the group comes back. Of equal ones the group that
    was stored last is first.

    Raises:
      ValueError: the order is kl and distance is None.
    """
    variance = group_statistics(stored.rewards, ddof=1).variance
    match settings.order:
        case "newest":
            return stored.step
        case "variance":
            return variance
        case "fresh_priority":
            return variance * jnp.exp(-age / settings.tau)
        case "random":
            return jax.random.uniform(key, variance.shape)
        case "kl":
            if distance is None:
                raise ValueError("replay.order=kl: mix_batch needs `distance`, which measures the policy's")
            return -distance(stored)


def insert(buffer: ReplayBuffer, groups: Groups, fresh: Bool[Array, "B"]) -> ReplayBuffer:
    """The buffer after the effective groups of a batch have entered it, the one of largest variance last."""
    variance = group_statistics(groups.rewards, ddof=1).variance
    order, slot, place = ring_slots(buffer.place, buffer.uses.shape[0], fresh, variance)
    return dataclasses.replace(
        buffer,
        groups=put(buffer.groups, slot, take(groups, order)),
        uses=buffer.uses.at[slot].set(0, mode="drop"),
        place=place,
    )


def ring_slots(
    place: Int[Array, ""], capacity: int, entering: Bool[Array, "B"], worth: Float[Array, "B"]
) -> tuple[Int[Array, "B"], Int[Array, "B"], Int[Array, ""]]:
    """The order in which a batch enters a ring, the slot of each entry in that order, and the place after them.

    Entries come by ascending worth, so that of one batch the least worthy leave first; of equal ones the first of the
    batch comes last. Entries that do not enter come first in the order, and get a slot that does not exist.

    Args:
      place: the slot that the next entry goes to.
      capacity: number of slots; more entries than these are cut to the most worthy.
    """
    batch = entering.shape[0]
    order = jnp.lexsort((-jnp.arange(batch), worth, entering))
    number = entering.sum()
    rank = jnp.arange(batch) - (batch - number)
    kept = (rank >= 0) & (rank >= number - capacity)
    slot = jnp.where(kept, (place + rank) % capacity, capacity)
    return order, slot, ((place + number) % capacity).astype(jnp.int32)
