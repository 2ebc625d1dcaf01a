"""What a step says of its rollouts, and of the groups that older policies sampled."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.config import Config
from pspo_jax.credit.base import group_statistics
from pspo_jax.objective.ratios import log_importance_weight
from pspo_jax.replay import Groups
from pspo_jax.rows import Rows
from pspo_jax.state import Rollouts

Metrics = dict[str, Float[Array, ""]]
AGES = 8
"""Ages with a metric of their own; the last one stands for all beyond."""


def rollout_metrics(rollouts: Rollouts, rewards: Float[Array, "B G"]) -> Metrics:
    """TRL's names where TRL has them."""
    stats = group_statistics(rewards, ddof=1)
    valid = ~jnp.isnan(rewards)
    judged = jnp.maximum((stats.verdicts > 0).sum(), 1)
    std = jnp.sqrt(stats.variance)
    lengths = rollouts.lengths.astype(jnp.float32)
    ended = rollouts.ended
    mixed = (stats.variance > 0) & (stats.verdicts > 1)
    return {
        "reward": jnp.where(valid, rewards, 0).sum() / jnp.maximum(valid.sum(), 1),
        "reward_std": std.sum() / judged,
        "frac_reward_zero_std": 1 - mixed.mean(),
        "rewards/no_verdict": 1 - valid.mean(),
        "groups/effective": mixed.sum().astype(jnp.float32),
        "groups/solved": ((stats.mean == 1) & ~mixed).mean(),
        "groups/unsolved": ((stats.mean == 0) & ~mixed).mean(),
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
    log_w = log_importance_weight(rows.old_log_probs, rows.behaviour_log_probs, mask, config.objective)
    w = jnp.where(mask, jnp.exp(log_w), 0)
    tokens = mask.sum()
    least_one = jnp.maximum(tokens, 1)
    square = (w**2).sum()
    capped = (w > config.objective.importance_cap).sum() / least_one
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
