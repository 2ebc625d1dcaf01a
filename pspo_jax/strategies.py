"""Configuration of the strategies: which prompt next, what a reward is worth, how beliefs are forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.fields import Range

AlgorithmName = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "opo",
    "ers",
    "pps",
    "pspo",
    "prioritized_replay",
    "mopps",
    "posterior_mixed",
    "spo",
    "greso",
    "difficulty_pools",
    "curriculum",
]
SelectorName = Literal[
    "uniform",
    "pps",
    "prioritized_replay",
    "mopps",
    "posterior_mixed",
    "spo",
    "greso",
    "difficulty_pools",
    "curriculum",
]
CreditName = Literal["group", "ers", "rloo", "tracked_baseline", "opo"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class AlgorithmConfig:
    name: AlgorithmName = "pspo"
    """Which composition of selector, credit and loss settings fills the fields left at None."""
    compat: Literal["none", "released"] = "none"
    """released: loss weights and ERS statistics as in PSPO's published code, defects included, for parity studies; see
    docs/algorithms.md. Needs credit.name ers."""


@dataclass(frozen=True)
class SelectionConfig:
    name: SelectorName | None = None
    """Selector; None = the algorithm's."""
    cooldown: Annotated[int | None, Range(0, 10_000)] = None
    """Steps for which a prompt that was drawn is not drawn again; None = 5 for prioritized_replay and
    posterior_mixed, else 0."""
    max_visits: Annotated[int, Range(0, 2**30)] = 0
    """Most times that a prompt is drawn; 0 = no limit. Once fewer are left than a batch needs, the oldest return."""
    max_unjudged: Annotated[int, Range(0, 127)] = 3
    """A prompt that never had a verdict in so many visits is left out from then on; 0 = never left out."""
    exploration: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share of a batch that is drawn uniformly, whatever the selector prefers."""
    quotas: str = ""
    """Shares of a batch by task of a mixture, such as "math=0.5, gsm8k=0.3"; tasks without one share the rest. "" = no
    quotas."""
    success_threshold: Annotated[float | None, Range()] = None
    """A completion counts as right from this reward on; None = its reward, within [0, 1], is its success."""
    exponent: Annotated[float, Range(0.0)] = 0.6
    """PPS: lambda, P(q) ~ priority^lambda; 0 = uniform draws."""
    exponent_end: Annotated[float | None, Range(0.0)] = None
    """PPS: lambda at the last step, reached linearly; None = constant."""
    correction: Annotated[float | None, Range(0.0)] = None
    """Selectors that draw in proportion to weights: beta, the loss weight is (1/(N P(q)))^beta over the batch's
    maximum; 0 = no correction; None = 0.4 for pps, else 0."""
    correction_end: Annotated[float | None, Range(0.0)] = None
    """beta at the last step, reached linearly; None = constant."""
    replacement: bool = False
    """Draw in proportion to weights with replacement, so that a prompt can be in a batch more than once."""
    floor: Annotated[float | None, Range(above=0.0)] = None
    """Added to the priority, so that every prompt keeps a chance; None = 0.1 for pps, 0.05 for spo. The PSPO paper's
    1e-6 hardly ever returns to a prompt whose group was all right or all wrong once, and scored lower on most seeds
    tried (docs/results.md)."""
    initial: Annotated[float, Range(above=0.0)] = 1.0
    """PPS: priority of a prompt that has not been visited."""
    statistic: Literal["last", "mean", "max"] = "last"
    """PPS: |A| of the group's last completion, or the mean or maximum of |A| over the group."""
    signal: Literal["raw", "smoothed"] = "raw"
    """PPS: the advantage within the group (raw), or the credit's own, for example ERS's (smoothed)."""
    estimate: Literal["beta", "last"] = "beta"
    """prioritized_replay: success probability by a discounted Beta belief, or the last group's mean."""
    retest_every: Annotated[int, Range(1, 2**20)] = 10
    """prioritized_replay: steps between retests of solved and unsolved prompts, and a prompt's first wait."""
    retest_share: Annotated[float, Range(0.0, 0.5)] = 0.05
    """prioritized_replay: share of the batch retested from each of the two pools, at least one prompt; 0 = none."""
    draw: Literal["expected", "thompson"] = "expected"
    """posterior_mixed: rank all prompts by the belief's expectation, or a pool of candidates by a draw from it."""
    candidates: Annotated[int, Range(1, 1024)] = 8
    """mopps, posterior_mixed with thompson: size of the pool of candidates, in batches."""
    greso_base: Annotated[float, Range(0.0, 1.0)] = 0.5
    """greso: a prompt with z zero-variance groups in a row is kept with probability max(base^z, greso_floor)."""
    greso_floor: Annotated[float, Range(0.001, 1.0)] = 0.01
    """greso: least probability of being kept."""
    pool_weights: str = "0.2,1,0.2"
    """difficulty_pools: weights of easy, normal and hard prompts."""
    easy_from: Annotated[float, Range(0.0, 1.0)] = 1.0
    """difficulty_pools: a prompt is easy if its last group's mean success is at least this."""
    hard_to: Annotated[float, Range(0.0, 1.0)] = 0.0
    """difficulty_pools: and hard if it is at most this."""
    difficulty_column: str | None = None
    """curriculum: column with each prompt's difficulty, a number or text with one; None = difficulty, or level. Tasks
    that make their prompts have one of their own."""
    curriculum_start: Annotated[float, Range(above=0.0, high=1.0)] = 0.2
    """curriculum: share of the prompts, easiest first, that the first steps draw from."""
    curriculum_steps: Annotated[int, Range(0, 2**30)] = 0
    """curriculum: step from which all prompts are drawn; the share grows linearly. 0 = half of run.steps."""


@dataclass(frozen=True)
class CreditConfig:
    name: CreditName | None = None
    """Advantage estimator; None = the algorithm's."""
    scale: Scale | None = None
    """group, rloo, opo: divide by the standard deviation of the group, of the batch, or not; tracked_baseline: batch
    divides by the advantages' root mean square, group is refused. None = the algorithm's."""
    ddof: Annotated[int, Range(0, 1)] = 1
    """Variances divide by n - ddof."""
    eps: Annotated[float, Range(above=0.0)] = 1e-4
    """Added to the standard deviation."""
    alpha: Annotated[float, Range(above=0.0, high=1.0)] = 0.99
    """ERS: weight of the current group. .99, the paper's, is close to no smoothing; .1 to .5 is where it acts."""
    alpha_mode: Literal["fixed", "count", "movement"] = "fixed"
    """ERS: alpha itself; 1/n at a prompt's n-th visit (a plain average); or 1 - rho with the rho of forgetting.mode
    movement, so that history counts for less the further the policy has moved since."""
    stat_mode: Literal["variance", "linear_std", "released_head"] = "variance"
    """ERS: smooth the variance (paper), the standard deviation, or as the published code's last commit does."""


@dataclass(frozen=True)
class ForgettingConfig:
    """How beliefs about prompts age; shared by all selectors and credits that keep a Beta belief."""

    mode: Literal["fixed", "movement"] | None = None
    """fixed: a visit leaves `discount` of the past; movement: clip(2^(-D / half_life), low, high) of it, D the mean
    |change of log-prob| of the policy since the last visit. None = movement for spo, else fixed."""
    discount: Annotated[float, Range(0.0, 1.0)] = 0.9
    """fixed: weight of the past; 1 = nothing is forgotten, 0 = only the last group counts."""
    half_life: Annotated[float, Range(above=0.0)] = 0.06
    """movement: D at which half of the past is left."""
    low: Annotated[float, Range(0.0, 1.0)] = 0.875
    """movement: least weight of the past."""
    high: Annotated[float, Range(0.0, 1.0)] = 0.96
    """movement: largest weight of the past."""
    drift: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share by which the belief of a prompt that is not visited approaches the population each step; 0 = it freezes."""
    prior_successes: Annotated[float, Range(above=0.0)] = 1.0
    """a of the Beta belief of a prompt that was never visited."""
    prior_failures: Annotated[float, Range(above=0.0)] = 1.0
    """b of the same."""
