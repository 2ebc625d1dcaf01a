"""The contract of a selector, and what a new one has to say for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.per_prompt import follow_rows


class PromptMetadata(NamedTuple):
    """What is known of prompts before the first step."""

    kind: Int[Array, "N"]
    """Index of each prompt's task among the run's."""
    difficulty: Float[Array, "N"] | None = None


class SelectorContext(NamedTuple):
    """What a run decides and a selector has to know."""

    batch: int
    """Prompts a step, B."""
    group_size: int
    steps: int
    """Of the whole run, for what is annealed."""
    seed: int
    kinds: tuple[str, ...] = ()
    """Names of the run's tasks, in the order of `Columns.kind`."""
    rounds: int = 1
    """Most batches a step."""


class Selector(NamedTuple):
    """Which prompts next, as pure functions over a per-prompt state S.

    init(num_prompts, columns: Columns | None = None) -> S
    select(S, key, step, batch) -> (ids [batch] int32, loss_weight [batch] float32 in (0, 1], S)
        `batch` is static; ids are distinct, unless the config says with replacement. The largest weight is 1.
    observe(S, ids [B], outcome: Outcome, step) -> S
        Called once a round, with what the selected prompts gave. A step has one round, with dynamic sampling none or up
        to `Sizes.rounds`; time is counted in steps, those without a round included.
    follow(S, fresh, places [N]) -> S
        The state for changed data: `fresh` is init's for the new prompts, `places` their old rows, -1 = new.
    batch_metrics(S, ids, step) -> dict of scalars
        What the draw of `ids` looks like before it is observed; O(batch).
    summary(S, step) -> dict of scalars and histograms
        The whole data set; one pass over it.
    to_table(S, step) -> dict of per-prompt arrays [R]
        visits, last_step, success, priority (NaN = it has none).
    """

    init: Callable[..., Any]
    select: Callable[..., tuple[Any, Any, Any]]
    observe: Callable[..., Any]
    follow: Callable[..., Any] = follow_rows
    batch_metrics: Callable[..., dict[str, Any]] = lambda state, ids, step: {}
    summary: Callable[..., dict[str, Any]] = lambda state, step: {}
    to_table: Callable[..., dict[str, Any]] = lambda state, step: {}


class PromptStats(NamedTuple):
    """Prompts as a scorer sees them."""

    rows: Int[Array, "m"]
    last: Int[Array, "m"]
    """Step of the last visit, -1 = never."""
    visits: Int[Array, "m"]
    now: Int[Array, ""]
    """The step that they would be drawn in."""


class VisitUpdate(NamedTuple):
    """What a step learned about its prompts. Of a prompt that is twice in a batch, successes are of all its groups."""

    look: PromptStats
    """As before the visit; `look.now` is the step."""
    judged: Bool[Array, "B"]
    """Whether there is any verdict."""
    successes: Float[Array, "B"]
    """Of the completions with a verdict, the sum of their success in [0, 1]."""
    failures: Float[Array, "B"]
    """The rest of them."""
    success: Float[Array, "B"]
    """Mean success."""
    mixed: Bool[Array, "B"]
    """Whether the group's rewards differ."""
    outcome: Any
    """The Outcome itself."""
    writes: Bool[Array, "B"]
    """False = a later entry is of the same prompt, and what is learned from that one is kept."""


def _no_pool(per_prompt: Any, look: PromptStats) -> Int[Array, "m"]:
    return jnp.zeros_like(look.rows)


class Ranked(NamedTuple):
    """The best k of a pool, by row; key -inf = there are no more."""

    rows: Int[Array, "k"]
    key: Float[Array, "k"]
    tie: Float[Array, "k"]


class Scorer(NamedTuple):
    """What makes one selector differ from another, as functions over its own state: per-prompt arrays P, scalars W.

    `selection.make` adds the rest: visits, who may be drawn, cooldown, quotas, exploration, the tree.
    """

    mode: Literal["top", "draw", "candidates"]
    """top: the largest scores; draw: in proportion to scores, which are weights; candidates: of a pool of eligible
    prompts drawn uniformly, the largest `candidate_score`."""
    init: Callable[..., tuple[Any, Any]]
    """(num_prompts, rows, columns) -> (P, W)"""
    learn: Callable[..., tuple[Any, Any]]
    """(P of B prompts, W, News) -> the same after the visit"""
    score: Callable[..., Any]
    """(P of m prompts, W, Look) -> float32 [m]; larger = earlier, or a weight"""
    tie: Callable[..., Any] | None = None
    """(P, Look) -> finite positive float32: which of equal scores is first; None = the oldest visit"""
    candidate_score: Callable[..., Any] | None = None
    """(key, P, W, Look) -> float32 [m]"""
    pools: tuple[str, ...] = ("all",)
    """Names of the pools that prompts move between."""
    pool: Callable[..., Any] = _no_pool
    """(P, Look) -> the pool that each prompt is in"""
    merge: Callable[..., Any] | None = None
    """With several pools: (their top k, step, k, the last step with a round, -1 = none) -> the batch, as Ranked, the
    most wanted first"""
    moves: bool = False
    """Whether scores change with time and not with visits alone: then some blocks are scored anew at each step."""
    prefers: bool = True
    """False = no prompt is worth more than another, and reports show no priority."""
    starts_anew: bool = False
    """Whether changed data makes P and W worthless."""
    priority: Callable[..., Any] | None = None
    """(P, W, Look) -> float32 [m], what reports show; None = the score"""
