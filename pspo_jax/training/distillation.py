"""On-policy distillation: a teacher's log-probs of the policy's own completions become advantages of their tokens.

The policy pi learns to minimise the reverse KL to the teacher q at every token that it draws,

    KL(pi || q) = E_{y ~ pi} [ log pi(y) - log q(y) ],    grad KL = E_{y ~ pi} [ (log pi(y) - log q(y)) grad log pi(y) ]

so that A = log q(y) - log pi_old(y) is the advantage of a token y, with no sum over the tokens behind it. This is the
estimator of Thinking Machines Lab's "On-Policy Distillation" (2025): the log-ratio of the drawn token alone (k1), as an
advantage in a policy-gradient loss, with a discount of 0. Agarwal et al. (GKD, arXiv 2306.13649) and Gu et al.
(MiniLLM, arXiv 2306.08543) minimise the same divergence on the student's own samples.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import Params
from pspo_jax.config.schema import Config
from pspo_jax.model.interface import Model
from pspo_jax.training.metrics import Metrics
from pspo_jax.training.scoring import score


def with_teacher(
    teacher: Model,
    weights: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> tuple[Rows, Metrics]:
    """`rows` with the teacher's advantage of each token, those of completions weighed by teacher.reward_weight.

    The metric teacher/kl is the mean of log pi - log q over the fresh tokens in the loss, in nats.

    Args:
      teacher: the teacher's functions, which may be those of another architecture.
      weights: what these functions take.
      rows: rows with the log-probs of the policy at the start of the step.
      temperature: divisor of the teacher's logits, as of the policy's.
    """
    found = score(teacher, weights, rows, temperature, config, images=images)[0]
    gain = jnp.where(rows.mask, found - jax.lax.stop_gradient(rows.old_log_probs), 0)
    fresh = rows.mask & ~rows.stale[:, None]
    kl = -jnp.where(fresh, gain, 0).sum() / jnp.maximum(fresh.sum(), 1)
    t = config.teacher
    rows = dataclasses.replace(rows, advantages=t.reward_weight * rows.advantages, token_advantages=t.weight * gain)
    return rows, {"teacher/kl": kl}
