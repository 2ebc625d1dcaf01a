"""Shares of a batch by task, exact over steps: what a batch cannot give a task, later batches do."""

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

_FINEST = 2**28
"""Largest denominator of a share; sums and differences of two such numbers stay within int32."""


class Shares(NamedTuple):
    """How batches are divided; a slot is a task with a quota, and the last one all other tasks."""

    of_kind: tuple[int, ...]
    """Slot of each task; () = there is one slot."""
    parts: tuple[int, ...]
    """Share of each slot in the batch, in units of 1 / their sum."""

    @property
    def slots(self) -> int:
        return len(self.parts)

    @property
    def whole(self) -> int:
        """The sum of all parts."""
        return sum(self.parts)

    def share(self, slot: int) -> float:
        """Share of a slot in the batch, in [0, 1]."""
        return self.parts[slot] / self.whole

    def slot(self, kind: Int[Array, "m"]) -> Int[Array, "m"]:
        """Slot of each prompt; anything for padding."""
        if not self.of_kind:
            return jnp.zeros(kind.shape, jnp.int32)
        return jnp.asarray(self.of_kind, jnp.int32)[jnp.maximum(kind, 0).astype(jnp.int32)]

    def most(self, batch: int, slot: int) -> int:
        """Most prompts that a batch takes of a slot, if all batches are of this size.

        Before and after each batch the slot is ahead or behind by less than 1, in whole multiples of
        gcd(batch x part, whole) / whole.
        """
        amount = batch * self.parts[slot]
        spare = self.whole - math.gcd(amount, self.whole)
        return min(batch, (amount + 2 * spare) // self.whole)

    def divide(self, carry: Int[Array, "slots"], batch: int) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
        """Prompts of each slot in the next batch, and the carry after it.

        Prompts are dealt to slots one by one. The j-th of a slot with share r is dealt as one of the first ceil(j / r)
        and not before the (floor((j - 1) / r) + 1)-th; among slots whose turn may come, the one goes first whose turn
        must come first. Such a schedule exists for all shares that sum to 1, and earliest deadline first finds it
        (proportionate fairness: Baruah, Cohen, Plaxton and Varvel, Algorithmica 15, 1996). So after any number of
        batches a slot has its share of all prompts to less than 1.

        Args:
          carry: how far each slot is behind its share, in units of 1 / `whole` of a prompt; 0 at the start.
        """
        parts = jnp.asarray(self.parts, jnp.int32)
        rounds, rest = divmod(batch, self.whole)
        counts, carry = _deal(parts, carry, rest, jnp.full(self.slots, batch, jnp.int32))
        return counts + rounds * parts, carry

    def divide_within(
        self, carry: Int[Array, "slots"], number: int, counts: Int[Array, "slots"]
    ) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
        """`divide` of a part of a batch, such as what is drawn uniformly: no slot gets more than `counts`."""
        return _deal(jnp.asarray(self.parts, jnp.int32), carry, number, counts)


@jax.jit
def _deal(
    parts: Int[Array, "slots"], carry: Int[Array, "slots"], number: Int[Array, ""] | int, limit: Int[Array, "slots"]
) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
    """Some prompts dealt to slots one by one, at most `limit` to each: counts, and the carry after them."""
    whole, never = parts.sum(), jnp.iinfo(jnp.int32).max

    def one(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        counts, carry = state
        carry = carry + parts
        room = counts < limit
        deadline = -((carry - whole) // parts)
        in_turn = jnp.where(room & (carry > 0), deadline, never)
        # Only a limit can leave no slot in turn: then the one with room that is furthest behind is dealt to.
        behind = jnp.argmax(jnp.where(room, carry, -never))
        chosen = jnp.where((in_turn < never).any(), jnp.argmin(in_turn), behind)
        return counts.at[chosen].add(1), carry.at[chosen].add(-whole)

    return jax.lax.fori_loop(0, number, one, (jnp.zeros_like(parts), carry))


def shares_of(quotas: str, kinds: tuple[str, ...]) -> Shares:
    """The division that selection.quotas asks for.

    Raises:
      ConfigError: it names a task that is not there, or shares that do not add up.
    """
    named = parse_quotas(quotas)
    if not named:
        return Shares((), (1,))
    for name in named:
        if name not in kinds:
            raise ConfigError(
                f"selection.quotas={quotas!r}: there is no task {name!r}; the run's tasks are "
                f"{', '.join(kinds) or 'unnamed'}"
            )
    order = list(named)
    # As written: 0.1 is a tenth, and not the nearest binary number.
    exact = [Fraction(repr(share)) for share in named.values()]
    total, others = sum(exact, Fraction(0)), [k for k in kinds if k not in named]
    if not others:
        return Shares(tuple(order.index(k) for k in kinds), _whole_parts([share / total for share in exact]))
    if total >= 1:
        raise ConfigError(
            f"selection.quotas={quotas!r}: leaves nothing for {', '.join(others)}; name them too, or lower the shares"
        )
    of_kind = tuple(order.index(k) if k in named else len(named) for k in kinds)
    return Shares(of_kind, _whole_parts([*exact, 1 - total]))


def _whole_parts(shares: list[Fraction]) -> tuple[int, ...]:
    """Whole numbers in these proportions: exact, or rounded where their sum would be too large; none is 0."""
    whole = math.lcm(*(share.denominator for share in shares))
    if whole > _FINEST:
        whole = _FINEST
    parts = [max(1, round(share * whole)) for share in shares]
    largest = parts.index(max(parts))
    parts[largest] += whole - sum(parts)
    common = math.gcd(*parts)
    return tuple(part // common for part in parts)


def check_prompts(quotas: str, kinds: tuple[str, ...], kind: Int[np.ndarray, "N"], batch: int) -> None:
    """Every task must have as many prompts as its quota may take for one batch, or round of dynamic sampling.

    Args:
      kind: index of each prompt's task in `kinds`.
    Raises:
      ConfigError: one has not.
    """
    shares = shares_of(quotas, kinds)
    have = np.bincount(np.array(shares.of_kind, int)[kind], minlength=shares.slots)
    for slot in range(shares.slots):
        need = shares.most(batch, slot)
        names = ", ".join(name for name, own in zip(kinds, shares.of_kind, strict=True) if own == slot)
        if have[slot] < need:
            raise ConfigError(
                f"selection.quotas={quotas!r}: takes up to {need} of the {batch} prompts of a round from {names}, and "
                f"there are {have[slot]}; lower the share, rollout.prompts or rollout.oversampling"
            )
