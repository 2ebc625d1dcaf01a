"""Shares of a batch by task, exact over steps: later batches make up for what one batch cannot give a task."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.text_fields import parse_quotas

_MAX_DENOMINATOR = 2**28
"""Largest denominator of a share; sums and differences of two such numbers stay within int32."""


class Shares(NamedTuple):
    """The division of batches into slots. A slot is a task with a quota; the last slot holds all other tasks."""

    slot_of_task: tuple[int, ...]
    """Slot of each task; () = there is only one slot."""
    parts: tuple[int, ...]
    """Share of each slot in the batch, in units of 1 / their sum."""

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.parts)

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts)

    def share(self, slot: int) -> float:
        """Share of a slot in the batch, in [0, 1]."""
        return self.parts[slot] / self.total

    def slot(self, task_ids: Int[Array, "m"]) -> Int[Array, "m"]:
        """Slot of each prompt; rows of padding get an arbitrary slot."""
        if not self.slot_of_task:
            return jnp.zeros(task_ids.shape, jnp.int32)
        return jnp.asarray(self.slot_of_task, jnp.int32)[jnp.maximum(task_ids, 0).astype(jnp.int32)]

    def most(self, batch: int, slot: int) -> int:
        """Largest number of prompts that a batch takes from a slot, if all batches have this size.

        Before and after each batch the slot is ahead or behind by less than 1 prompt, in whole multiples of
        gcd(batch x part, total) / total.
        """
        amount = batch * self.parts[slot]
        spare = self.total - math.gcd(amount, self.total)
        return min(batch, (amount + 2 * spare) // self.total)

    def divide(self, carry: Int[Array, "slots"], batch: int) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
        """Prompts of each slot in the next batch, and the carry after it.

        Prompts are assigned to slots one by one. The j-th prompt of a slot with share r is among the first ceil(j / r)
        prompts of all, and is not before the (floor((j - 1) / r) + 1)-th. Among the slots whose turn may come, the
        slot with the earliest deadline goes first. Such a schedule exists for all shares that sum to 1, and "earliest
        deadline first" finds it (proportionate fairness: Baruah, Cohen, Plaxton and Varvel, Algorithmica 15, 1996).
        After any number of batches, the number of a slot's prompts differs from its share by less than 1.

        Args:
          carry: amount by which each slot is behind its share, in units of 1 / `total` of a prompt; 0 at the start.
        """
        parts = jnp.asarray(self.parts, jnp.int32)
        rounds, rest = divmod(batch, self.total)
        counts, carry = _apportion(parts, carry, rest, jnp.full(self.slots, batch, jnp.int32))
        return counts + rounds * parts, carry

    def divide_within(
        self, carry: Int[Array, "slots"], number: int, counts: Int[Array, "slots"]
    ) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
        """`divide` for `number` prompts of a batch, such as those drawn uniformly; no slot gets more than `counts`."""
        return _apportion(jnp.asarray(self.parts, jnp.int32), carry, number, counts)


@jax.jit
def _apportion(
    parts: Int[Array, "slots"], carry: Int[Array, "slots"], number: Int[Array, ""] | int, limit: Int[Array, "slots"]
) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
    """Assigns `number` prompts to slots one by one, at most `limit` to each.

    Returns:
      prompts of each slot, and the carry afterwards.
    """
    total, never = parts.sum(), jnp.iinfo(jnp.int32).max

    def one(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        counts, carry = state
        carry = carry + parts
        room = counts < limit
        deadline = -((carry - total) // parts)
        in_turn = jnp.where(room & (carry > 0), deadline, never)
        # Only a limit can leave no slot in turn. Then the slot with room that is furthest behind gets the prompt.
        furthest_behind = jnp.argmax(jnp.where(room, carry, -never))
        chosen = jnp.where((in_turn < never).any(), jnp.argmin(in_turn), furthest_behind)
        return counts.at[chosen].add(1), carry.at[chosen].add(-total)

    return jax.lax.fori_loop(0, number, one, (jnp.zeros_like(parts), carry))


def shares_of(quotas: str, task_names: tuple[str, ...]) -> Shares:
    """The division that selection.quotas asks for.

    Raises:
      ConfigError: quotas name a task that the run does not have, or leave nothing for the other tasks.
    """
    named = parse_quotas(quotas)
    if not named:
        return Shares((), (1,))
    for name in named:
        if name not in task_names:
            raise ConfigError(
                f"selection.quotas={quotas!r}: there is no task {name!r}; the run's tasks are "
                f"{', '.join(task_names) or 'unnamed'}"
            )
    order = list(named)
    # A share counts as it is written: 0.1 is a tenth, and not the nearest binary number.
    exact = [Fraction(repr(share)) for share in named.values()]
    named_total, others = sum(exact, Fraction(0)), [name for name in task_names if name not in named]
    if not others:
        return Shares(
            tuple(order.index(name) for name in task_names), _whole_parts([share / named_total for share in exact])
        )
    if named_total >= 1:
        raise ConfigError(
            f"selection.quotas={quotas!r}: leaves nothing for {', '.join(others)}; name them too, or lower the shares"
        )
    slot_of_task = tuple(order.index(name) if name in named else len(named) for name in task_names)
    return Shares(slot_of_task, _whole_parts([*exact, 1 - named_total]))


def _whole_parts(shares: list[Fraction]) -> tuple[int, ...]:
    """Positive whole numbers in these proportions; they are rounded if their exact sum would be too large."""
    total = math.lcm(*(share.denominator for share in shares))
    if total > _MAX_DENOMINATOR:
        total = _MAX_DENOMINATOR
    parts = [max(1, round(share * total)) for share in shares]
    largest = parts.index(max(parts))
    parts[largest] += total - sum(parts)
    common = math.gcd(*parts)
    return tuple(part // common for part in parts)


def check_prompts(quotas: str, task_names: tuple[str, ...], task_ids: Int[np.ndarray, "N"], batch: int) -> None:
    """Checks that every task has as many prompts as its quota may take for one round.

    Args:
      task_ids: index of each prompt's task in `task_names`.
      batch: prompts of a round.
    Raises:
      ConfigError: a task has fewer.
    """
    shares = shares_of(quotas, task_names)
    have = np.bincount(np.array(shares.slot_of_task, int)[task_ids], minlength=shares.slots)
    for slot in range(shares.slots):
        need = shares.most(batch, slot)
        names = ", ".join(
            name for name, its_slot in zip(task_names, shares.slot_of_task, strict=True) if its_slot == slot
        )
        if have[slot] < need:
            raise ConfigError(
                f"selection.quotas={quotas!r}: takes up to {need} of the {batch} prompts of a round from {names}, and "
                f"there are {have[slot]}; lower the share, rollout.prompts or rollout.oversampling"
            )
