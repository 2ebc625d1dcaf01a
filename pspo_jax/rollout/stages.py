"""The stages of a rollout in slots: how the memory of the slots is divided, and how much of it is read.

With one stage, s slots hold s caches of T columns, of which every token reads all, however short its row is. With J
stages the same memory holds, first, the slots of one stage at a time: S of T columns in the last stage, 2 S of T/2
columns before it, and so on; and second, the rows that have filled the columns of a stage and wait for the next one.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError

WAITING_PER_SLOT = 4
"""Memory of the rows that wait for a stage, as a multiple of the memory of a stage's slots.

With less, a stage ends often, and each time its slots wait for the last of their rows; with more, there are fewer
slots, so that weights are read more often. In a simulation of 256 rows of log-normal lengths, multiples of 1, 2 and 4
gave 0.40, 0.55 and 0.64 of the columns read to live tokens.
"""
COLUMN_MULTIPLE = 64
"""Multiple of columns of all stages but the last: sums over columns of which the rest is masked are then those over
fewer columns to the bit, as the compiler adds numbers in vectors."""
SHORTEST_STAGE_TOKENS = 256
"""Smallest number of columns of a first stage that is chosen automatically."""
MOST_STAGES = 5
"""Largest number of stages that is chosen automatically; each compiles the token loop once more."""


class Stage(NamedTuple):
    """A stage of a shard's rollout."""

    slots: int
    """Rows that are decoded at a time."""
    columns: int
    """Tokens for which each slot has room."""
    waiting: int
    """Rows that filled the stage before and for which there is room while they wait for this one; 0 = the first
    stage."""


def make_stages(slots: int, count: int, max_new_tokens: int, rows: int) -> list[Stage]:
    """Stages of one shard, whose caches need at most the memory of `slots` caches of `max_new_tokens` columns.

    Args:
      slots: completions of the greatest length for which a shard has memory.
      count: number of stages.
      rows: completions of the shard.
    Raises:
      ConfigError: the stages do not fit into the memory, or a completion is too short for so many.
    """
    if count == 1:
        return [Stage(min(slots, rows), max_new_tokens, 0)]
    columns = [max_new_tokens]
    while len(columns) < count:
        half = -(-columns[0] // 2 // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        if half >= columns[0]:
            raise ConfigError(
                f"rollout.stages={count}: rollout.max_new_tokens={max_new_tokens} can be halved to {COLUMN_MULTIPLE} "
                f"tokens in {len(columns)} stages at most; choose {len(columns)}"
            )
        columns = [half, *columns]
    last = max(1, round(slots / (1 + WAITING_PER_SLOT * (count - 1))))
    for_each = (slots - last) * max_new_tokens // (count - 1)
    waiting = [0] + [min(rows, for_each // width) for width in columns[:-1]]
    if min(waiting[1:]) < 1:
        raise ConfigError(
            f"rollout.stages={count}: slots={slots} a device have no room for the rows that wait between stages; set "
            f"rollout.slots to {-(-(count + 1) // 2)} or more a device, or choose fewer stages"
        )
    return [
        Stage(min(rows, last * max_new_tokens // width), width, wait)
        for width, wait in zip(columns, waiting, strict=True)
    ]


def cache_columns(stages: list[Stage]) -> int:
    """Columns of keys and values that the stages of a shard hold at a time: slots, and rows that wait."""
    waiting = sum(now.waiting * before.columns for before, now in itertools.pairwise(stages))
    return max(stage.slots * stage.columns for stage in stages) + waiting


def automatic_stages(slots: int, max_new_tokens: int, column_bytes: float, weight_bytes: float) -> int:
    """Number of stages for `rollout.stages=None`: the most that leave the cache the larger part of what a token reads.

    Stages decode fewer rows at a time in the same memory, so that weights are read more often. They pay where the
    caches of the last stage's slots are larger than the weights.

    Args:
      slots: completions of the greatest length for which a device has memory.
      column_bytes: bytes of the keys and values of a token.
      weight_bytes: bytes of the weights that a device reads for a token.
    """
    for count in range(MOST_STAGES, 1, -1):
        last = round(slots / (1 + WAITING_PER_SLOT * (count - 1)))
        long = max_new_tokens >= SHORTEST_STAGE_TOKENS * 2 ** (count - 1)
        if long and last and last * max_new_tokens * column_bytes >= weight_bytes:
            return count
    return 1
