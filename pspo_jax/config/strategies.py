"""Configuration of the strategies: selector, advantage estimator, forgetting, replay and loss."""

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
ESTIMATORS = ("group", "ers", "rloo", "tracked_baseline", "opo", "maxrl")
"""Names of the advantage estimators that `advantages.ESTIMATORS` holds."""
ReplayName = str
REPLAYS = ("none", "filter", "popo", "aper")
"""Names of the replays that `replay.REPLAYS` holds."""
STORING = ("popo", "aper")
"""Names of the replays that store completions for later steps."""
LossName = str
"""A key of `presets.LOSSES`."""
Scale = Literal["group", "batch", "none"]
SurrogateName = str
SURROGATES = ("clip", "cispo", "sapo", "vespo", "reinforce")
"""Names of the surrogates that `losses.ratios.SURROGATES` holds."""
Ratio = Literal["token", "sequence", "sequence_token"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "token_sum"]


@dataclass(frozen=True)
class AlgorithmConfig:
    """The preset that fills the strategies' fields."""

    name: AlgorithmName = "pspo"
    """Algorithm: a preset of selector, advantage estimator, replay and loss, which fills the fields of those stages
    that are None."""
    variant: Literal["paper", "published_code"] = "paper"
    """ERS: loss weights and statistics as in the paper, or as in PSPO's published code with its defects, for parity
    studies (docs/algorithms.md). Needs advantage.name=ers."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which prompts a step takes. Only the selectors that a field's text names first read that field."""

    name: SelectorName | None = None
    """Selector, which chooses the prompts of a step, or module:function for one of your own; None = the algorithm's."""
    cooldown: Annotated[int | None, Range(0, 10_000)] = None
    """Number of steps before a prompt is drawn again; None = 5 for prioritized_replay and posterior_mixed, else 0."""
    max_visits: Annotated[int, Range(0, 2**30)] = 0
    """Largest number of times that a prompt is drawn; 0 = no limit. When fewer prompts are left than a batch needs,
    those drawn longest ago return."""
    max_unjudged: Annotated[int, Range(0, 127)] = 3
    """Number of visits without any verdict after which a prompt is left out; 0 = never."""
    exploration: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share of a batch that is drawn uniformly, independent of the selector's preference."""
    quotas: str = ""
    """Shares of the prompts for the tasks of a mixture, such as "math=0.5, gsm8k=0.3". Tasks that are not named divide
    the rest. Fractions of a prompt even out over batches. "" = no quotas."""
    success: Literal["verdict", "reward"] = "verdict"
    """Measure of a completion's success in beliefs, pools and reports: its verdict (accuracy), or its total reward
    clipped to [0, 1]."""
    success_threshold: Annotated[float | None, Range()] = None
    """Smallest verdict or reward that counts as a success; None = the value itself is the degree of success."""
    exponent: Annotated[float, Range(0.0)] = 0.6
    """pps: exponent lambda in P(q) ~ priority^lambda; 0 = uniform draws."""
    exponent_end: Annotated[float | None, Range(0.0)] = None
    """pps: lambda at the last step, reached linearly; None = constant."""
    correction: Annotated[float | None, Range(0.0)] = None
    """pps, spo, difficulty_pools, curriculum: exponent beta of the loss weight (1/(N P(q)))^beta, which is divided by
    the batch's maximum; 0 = no correction; None = 0.4 for pps, else 0."""
    correction_end: Annotated[float | None, Range(0.0)] = None
    """The same selectors: beta at the last step, reached linearly; None = constant."""
    replacement: bool = False
    """The same selectors: whether to draw with replacement, so that one batch may hold a prompt more than once."""
    floor: Annotated[float | None, Range(above=0.0)] = None
    """pps, spo: constant added to every priority, so that every prompt keeps a chance; None = 0.1 for pps, 0.05 for
    spo. The PSPO paper's 1e-6 hardly ever returns to a prompt whose group was once all correct or all wrong, and scored
    lower on most seeds tried (docs/results.md)."""
    initial: Annotated[float, Range(above=0.0)] = 1.0
    """pps: priority of a prompt before its first visit."""
    statistic: Literal["last", "mean", "max"] = "last"
    """pps: priority of a group: |advantage| of its last completion, or the mean or maximum of |advantage| over the
    group."""
    signal: Literal["raw", "smoothed"] = "raw"
    """pps: advantage that the priority takes: normalised within the group (raw), or the result of the advantage
    estimator, such as ERS (smoothed)."""
    bins: Literal["none", "task", "difficulty", "auto"] | None = None
    """prioritized_replay, mopps, posterior_mixed: bins of prompts that share what is believed of their success: the
    tasks of a mixture or kinds of text_suite (task); or one for each difficulty, at most 64 with about equally many
    prompts (difficulty). auto = difficulty if the data has one, else task, which is one bin for all prompts if there is
    one task. The prior of a prompt then has its bin's mean, and forgetting.shrinkage leads to it. None = none."""
    predictor: Literal["none", "hidden_states"] | None = None
    """prioritized_replay, mopps, posterior_mixed: source of a prediction of each prompt's success, which is then the
    mean of its prior: a linear regression of the groups seen so far on the hidden states that the policy from which RL
    begins has on the prompt (hidden_states). Cannot be used with bins. None = hidden_states for learnability_replay,
    else none."""
    estimate: Literal["beta", "last"] = "beta"
    """prioritized_replay: estimate of a prompt's success probability: a discounted Beta belief, or the mean of its last
    group."""
    retest_every: Annotated[int, Range(1, 2**20)] = 10
    """prioritized_replay: number of steps between retests of solved and unsolved prompts, and before the first retest
    of a prompt."""
    retest_share: Annotated[float, Range(0.0, 0.5)] = 0.05
    """prioritized_replay: share of the batch retested from each of the two pools, at least one prompt; 0 = none."""
    draw: Literal["expected", "thompson"] = "expected"
    """posterior_mixed: order of the prompts: all of them by the belief's expectation (expected), or a pool of
    candidates by one sample from each belief (thompson)."""
    candidates: Annotated[int, Range(1, 1024)] = 8
    """mopps, and posterior_mixed with draw=thompson: size of the pool of candidates, as a multiple of the batch."""
    greso_base: Annotated[float, Range(0.0, 1.0)] = 0.5
    """greso: probability base: a prompt with z consecutive groups without variance is kept with probability max(base^z,
    greso_floor)."""
    greso_floor: Annotated[float, Range(0.001, 1.0)] = 0.01
    """greso: smallest probability with which a prompt is kept."""
    pool_weights: str = "0.2,1,0.2"
    """difficulty_pools: weights of easy, normal and hard prompts."""
    easy_from: Annotated[float, Range(0.0, 1.0)] = 1.0
    """difficulty_pools: smallest mean success of the last group at which a prompt counts as easy."""
    hard_to: Annotated[float, Range(0.0, 1.0)] = 0.0
    """difficulty_pools: largest mean success of the last group at which a prompt counts as hard."""
    difficulty_column: str | None = None
    """curriculum, and bins=difficulty or auto: column with each prompt's difficulty, a number or a text with one; None
    = difficulty, or else level. Tasks that generate their prompts supply a difficulty."""
    curriculum_start: Annotated[float, Range(above=0.0, high=1.0)] = 0.2
    """curriculum: share of the prompts, easiest first, from which the first steps draw."""
    curriculum_steps: Annotated[int, Range(0, 2**30)] = 0
    """curriculum: step from which all prompts are drawn; the share grows linearly until then. 0 = half of run.steps."""


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    name: EstimatorName | None = None
    """Advantage estimator, which turns rewards into advantages, or module:function for one of your own; None = the
    algorithm's."""
    scale: Scale | None = None
    """Divisor of the advantages. group, rloo, opo: the standard deviation of the group, of the batch, or none;
    tracked_baseline: the root mean square over the batch, or none. None = the algorithm's."""
    ddof: Annotated[int, Range(0, 1)] = 1
    """Correction of the degrees of freedom: variances divide by n - ddof."""
    eps: Annotated[float, Range(above=0.0)] = 1e-4
    """Constant added to the standard deviation before the division."""
    alpha: Annotated[float, Range(above=0.0, high=1.0)] = 0.99
    """ers: weight of the current group in the smoothed statistics. The paper's 0.99 is close to no smoothing; values
    from 0.1 to 0.5 smooth noticeably."""
    alpha_mode: Literal["fixed", "count", "policy_drift"] = "fixed"
    """ers: source of that weight: alpha (fixed); 1/n at a prompt's n-th visit, a plain average (count); or 1 - rho
    (policy_drift), where rho is the share of the past that forgetting.mode=policy_drift leaves, so that history counts
    less the further the policy has drifted."""
    stat_mode: Literal["variance", "linear_std", "published_head"] = "variance"
    """ers: statistic that is smoothed: the variance (paper), the standard deviation (linear_std), or the mixture in the
    last commit of the published code (published_head)."""


@dataclass(frozen=True)
class ForgettingConfig:
    """How beliefs about prompts age, for every selector and advantage estimator that keeps a Beta belief."""

    mode: Literal["fixed", "policy_drift"] | None = None
    """Share of the past that a visit leaves: forgetting.discount (fixed), or clip(2^(-D / half_life), low, high)
    (policy_drift). D is the policy drift since the last visit: the mean |change of log-prob| per token, summed over the
    steps. None = policy_drift for spo, else fixed."""
    discount: Annotated[float, Range(0.0, 1.0)] = 0.9
    """fixed: weight of the past at a visit; 1 = nothing is forgotten, 0 = only the last group counts."""
    half_life: Annotated[float, Range(above=0.0)] = 0.06
    """policy_drift: drift D, in nats per token, at which half of the past is left."""
    low: Annotated[float, Range(0.0, 1.0)] = 0.875
    """policy_drift: smallest weight of the past."""
    high: Annotated[float, Range(0.0, 1.0)] = 0.96
    """policy_drift: largest weight of the past."""
    shrinkage: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share by which, in each step, the belief about a prompt that is not visited approaches a prior with the mean of
    all prompts, or of its bin with selection.bins, or the predicted one with selection.predictor, and the mean of a bin
    approaches that of the prior; 0 = the belief stays as it is."""
    prior_successes: Annotated[float, Range(above=0.0)] = 1.0
    """Parameter a of the Beta belief about a prompt before its first visit."""
    prior_failures: Annotated[float, Range(above=0.0)] = 1.0
    """Parameter b of the Beta belief about a prompt before its first visit."""
    prior_strength: Literal["fixed", "estimated"] | None = None
    """selection.bins: number of completions that weigh as much as a bin's mean in the belief about a prompt:
    prior_successes + prior_failures (fixed), or as many as the spread of success among the bin's groups implies, from
    0.5 to 64 (estimated). None = fixed."""
    shared_steps: Annotated[float, Range(above=0.0)] = 20.0
    """selection.predictor, and bins with prior_strength=estimated: number of steps in which the weight of a group in
    the regression or in its bin's counts falls to 1/e."""


@dataclass(frozen=True)
class ReplayConfig:
    """What happens to groups whose rewards are all equal, and which stored groups or completions are replayed."""

    name: ReplayName | None = None
    """Treatment of groups whose rewards are all equal: they stay (none); they leave the batch, and means are over the
    other groups (filter); or stored groups replace them, and slots that stay empty leave (popo). With aper they stay,
    and single stored completions join the batch. None = the algorithm's."""
    capacity: Annotated[int, Range(0, 2**24)] = 0
    """popo: number of groups stored; aper: number of completions stored. The oldest leaves first. 0 = rollout.prompts
    for popo, and as many completions as max_age steps sample for aper."""
    max_age: Annotated[int, Range(1, 2**24)] = 3
    """popo, aper: largest age of what is replayed, in steps since it was sampled."""
    min_age: Annotated[int, Range(1, 2**24)] = 1
    """popo, aper: smallest age of what is replayed, in steps, for ablations."""
    extra: Annotated[int, Range(0, 2**24)] = 0
    """aper: largest number of stored completions that join a batch. 0 = a quarter of rollout.group_size, rounded down
    but at least 1, times rollout.prompts."""
    max_uses: Annotated[int, Range(1, 2**24)] = 2
    """popo: largest number of times that a stored group is replayed."""
    max_share: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """popo: largest share of a batch that is replayed."""
    order: Literal["newest", "variance", "fresh_priority", "kl", "random"] = "newest"
    """popo: order in which stored groups return: newest first (as in POPO), largest reward variance first, largest
    variance x exp(-age / tau) first (fresh_priority), smallest measured KL(behaviour || policy) first (kl), or
    random."""
    tau: Annotated[float, Range(above=0.0)] = 2.0
    """popo with order=fresh_priority: number of steps in which a group's priority falls to 1/e."""
    effective: Literal["rewards", "advantages"] = "rewards"
    """Test that makes a group effective: its rewards differ, or one of its advantages is not 0. ERS gives advantages to
    some groups whose rewards are all equal."""
    ess_floor: Annotated[float, Range(0.0, 1.0)] = 0.0
    """popo: smallest effective sample size of the replayed tokens, as a share of their number. Below it the replayed
    share is halved; otherwise the share grows by a quarter in each step, up to max_share. 0 = off."""
    memory: Literal["device", "pinned_host"] = "device"
    """popo, aper: memory that holds what is stored between updates. pinned_host frees device memory for rollouts, at
    the cost of a transfer each way."""


@dataclass(frozen=True)
class LossConfig:
    """The loss, its KL term and the updates of a step."""

    name: LossName | None = None
    """Published loss, which fills surrogate, ratio, aggregation and the clip range where they are None (table in
    docs/losses.md); None = the algorithm's."""
    surrogate: SurrogateName | None = None
    """Function of ratio and advantage that is maximised: PPO's clip, CISPO's truncated weight, SAPO's gate, VESPO's
    gamma weight, or the log-prob alone (reinforce); or a function of your own, as module:function
    (docs/extending/loss.md). None = the loss's."""
    ratio: Ratio | None = None
    """Probability ratio: of each token, of the sequence as its geometric mean, or of the sequence with the gradient of
    the token (sequence_token, as in GSPO-token). None = the loss's."""
    aggregation: Aggregation | None = None
    """Reduction of token losses to one number. grpo: mean over completions of their token means; dapo: sum over the
    minibatch's tokens / the batch's tokens per minibatch; bnpo: the same sum / the minibatch's own tokens; dr_grpo: the
    same sum / (completions x rollout.max_new_tokens); luspo: mean over completions of their sums; token_sum: the sum.
    None = the loss's."""
    count_masked: bool = True
    """Whether completions without a token in the loss count in means over completions; true is TRL's rule, false is
    verl's."""
    clip_low: Annotated[float | None, Range(0.0, 1.0)] = None
    """Width of the clip range below 1: the smallest ratio is 1 - clip_low. None = 0.2, gspo 3e-4."""
    clip_high: Annotated[float | None, Range(0.0)] = None
    """Width of the clip range above 1: the largest ratio is 1 + clip_high. None = 0.28, gspo 4e-4, cispo 4."""
    delta: Annotated[float, Range(0.0)] = 0.0
    """Largest value of the unclipped ratio (two-sided clipping); 0 = off."""
    dual_clip: Annotated[float, Range(0.0)] = 0.0
    """Largest loss of a token with negative advantage, as a multiple of the advantage's magnitude (dual clip); 0 =
    off."""
    sapo_positive: Annotated[float, Range(above=0.0)] = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_negative: Annotated[float, Range(above=0.0)] = 1.05
    """sapo: temperature of the gate where the advantage is not positive."""
    vespo_positive: str = "2,3"
    """vespo: k and lambda of the gamma weight where the advantage is not negative."""
    vespo_negative: str = "3,2"
    """vespo: k and lambda of the gamma weight where the advantage is negative."""
    top_entropy: Annotated[float, Range(above=0.0, high=1.0)] = 1.0
    """Share of the minibatch's tokens, those of largest entropy, that enter the surrogate; below 1, each update costs
    one more forward pass."""
    entropy_coef: Annotated[float, Range(0.0)] = 0.0
    """Weight of the mean token entropy, which is maximised."""
    mask_truncated: bool = False
    """Whether completions that the length limit cut off are left out of the loss."""
    off_policy_threshold: Annotated[float, Range(0.0)] = 0.0
    """Largest mean log-ratio behaviour / policy of a completion with negative advantage; completions above it are left
    out. 0 = off."""
    kl_coef: Annotated[float, Range(0.0)] = 0.0
    """Weight of KL(policy || reference). The reference is the policy at the beginning of RL, after the cold start. 0 =
    no reference policy is held or run."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Place of the KL term: a loss term for each token (loss), or a deduction from a completion's reward before
    advantages are computed, summed over all of its sampled tokens (reward)."""
    kl_estimator: Literal["k1", "k2", "k3", "k1+", "k3+"] = "k3"
    """Estimator of the KL: the log-ratio (k1), half its square (k2), or ratio - 1 - log-ratio (k3); with +, the
    gradient is that of k2, which is the gradient of the KL."""
    kl_unbiased: bool = True
    """Whether the KL term is multiplied by the ratio of the policy to the policy that sampled the token, as TRL does by
    default. Its gradient is then unbiased off-policy, except where importance_cap cuts the ratio of an older policy."""
    off_policy: Literal["decoupled", "coupled", "ignored"] = "decoupled"
    """Treatment of groups from an older policy. decoupled: clip around the policy at the start of the step, and weigh
    by its ratio to the behaviour policy; coupled: clip around the behaviour policy; ignored: treat them as on-policy,
    for ablations."""
    importance: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """decoupled: importance weights of tokens or of completions; weights above importance_cap are cut to it (truncate)
    or become 0 (mask)."""
    importance_cap: Annotated[float, Range(above=0.0)] = 2.0
    """decoupled: largest importance weight."""
    ess_scaling: Literal["none", "sqrt", "linear"] = "none"
    """decoupled: factor on the learning rate of each update, by the effective sample size of its importance weights as
    a share of their number, which is 1 for fresh groups: 1 (none), the share's square root (sqrt, which VCPO takes for
    AdamW), or the share (linear)."""
    num_iterations: Annotated[int, Range(1)] = 1
    """Number of passes over a batch of rollouts."""
    minibatches: Annotated[int, Range(1)] = 1
    """Number of optimizer updates in a pass; each takes an equal share of the prompts, in order."""
    microbatch_rows: Annotated[int, Range(0)] = 32
    """Largest number of completions whose gradient is computed at a time; gradients accumulate over a minibatch. The
    number used is the largest divisor of the minibatch that the mesh divides. 0 = a whole minibatch. With packing, bins
    that are computed together take no more memory than this number of completions; where that permits a whole
    minibatch, no more than an eighth of its completions, but at least 8."""
    microbatch_tokens: Annotated[int | None, Range(1)] = None
    """Number of tokens that suffice for a microbatch of packed completions: no more bins are computed together than are
    needed to hold it. The last microbatch of an update is seldom full, so smaller microbatches compute less padding,
    as long as matrix products of so few tokens are fast. None = 256 for text on a CPU, and otherwise as many as
    microbatch_rows permits."""
    packing: bool | None = None
    """Whether to pack whole completions into bins, so that little padding is computed. A bin has the length of the
    longest completion or, where completions share their prompt, the length at which a completion costs least. None =
    pack where there are several microbatches and rollout.max_new_tokens is 256 or more, and always for text on a CPU.
    The loss is the same up to rounding."""
    share_prompts: bool | None = None
    """Whether packed completions of one prompt share the prompt's tokens in a bin. None = only where attention over
    packed rows is XLA's; true selects XLA's attention."""
    old_log_probs: Literal["sampler", "trainer", "interpolated"] = "sampler"
    """Source of the log-probs before the update: the sampler, or a forward pass of the trainer. Tokens of earlier steps
    always take the trainer's, unless it is interpolated (rollout.carry): theirs are then between the behaviour policy's
    and those of the policy that trains, by age and without a pass."""
    logits_mib: Annotated[int | None, Range(1)] = None
    """Memory for one chunk of float32 logits, in MiB; the array [tokens, vocab] never exists as a whole. Each chunk
    reads the head's weights and adds to their gradient, so that large chunks are faster. None = 160, and more on an
    accelerator of more than 16 GiB: 1/48 of what it has beyond, up to 1280 in all."""
