"""What a step says of its rollouts, and of the groups that older policies sampled."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.advantages.interface import group_statistics
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.schema import Config
from pspo_jax.losses.ratios import log_importance_weight
from pspo_jax.replay import Groups

Metrics = dict[str, Float[Array, ""]]
AGES = 8
"""Ages with a metric of their own; the last one stands for all beyond."""


def rollout_metrics(rollouts: Rollouts, rewards: Float[Array, "B G"], verdicts: Float[Array, "B G"]) -> Metrics:
    """TRL's names where TRL has them; NaN = there is nothing to take a mean of.

    A group is solved where all its verdicts are 1, unsolved where all are 0, and neither where it has none.

    Args:
      verdicts: in [0, 1]; NaN = none.
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
    }


def replay_metrics(groups: Groups, rows: Rows, step: Array, config: Config) -> Metrics:
    """Ages of a batch's groups, and the importance weights of those that an older policy sampled.

    replay/ess is (sum w)^2 / (n sum w^2) over the n stale tokens, w = pi_old / mu before truncation; 1 without any.
    """
    batch = groups.counted.shape[0]
    age = jnp.where(groups.counted, step - groups.step, 0)
    stale = age > 0
    mask = rows.mask & rows.stale[:, None]
    log_w = log_importance_weight(rows.old_log_probs, rows.behaviour_log_probs, mask, config.loss)
    w = jnp.where(mask, jnp.exp(log_w), 0)
    tokens = mask.sum()
    least_one = jnp.maximum(tokens, 1)
    square = (w**2).sum()
    capped = (w > config.loss.importance_cap).sum() / least_one
    metrics = {
        "replay/share": stale.mean(),
        "replay/age_mean": age.sum() / jnp.maximum(stale.sum(), 1),
        "replay/ess": jnp.where(tokens > 0, w.sum() ** 2 / jnp.maximum(least_one * square, 1e-30), 1.0),
        "replay/weight_mean": w.sum() / least_one,
        "replay/weight_max": w.max(),
        "replay/capped": capped,
    }
    last = min(AGES, config.replay.max_age)
    for steps in range(1, last + 1):
        found = age == steps if steps < last else age >= steps
        metrics[f"replay/age_{steps}"] = found.sum() / batch
    return metrics
