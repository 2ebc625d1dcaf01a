"""The metrics of a step: of its rollouts, of the groups that older policies sampled, and of its updates.

docs/metrics.md gives the meaning and the healthy range of each key.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.schema import Config
from pspo_jax.losses.ratios import log_importance_weight
from pspo_jax.replay import Groups
from pspo_jax.rollout.carry import PendingGroups
from pspo_jax.training.scoring import token_ages
from pspo_jax.training.update import UpdateMetrics

Metrics = dict[str, Float[Array, ""]]
AGES = 8
"""Number of ages, in steps, with a metric of their own; the last one counts older groups too."""


def rollout_metrics(rollouts: Rollouts, rewards: Float[Array, "B G"], verdicts: Float[Array, "B G"]) -> Metrics:
    """Metrics of a batch of rollouts, by TRL's names where TRL has them; NaN = there is nothing to take a mean of.

    A group is solved where all its verdicts are 1, unsolved where all are 0, and neither where it has none.

    Args:
      rewards: reward of each completion; NaN = none.
      verdicts: verdict of each completion in [0, 1]; NaN = none.
    """
    stats = group_statistics(rewards, ddof=1)
    valid = ~jnp.isnan(rewards)
    rewarded = stats.judged > 0
    std = jnp.sqrt(stats.variance)
    lengths = rollouts.lengths.astype(jnp.float32)
    ended = rollouts.ended
    same = rewarded & ~((stats.variance > 0) & (stats.judged > 1))
    judged = ~jnp.isnan(verdicts)
    known = judged.any(axis=1)
    return {
        "reward": jnp.where(valid, rewards, 0).sum() / valid.sum(),
        "reward_std": jnp.where(rewarded, std, 0).sum() / rewarded.sum(),
        "frac_reward_zero_std": same.sum() / rewarded.sum(),
        "rewards/no_verdict": 1 - valid.mean(),
        "groups/solved": (known & (~judged | (verdicts >= 1)).all(axis=1)).mean(),
        "groups/unsolved": (known & (~judged | (verdicts <= 0)).all(axis=1)).mean(),
        "groups/no_verdict": 1 - known.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": (lengths * ended).sum() / jnp.maximum(ended.sum(), 1),
        "completions/min_terminated_length": jnp.where(ended.any(), jnp.where(ended, lengths, jnp.inf).min(), 0),
        "completions/max_terminated_length": jnp.where(ended, lengths, 0).max(),
        "completions/clipped_ratio": 1 - ended.mean(),
        "entropy": -jnp.where(rollouts.mask, rollouts.log_probs, 0).sum() / jnp.maximum(rollouts.mask.sum(), 1),
    }


def replay_metrics(groups: Groups, added: Groups | None, rows: Rows, step: Array, config: Config) -> Metrics:
    """Metrics of a batch's ages, and of the importance weights of completions that an older policy sampled.

    replay/ess is (sum w)^2 / (n sum w^2) over the n stale tokens, with w = pi_old / mu before truncation; it is 1 where
    there are none.

    Args:
      added: completions beside the batch, which `rows` ends with; None = there is no place for any.
    """
    age = jnp.concatenate([_ages(part, step) for part in (groups, added) if part is not None])
    batch, stale = age.shape[0], age > 0
    weights = importance_statistics(rows, config)
    metrics = {
        "replay/share": stale.mean(),
        "replay/age_mean": age.sum() / jnp.maximum(stale.sum(), 1),
        "replay/ess": weights.ess,
        "replay/weight_mean": weights.mean,
        "replay/weight_max": weights.max,
        "replay/capped": weights.capped,
    }
    last = min(AGES, config.replay.max_age)
    for steps in range(1, last + 1):
        found = age == steps if steps < last else age >= steps
        metrics[f"replay/age_{steps}"] = found.sum() / batch
    if added is not None:
        metrics["replay/completions"] = added.counted.sum().astype(jnp.float32)
    return metrics


class ImportanceStatistics(NamedTuple):
    """Statistics of the importance weights w = pi_old / mu of stale tokens, before truncation."""

    ess: Float[Array, ""]
    """Effective sample size as a share of the number of tokens; 1 where there are none."""
    mean: Float[Array, ""]
    """Mean weight; 0 where there are none."""
    max: Float[Array, ""]
    """Largest weight; 0 where there are none."""
    capped: Float[Array, ""]
    """Share of weights above loss.importance_cap."""


def importance_statistics(rows: Rows, config: Config) -> ImportanceStatistics:
    """The statistics over the stale tokens in the loss."""
    mask = rows.mask & rows.stale
    log_w = log_importance_weight(rows.old_log_probs, rows.behaviour_log_probs, mask, config.loss)
    w = jnp.where(mask, jnp.exp(log_w), 0)
    tokens = mask.sum()
    least_one = jnp.maximum(tokens, 1)
    square = (w**2).sum()
    return ImportanceStatistics(
        ess=jnp.where(tokens > 0, w.sum() ** 2 / jnp.maximum(least_one * square, 1e-30), 1.0),
        mean=w.sum() / least_one,
        max=w.max(),
        capped=(w > config.loss.importance_cap).sum() / least_one,
    )


def carry_metrics(pending: PendingGroups, groups: Groups, rows: Rows, step: Int[Array, ""], config: Config) -> Metrics:
    """Metrics of a batch whose groups were drawn over several steps: their policies, and stale tokens' weights.

    Interpolated log-probs of the old policy are known in the update alone, and so there are no weights before it.

    Args:
      pending: what is pending beside the batch.
    """
    assert groups.versions is not None
    versions = groups.versions
    begun = versions >= 0
    changes = (versions[:, 1:] != versions[:, :-1]) & begun[:, 1:]
    policies = 1 + changes.sum(axis=1)
    drawn = groups.mask.sum()
    ages = token_ages(groups, step, config)
    metrics = {
        "carry/versions_mean": policies.mean(dtype=jnp.float32),
        "carry/versions_max": policies.max().astype(jnp.float32),
        "carry/stale_tokens": (groups.mask & (ages > 0)).sum() / jnp.maximum(drawn, 1),
        "carry/age_max": jnp.where(groups.mask, ages, 0).max().astype(jnp.float32),
        "carry/unfinished": pending.unfinished.astype(jnp.float32),
        "carry/waiting": (pending.held - pending.unfinished).astype(jnp.float32),
    }
    if config.loss.old_log_probs != "interpolated":
        weights = importance_statistics(rows, config)
        metrics |= {
            "carry/ess": weights.ess,
            "carry/weight_mean": weights.mean,
            "carry/weight_max": weights.max,
            "carry/capped": weights.capped,
        }
    return metrics


def _ages(groups: Groups, step: Array) -> Int[Array, "R"]:
    """Steps since each completion was sampled; 0 = the current policy sampled it, or its group is not in the batch."""
    return jnp.repeat(jnp.where(groups.counted, step - groups.step, 0), groups.rewards.shape[1])


def update_metrics(updates: UpdateMetrics, config: Config) -> Metrics:
    """Metrics of a step's updates by TRL's names, means over the updates.

    The sampler's mismatch is that of the first update, before any change; NaN = it computed no completion that the
    current policy sampled.
    `kl` is there only if the loss has a KL term; `assign_advantages` reports a KL that is taken from the rewards.

    Args:
      updates: the metrics stacked over updates.
    """
    loss = updates.loss
    mismatch = jax.tree.map(lambda x: x[0], updates.mismatch)
    first = jax.tree.map(lambda x: jnp.where(mismatch.tokens > 0, x, jnp.nan), mismatch)
    metrics = {
        "loss": loss.loss.mean(),
        "grad_norm": updates.grad_norm.mean(),
        "update/completions": updates.completions.mean(),
        "update/entropy": jnp.nanmean(loss.entropy),
        "update/useful_tokens": jnp.nanmean(updates.useful),
        "clip_ratio/low_mean": loss.low.mean(),
        "clip_ratio/low_min": _finite(loss.low_min.min()),
        "clip_ratio/high_mean": loss.high.mean(),
        "clip_ratio/high_max": loss.high_max.max(),
        "clip_ratio/region_mean": (loss.low + loss.high).mean(),
        "sampling/sampling_logp_difference/mean": first.difference_sum / first.tokens,
        "sampling/sampling_logp_difference/max": first.difference_max,
        "sampling/importance_sampling_ratio/mean": first.ratio_sum / first.tokens,
        "sampling/importance_sampling_ratio/min": first.ratio_min,
        "sampling/importance_sampling_ratio/max": first.ratio_max,
    }
    if config.loss.kl_coef > 0 and config.loss.kl_in == "loss":
        metrics["kl"] = loss.kl.mean()
    if updates.mismatch.teacher_kl is not None:
        # The first pass over the minibatches sees each token once.
        first_pass = slice(config.loss.minibatches)
        kl, tokens = updates.mismatch.teacher_kl[first_pass].sum(), updates.mismatch.tokens[first_pass].sum()
        metrics["teacher/kl"] = kl / jnp.maximum(tokens, 1)
    if updates.rate_factor is not None:
        metrics["update/rate_factor"] = updates.rate_factor.mean()
    if config.loss.surrogate == "cispo":
        metrics["cispo_clip_ratio"] = loss.high.mean()
    if config.loss.surrogate == "vespo":
        metrics["vespo/phi_seq_mean"] = jnp.nanmean(loss.gamma)
    return metrics


def _finite(least: Float[Array, ""]) -> Float[Array, ""]:
    """The minimum, or 0 if it was taken over nothing."""
    return jnp.where(jnp.isposinf(least), 0, least)
