"""APER's replay: single completions come back beside the batch, in proportion to the size of their advantages.

The buffer holds completions, not groups. Each is stored with its prompt, the log-probs of the policy that drew it and
the advantage by which it trained, which is not computed again. At each step completions older than `replay.max_age` are
evicted, stored ones are drawn, and then those of the batch enter whose advantage is not 0. The batch keeps all of its
own completions, and the drawn ones are concatenated to it. (Yoo et al., arXiv 2606.04560, except that capacity, the
smallest age and the number that is drawn are this package's.)

Completions are drawn without replacement by Gumbel top-k: the k largest of log |A| + Gumbel noise are k successive
draws, each in proportion to |A| among those that are left.

Letters: B groups in a batch, G completions per group, C stored completions, k drawn ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.groups import Groups, empty_groups, keep, put, split_groups, take
from pspo_jax.config.schema import Config, extra_completions, rollout_capacity
from pspo_jax.replay.buffer import ring_slots
from pspo_jax.replay.interface import Replay, keep_batch


@struct.dataclass
class RolloutBuffer:
    """The stored completions, in a ring."""

    groups: Groups
    """C completions, each a group of its own; a slot that is empty is not counted."""
    place: Int[Array, ""]
    """Slot that the next completion goes to."""


def aper(config: Config) -> Replay:
    """The buffer of completions as a replay."""
    settings, extra = config.replay, extra_completions(config)

    def init(prompts: int, group_size: int, prompt_length: int, max_new_tokens: int) -> RolloutBuffer:
        del prompts, group_size
        return RolloutBuffer(
            groups=empty_groups(rollout_capacity(config), 1, prompt_length, max_new_tokens),
            place=jnp.zeros((), jnp.int32),
        )

    def add_rollouts(
        buffer: RolloutBuffer, groups: Groups, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Groups, RolloutBuffer]:
        stored = evict(buffer.groups, step - buffer.groups.step > settings.max_age)
        able = stored.counted & (step - stored.step >= settings.min_age)
        rows, drawn = draw(key, jnp.where(able, jnp.abs(stored.advantages[:, 0]), 0), extra)
        fresh = split_groups(groups)
        # A completion that the length limit cut off has no token in the loss with loss.mask_truncated.
        useful = fresh.counted & (fresh.ended[:, 0] | (not config.loss.mask_truncated))
        return keep(take(stored, rows), drawn), store(RolloutBuffer(stored, buffer.place), fresh, useful)

    return Replay(init, keep_batch, add_rollouts=add_rollouts)


def evict(stored: Groups, old: Bool[Array, "C"]) -> Groups:
    """The stored completions without the old ones, whose slots are empty then."""
    return dataclasses.replace(keep(stored, ~old), step=jnp.where(old, -1, stored.step))


def draw(key: Key[Array, ""], weight: Float[Array, "C"], number: int) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """Slots drawn without replacement in proportion to their weights, and whether each was drawn.

    A slot of weight 0 is never drawn; places for which there is no other are not drawn.

    Args:
      number: k, at most C.
    """
    noise = jax.random.gumbel(key, weight.shape, mode="high")
    score = jnp.where(weight > 0, jnp.log(weight) + noise, -jnp.inf)
    best, slots = jax.lax.top_k(score, number)
    return slots, best > -jnp.inf


def store(buffer: RolloutBuffer, fresh: Groups, useful: Bool[Array, "BG"]) -> RolloutBuffer:
    """The buffer after the useful ones of a batch's completions have entered, unless their advantage is 0.

    Of one batch, those of smaller |advantage| leave first.
    """
    size = jnp.abs(fresh.advantages[:, 0])
    order, slot, place = ring_slots(buffer.place, buffer.groups.step.shape[0], useful & (size > 0), size)
    return RolloutBuffer(put(buffer.groups, slot, take(fresh, order)), place)
