"""Shares of a batch by task."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pspo_jax.fields import ConfigError


class Shares(NamedTuple):
    """How a batch is divided; a slot is a task with a quota, and the last one all other tasks."""

    of_kind: tuple[int, ...]
    """Slot of each task; () = there is one slot."""
    share: tuple[float, ...]
    """Of the batch, by slot; sums to 1."""

    @property
    def slots(self) -> int:
        return len(self.share)

    def slot(self, kind: Int[Array, "m"]) -> Int[Array, "m"]:
        """Slot of each prompt; anything for padding."""
        if not self.of_kind:
            return jnp.zeros(kind.shape, jnp.int32)
        return jnp.asarray(self.of_kind, jnp.int32)[jnp.maximum(kind, 0).astype(jnp.int32)]

    def counts(self, batch: int) -> list[int]:
        """Prompts of each slot in a batch, by largest remainders."""
        whole = [int(share * batch + 1e-9) for share in self.share]
        rest = sorted(range(self.slots), key=lambda i: (whole[i] - self.share[i] * batch, i))
        for i in rest[: batch - sum(whole)]:
            whole[i] += 1
        return whole


def shares_of(quotas: str, kinds: tuple[str, ...]) -> Shares:
    """The division that selection.quotas asks for.

    Raises:
      ConfigError: it names a task that is not there, or shares that do not add up.
    """
    named = parse_quotas(quotas)
    if not named:
        return Shares((), (1.0,))
    for name in named:
        if name not in kinds:
            raise ConfigError(
                f"selection.quotas={quotas!r}: there is no task {name!r}; the run's tasks are "
                f"{', '.join(kinds) or 'unnamed'}"
            )
    total, others = sum(named.values()), [k for k in kinds if k not in named]
    if not others:
        return Shares(tuple(list(named).index(k) for k in kinds), tuple(v / total for v in named.values()))
    if total > 1 - 1e-9:
        raise ConfigError(
            f"selection.quotas={quotas!r}: leaves nothing for {', '.join(others)}; name them too, or lower the shares"
        )
    of_kind = tuple(list(named).index(k) if k in named else len(named) for k in kinds)
    return Shares(of_kind, (*named.values(), 1 - total))


def parse_quotas(quotas: str) -> dict[str, float]:
    """Task -> share.

    Raises:
      ConfigError: it cannot be read as "task=share, ...", with shares above 0 that sum to at most 1.
    """
    named: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in quotas.split(","))):
        name, equals, text = (x.strip() for x in part.partition("="))
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not (name and equals and 0 < value <= 1) or name in named:
            raise ConfigError(
                f"selection.quotas={quotas!r}: {part!r} is no task=share with a share in (0, 1], each task once, "
                'such as "math=0.5, gsm8k=0.5"'
            )
        named[name] = value
    if sum(named.values()) > 1 + 1e-9:
        raise ConfigError(f"selection.quotas={quotas!r}: sums to more than 1; lower a share")
    return named
