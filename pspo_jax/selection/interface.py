"""The contracts: `Selector`, which a training step calls, and `Scorer`, which a new selection method writes.

Letters: N prompts in the data, R >= N rows of a per-prompt array (the last R - N are padding), B prompts of one round,
G completions of a prompt, m any number of prompts, k prompts to choose.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.arrays.state import RolloutOutcome

Step = Int[Array, ""] | int
"""The number of a training step, from 0."""
NoState = tuple[()]
"""Shared state of a scorer that has none."""
BatchMetrics = dict[str, Array]
"""Scalars by their key."""
DataSummary = dict[str, Array | dict[str, Array]]
"""Scalars by their key, and histograms as {"counts": [bins], "edges": [bins + 1]}."""


class PromptMetadata(NamedTuple):
    """Facts about the prompts that are known before the first step."""

    task_ids: Int[Array | np.ndarray, "N"]
    """Index of each prompt's task in `SelectorContext.task_names`."""
    difficulty: Float[Array | np.ndarray, "N"] | None = None
    """Difficulty of each prompt, larger = harder, in units of the data; NaN = unknown, which counts as hardest. None =
    the selector does not ask for it."""
    bins: Int[Array | np.ndarray, "N"] | None = None
    """Number of each prompt's bin, from 0; None = selection.bins is none."""
    features: Float[Array | np.ndarray, "N F"] | jax.ShapeDtypeStruct | None = None
    """Features of each prompt, each with mean 0 and variance 1 over the data; None = selection.predictor is none. A run
    that has no weights yet knows their shape alone."""


class SelectorContext(NamedTuple):
    """Settings of the run that a selector reads."""

    batch: int
    """Prompts of one round, B."""
    group_size: int
    """Completions of one prompt, G."""
    steps: int
    """Training steps of the whole run, for values that are annealed."""
    seed: int
    """Seed of the run, for pseudo-random orders."""
    task_names: tuple[str, ...] = ()
    """Names of the run's tasks; `PromptMetadata.task_ids` points into them."""
    rounds: int = 1
    """Largest number of rounds in one step; more than 1 with dynamic sampling."""


class SelectorInitFn(Protocol):
    """Creates the state before the first step."""

    def __call__(self, num_prompts: int, metadata: PromptMetadata | None = None) -> PyTree:
        """The state of a selector that has seen nothing.

        Raises:
          ConfigError: the config asks for something that these prompts do not have.
        """
        ...


class SelectFn(Protocol):
    """Chooses the prompts of a round."""

    def __call__(
        self,
        state: PyTree,
        key: Key[Array, ""],
        step: Step,
        batch: int,
        pending: Int[Array, "m"] | None = None,
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], PyTree]:
        """Ids int32 [batch], loss weights float32 [batch] in (0, 1], and the new state.

        `batch` is static. Ids are distinct unless the config says `selection.replacement`. The largest weight is 1.

        Args:
          pending: prompts that were drawn and have not been observed, -1 = none; they are drawn again only where there
            are no others. None = there are none, as in every run without `rollout.carry`.
        """
        ...


class ObserveFn(Protocol):
    """Learns from the completions of a round."""

    def __call__(self, state: PyTree, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step) -> PyTree:
        """The state after a round.

        A step has one round; with dynamic sampling it has up to `SelectorContext.rounds`, or none. Time is counted in
        steps, and steps without a round count too.
        """
        ...


class FollowFn(Protocol):
    """Carries a state over to changed data."""

    def __call__(self, state: PyTree, fresh: PyTree, places: Int[Array, "N"], /) -> PyTree:
        """The state for the new data.

        Args:
          state: the state for the old data.
          fresh: the result of `init` for the new data.
          places: old row of each new prompt; -1 = the prompt is new.
        """
        ...


class BatchMetricsFn(Protocol):
    """Describes a batch before it is observed."""

    def __call__(self, state: PyTree, ids: Int[Array, "B"], step: Step, /) -> BatchMetrics:
        """Scalars float32; the cost grows with the batch and not with the data."""
        ...


class OutcomeMetricsFn(Protocol):
    """Describes the results of a round before they are observed."""

    def __call__(self, state: PyTree, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step, /) -> BatchMetrics:
        """Scalars float32, of a state that has not seen the results; NaN = there is no value."""
        ...


class SummaryFn(Protocol):
    """Describes all prompts."""

    def __call__(self, state: PyTree, step: Step, /) -> DataSummary:
        """Scalars and histograms, at the cost of one pass over all prompts."""
        ...


class TableFn(Protocol):
    """Lists all prompts."""

    def __call__(self, state: PyTree, step: Step, /) -> dict[str, Array]:
        """Arrays [R] named visits, last_step, success and priority (NaN = no priority)."""
        ...


def _no_metrics(state: PyTree, ids: Int[Array, "B"], step: Step) -> BatchMetrics:
    return {}


def _no_outcome_metrics(state: PyTree, ids: Int[Array, "B"], outcome: RolloutOutcome, step: Step) -> BatchMetrics:
    return {}


def _no_summary(state: PyTree, step: Step) -> DataSummary:
    return {}


def _no_table(state: PyTree, step: Step) -> dict[str, Array]:
    return {}


class Selector(NamedTuple):
    """Which prompts are rolled out next: pure functions over a state, any pytree of arrays.

    `selection.make` builds one from a `Scorer`. A method that no `Scorer` can express may fill these slots itself.
    """

    init: SelectorInitFn
    select: SelectFn
    observe: ObserveFn
    follow: FollowFn = follow_rows
    batch_metrics: BatchMetricsFn = _no_metrics
    outcome_metrics: OutcomeMetricsFn = _no_outcome_metrics
    summary: SummaryFn = _no_summary
    to_table: TableFn = _no_table


class PromptStats(NamedTuple):
    """Visits of m prompts, as a scorer sees them."""

    rows: Int[Array, "m"]
    """Row of each prompt in per-prompt arrays."""
    last_step: Int[Array, "m"]
    """Step of each prompt's last visit; -1 = never visited."""
    visits: Int[Array, "m"]
    """Groups that were rolled out for each prompt."""
    now: Step
    """Step in which the prompts would be drawn; in `learn`, the step in which they were rolled out."""


class VisitUpdate(NamedTuple):
    """Results of one round. If a prompt is twice in the batch, its counts are sums over all its groups."""

    stats: PromptStats
    """Visits before this round."""
    has_verdict: Bool[Array, "B"]
    """Whether any completion of the prompt has a verdict. Without one, nothing was learned about the prompt."""
    successes: Float[Array, "B"]
    """Sum of success, each in [0, 1], over the completions with a verdict."""
    failures: Float[Array, "B"]
    """Number of completions with a verdict, minus `successes`."""
    success: Float[Array, "B"]
    """Mean success of the completions with a verdict, in [0, 1]; 0 without a verdict."""
    mixed: Bool[Array, "B"]
    """Whether the rewards in the group differ."""
    outcome: RolloutOutcome
    """Rewards, advantages, lengths and policy drift of the round."""
    is_last_entry: Bool[Array, "B"]
    """False if a later entry of the batch is the same prompt. The arrays keep the last entry's values; sums over the
    batch that count prompts leave the other entries out."""


class Ranked(NamedTuple):
    """The best k prompts of one pool, by ascending row."""

    rows: Int[Array, "k"]
    key: Float[Array, "k"]
    """Score of each prompt; -inf = the pool has fewer than k prompts, and the row means nothing."""
    tie: Float[Array, "k"]
    """Decides among equal keys; larger = earlier."""


class InitFn(Protocol):
    """Creates a scorer's state."""

    def __call__(self, num_prompts: int, rows: int, metadata: PromptMetadata | None, /) -> tuple[PyTree, PyTree]:
        """The per-prompt state, a pytree of arrays [rows, ...], and the shared state, a pytree of any arrays.

        Args:
          num_prompts: N; rows from N on are padding, and their values are never used.
          rows: R, the first dimension of every per-prompt array.
          metadata: tasks and difficulties, where the config asks for them.
        """
        ...


class LearnFn(Protocol):
    """Updates a scorer's state after a round."""

    def __call__(self, per_prompt: PyTree, shared: PyTree, update: VisitUpdate, /) -> tuple[PyTree, PyTree]:
        """The new state of the B prompts of the round, and the new shared state.

        Args:
          per_prompt: arrays [B, ...], the state of the round's prompts.
          shared: the shared state.
          update: results of the round.
        """
        ...


class ScoreFn(Protocol):
    """Scores m prompts; also the type of `priority`."""

    def __call__(self, per_prompt: PyTree, shared: PyTree, stats: PromptStats, /) -> Float[Array, "m"]:
        """float32 [m]: in mode "top" larger = earlier, in mode "draw" the weight of a draw."""
        ...


class CandidateScoreFn(Protocol):
    """Scores candidates in mode "candidates", with random numbers."""

    def __call__(
        self, key: Key[Array, ""], per_prompt: PyTree, shared: PyTree, stats: PromptStats, /
    ) -> Float[Array, "m"]:
        """float32 [m]; the largest are taken."""
        ...


class TieBreakFn(Protocol):
    """Orders prompts of equal scores."""

    def __call__(self, per_prompt: PyTree, stats: PromptStats, /) -> Float[Array, "m"]:
        """float32 [m], finite and positive; larger = earlier."""
        ...


class ScorerMetricsFn(Protocol):
    """Describes the results of a round before a scorer learns from them."""

    def __call__(self, per_prompt: PyTree, shared: PyTree, update: VisitUpdate, /) -> BatchMetrics:
        """Scalars float32 by the keys of metrics.jsonl; NaN = there is no value.

        Args:
          per_prompt: arrays [B, ...], the state of the round's prompts before the round.
          shared: the shared state before the round.
          update: results of the round.
        """
        ...


class ScorerFollowFn(Protocol):
    """Carries a scorer's state over to changed data."""

    def __call__(
        self, old: tuple[PyTree, PyTree], fresh: tuple[PyTree, PyTree], places: Int[Array, "N"], /
    ) -> tuple[PyTree, PyTree]:
        """The per-prompt and the shared state for the new data.

        Args:
          old: the per-prompt and the shared state for the old data.
          fresh: the result of `InitFn` for the new data.
          places: old row of each new prompt; -1 = the prompt is new.
        """
        ...


class PoolFn(Protocol):
    """Assigns prompts to pools."""

    def __call__(self, per_prompt: PyTree, stats: PromptStats, /) -> Int[Array, "m"]:
        """int32 [m]: index of each prompt's pool in `Scorer.pools`."""
        ...


class MergePoolsFn(Protocol):
    """Chooses a batch from the best of several pools."""

    def __call__(self, pools: list[Ranked], step: Step, k: int, last_rollout_step: Step, /) -> Ranked:
        """k prompts, the most wanted first.

        Args:
          pools: the best k prompts of each pool, in the order of `Scorer.pools`.
          step: the step in which they would be drawn.
          k: static.
          last_rollout_step: the last step with a round; -1 = none.
        """
        ...


def one_pool(per_prompt: PyTree, stats: PromptStats) -> Int[Array, "m"]:
    """All prompts are in pool 0."""
    return jnp.zeros_like(stats.rows)


class Scorer(NamedTuple):
    """What distinguishes one selection method from another: a state and a score for each prompt.

    The state has two parts: `per_prompt`, a pytree of arrays with one row for each prompt, and `shared`, a pytree of
    arrays of any shape, such as totals. `selection.make` adds what all selectors have in common: visits, eligibility,
    cooldown, quotas, exploration, and a draw that does not pass over all prompts.
    """

    mode: Literal["top", "draw", "candidates"]
    """How scores become a batch. "top" takes the largest scores; "draw" draws in proportion to scores, which are
    weights; "candidates" draws a pool of eligible prompts uniformly and takes the largest `candidate_score`."""
    init: InitFn
    learn: LearnFn
    score: ScoreFn
    tie_break: TieBreakFn | None = None
    """Order of prompts with equal scores in mode "top"; None = the oldest visit comes first."""
    candidate_score: CandidateScoreFn | None = None
    """Score of the candidates; mode "candidates" needs it, and the other modes do not read it."""
    pools: tuple[str, ...] = ("all",)
    """Names of the pools that prompts move between, for `merge_pools` and for metrics."""
    pool_ids: PoolFn = one_pool
    merge_pools: MergePoolsFn | None = None
    """Choice among several pools in mode "top"; a scorer with more than one pool needs it there."""
    time_dependent: bool = False
    """Whether a score changes with the step and not with visits alone. If True, some blocks of prompts are scored anew
    at each step."""
    has_priority: bool = True
    """Whether some prompts are worth more than others. If False, reports show no priority."""
    resets_on_new_data: bool = False
    """Whether the state is created anew, and not carried over, when the data changes."""
    follow: ScorerFollowFn | None = None
    """How the state is carried over when the data changes; None = per-prompt arrays follow their prompts, and the
    shared state stays as it is."""
    metrics: ScorerMetricsFn | None = None
    """Metrics of a round beside those that all selectors have; None = there are none."""
    priority: ScoreFn | None = None
    """Value of each prompt that reports show; None = `score`."""
