"""Configuration of the strategies: which prompt next, what a reward is worth, which groups come back, which loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.config.fields import Range

AlgorithmName = str
"""A key of `presets.PRESETS`."""
SelectorName = str
SELECTORS = (
    "uniform",
    "pps",
    "prioritized_replay",
    "mopps",
    "posterior_mixed",
    "spo",
    "greso",
    "difficulty_pools",
    "curriculum",
)
"""Names of the selectors that `selection.SCORERS` holds."""
EstimatorName = str
ESTIMATORS = ("group", "ers", "rloo", "tracked_baseline", "opo")
"""Names of the advantage estimators that `advantages.CREDITS` holds."""
ReplayName = str
REPLAYS = ("none", "filter", "popo")
"""Names of what `replay.REPLAYS` holds."""
LossName = str
"""A key of `presets.LOSSES`."""
Scale = Literal["group", "batch", "none"]
Surrogate = Literal["clip", "cispo", "sapo", "vespo", "reinforce"]
Ratio = Literal["token", "sequence", "sequence_token"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "token_sum"]


@dataclass(frozen=True)
class AlgorithmConfig:
    name: AlgorithmName = "pspo"
    """Which composition of selector, advantage and loss settings fills the fields left at None."""
    variant: Literal["paper", "published_code"] = "paper"
    """published_code: loss weights and ERS statistics as in PSPO's published code, defects included, for parity
    studies; see docs/algorithms.md. Needs advantage.name ers."""


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
    """Shares of the prompts by task of a mixture, such as "math=0.5, gsm8k=0.3"; tasks without one share the rest. What
    does not come out even in one batch does over batches. "" = no quotas."""
    success: Literal["verdict", "reward"] = "verdict"
    """What counts as a completion's success, for beliefs, pools and reports: its verdict (accuracy), or its reward,
    shaping included, within [0, 1]."""
    success_threshold: Annotated[float | None, Range()] = None
    """Value of the verdict or reward from which on a completion is a success; None = the value itself is
    its degree of success."""
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
class AdvantageConfig:
    name: EstimatorName | None = None
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
    alpha_mode: Literal["fixed", "count", "policy_drift"] = "fixed"
    """ERS: alpha itself; 1/n at a prompt's n-th visit (a plain average); or 1 - rho with the rho of forgetting.mode
    movement, so that history counts for less the further the policy has moved since."""
    stat_mode: Literal["variance", "linear_std", "released_head"] = "variance"
    """ERS: smooth the variance (paper), the standard deviation, or as the published code's last commit does."""


@dataclass(frozen=True)
class ForgettingConfig:
    """How beliefs about prompts age; shared by all selectors and credits that keep a Beta belief."""

    mode: Literal["fixed", "policy_drift"] | None = None
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
    shrinkage: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share by which the belief of a prompt that is not visited approaches the population each step; 0 = it freezes."""
    prior_successes: Annotated[float, Range(above=0.0)] = 1.0
    """a of the Beta belief of a prompt that was never visited."""
    prior_failures: Annotated[float, Range(above=0.0)] = 1.0
    """b of the same."""


@dataclass(frozen=True)
class ReplayConfig:
    """What becomes of groups whose rewards are all equal, and which old groups come back."""

    name: ReplayName | None = None
    """none: they stay; filter: they leave the batch, and means are over the others; popo: they are replaced by stored
    groups (POPO), and slots that stay empty leave. None = the algorithm's."""
    capacity: Annotated[int, Range(0, 2**24)] = 0
    """popo: groups stored; the oldest leaves first. 0 = rollout.prompts."""
    max_age: Annotated[int, Range(1, 2**24)] = 3
    """popo: a group is not used more than so many steps after it was sampled."""
    min_age: Annotated[int, Range(1, 2**24)] = 1
    """popo: nor before so many steps after it, for ablations."""
    max_uses: Annotated[int, Range(1, 2**24)] = 2
    """popo: most times that a stored group comes back."""
    max_share: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """popo: largest share of a batch that is replayed."""
    order: Literal["newest", "variance", "fresh_priority", "kl", "random"] = "newest"
    """popo: which stored groups first: newest (POPO), largest reward variance, variance x exp(-age / tau), least
    measured KL(behaviour || policy), or any."""
    tau: Annotated[float, Range(above=0.0)] = 2.0
    """fresh_priority: steps in which a group's priority falls to 1/e."""
    effective: Literal["rewards", "advantages"] = "rewards"
    """What makes a group effective: rewards that differ, or an advantage that is not 0 (ERS has some in groups whose
    rewards are all equal)."""
    ess_floor: Annotated[float, Range(0.0, 1.0)] = 0.0
    """popo: where the effective sample size of the replayed tokens, as a share of them, falls under this, the replayed
    share is halved; it grows by a quarter a step otherwise, up to max_share. 0 = off."""
    memory: Literal["device", "pinned_host"] = "device"
    """Where stored groups are between updates; pinned_host frees device memory for rollouts, at a transfer each way."""


@dataclass(frozen=True)
class LossConfig:
    name: LossName | None = None
    """Published loss: fills surrogate, ratio, aggregation and the clip range where they are None; docs/objectives.md
    has the table. None = the algorithm's."""
    surrogate: Surrogate | None = None
    """What of ratio and advantage is maximised: PPO's clip, CISPO's truncated weight, SAPO's gate, VESPO's gamma
    weight, or the log-prob alone. None = the loss's."""
    ratio: Ratio | None = None
    """Probability ratio of a token, of the sequence (its geometric mean), or the sequence's with the token's gradient
    (GSPO-token). None = the loss's."""
    aggregation: Aggregation | None = None
    """How token losses become one number. grpo: mean over completions of their token means; dapo: sum over tokens of
    the minibatch / the batch's tokens per minibatch; bnpo: / the minibatch's own; dr_grpo: / (completions x
    rollout.max_new_tokens); luspo: mean over completions of their sums; token_sum: sum. None = the loss's."""
    count_masked: bool = True
    """Completions without a token in the loss count in means over completions (TRL); false = they do not (verl)."""
    clip_low: Annotated[float | None, Range(0.0, 1.0)] = None
    """The ratio is clipped from below at 1 - clip_low. None = 0.2, gspo 3e-4."""
    clip_high: Annotated[float | None, Range(0.0)] = None
    """The ratio is clipped from above at 1 + clip_high. None = 0.28, gspo 4e-4, cispo 4."""
    delta: Annotated[float, Range(0.0)] = 0.0
    """Two-sided clipping: the unclipped ratio is at most this; 0 = off."""
    dual_clip: Annotated[float, Range(0.0)] = 0.0
    """Dual clip: where the advantage is negative, the loss is at most this times its magnitude; 0 = off."""
    sapo_positive: Annotated[float, Range(above=0.0)] = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_negative: Annotated[float, Range(above=0.0)] = 1.05
    """sapo: and where it is not."""
    vespo_positive: str = "2,3"
    """vespo: k and lambda of the gamma weight where the advantage is not negative."""
    vespo_negative: str = "3,2"
    """vespo: and where it is."""
    top_entropy: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """Share of the minibatch's tokens, those of largest entropy, that the surrogate is taken from; below 1, one more
    forward pass an update."""
    entropy_coef: Annotated[float, Range(0.0)] = 0.0
    """Weight of the mean token entropy, which is maximised."""
    mask_truncated: bool = False
    """Leave completions that the length limit ended out of the loss."""
    off_policy_threshold: Annotated[float, Range(0.0)] = 0.0
    """Leave out completions of negative advantage whose mean log-ratio behaviour / policy is above this; 0 = off."""
    kl_coef: Annotated[float, Range(0.0)] = 0.0
    """Weight of KL(policy || reference), the reference being the policy that RL begins from, after the cold start; 0 =
    no reference policy is held or run."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term per token; reward: the sum over all tokens drawn is taken from a completion's reward before the
    credit."""
    kl_estimator: Literal["k1", "k2", "k3", "k1+", "k3+"] = "k3"
    """log-ratio (k1), half its square (k2), or ratio - 1 - log-ratio (k3); + gives the gradient of k2, the KL's own."""
    kl_unbiased: bool = True
    """Multiply the KL term by the ratio of the policy to the one that drew the token, as TRL does by default: its
    gradient is then unbiased off-policy, except where importance_cap cuts the ratio of an older policy."""
    off_policy: Literal["decoupled", "coupled", "ignored"] = "decoupled"
    """Groups of an older policy: decoupled clips around the policy at the start of the step and weighs by its ratio to
    the behaviour policy; coupled clips around the behaviour policy; ignored treats them as on-policy (ablations)."""
    importance: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """decoupled: weights per token or per completion; above the cap they are cut to it, or become 0."""
    importance_cap: Annotated[float, Range(above=0.0)] = 2.0
    """decoupled: the cap."""
    num_iterations: Annotated[int, Range(1)] = 1
    """Passes over a batch of rollouts."""
    minibatches: Annotated[int, Range(1)] = 1
    """Optimizer updates a pass; whole prompts are dealt to minibatches in order."""
    microbatch_rows: Annotated[int, Range(0)] = 32
    """At most this many completions have their gradient computed at a time, accumulated over a minibatch; the largest
    divisor of the minibatch that the mesh divides is used. 0 = a whole minibatch. With packed rows it counts bins;
    where all rows are allowed at a time, the bins at a time are an eighth of them, and at least 8."""
    packing: bool | None = None
    """Pack whole completions into bins of the longest one's length, and compute no padding. None = where there are
    several microbatches and rollout.max_new_tokens is 256 or more, and for text on a CPU always. The loss is the same
    but for rounding."""
    share_prompts: bool | None = None
    """Packed completions of one prompt share it in a bin. None = where attention over packed rows is XLA's; true makes
    it XLA's."""
    old_log_probs: Literal["sampler", "trainer"] = "sampler"
    """Log-probs of the policy before the update: those the sampler returned, or recomputed by the trainer. Those of
    groups from earlier steps are always recomputed."""
    logits_mib: Annotated[int, Range(1)] = 160
    """Memory for one chunk of float32 logits, in MiB; [tokens, vocab] never exists whole."""
