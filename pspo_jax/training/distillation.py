"""On-policy distillation: the policy learns a teacher's distribution in the states that it comes to by itself.

With teacher.divergence=sampled, a teacher's log-probs of the policy's own completions become advantages of their
tokens. The policy pi learns to minimise the reverse KL to the teacher q at every token that it draws,

    KL(pi || q) = E_{y ~ pi} [ log pi(y) - log q(y) ],    grad KL = E_{y ~ pi} [ (log pi(y) - log q(y)) grad log pi(y) ]

so that A = log q(y) - log pi_old(y) is the advantage of a token y, with no sum over the tokens behind it. This is the
estimator of Thinking Machines Lab's "On-Policy Distillation" (2025): the log-ratio of the drawn token alone (k1), as an
advantage in a policy-gradient loss, with a discount of 0. Agarwal et al. (GKD, arXiv 2306.13649) and Gu et al.
(MiniLLM, arXiv 2306.08543) minimise the same divergence on the student's own samples.

With another teacher.divergence, it is a term of the loss, summed over the whole vocabulary (losses/divergence.py). The
teacher then runs beside the policy in each microbatch, since its logits could not be kept for a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import Params
from pspo_jax.config.schema import Config, logits_mib
from pspo_jax.losses.divergence import Divergence, Predictor, TokenDivergence, chunked_divergence
from pspo_jax.losses.log_probs import compact_images, completion_hidden
from pspo_jax.losses.packing import by_row, lay_out_bins, packed_hidden
from pspo_jax.model.interface import Model
from pspo_jax.training.metrics import Metrics
from pspo_jax.training.scoring import Microbatch, score, shares_prompts
from pspo_jax.training.splitting import encoded
from pspo_jax.training.update import Teach


class Lesson(NamedTuple):
    """A batch for which the teacher has been asked, and what the update needs of it."""

    model: Model
    """The policy's functions, as they are for the update."""
    rows: Rows
    teach: Teach | None
    """Gives the divergence of a microbatch; None = the rows have advantages of tokens instead."""
    metrics: Metrics


def prepare_lesson(
    model: Model,
    teacher: Model | None,
    weights: Params | None,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> Lesson:
    """The rows as the teacher changes them, and its part in the update, as teacher.divergence says.

    Args:
      teacher: the teacher's functions, which may be those of another architecture; None = there is no teacher.
      weights: what these functions take.
      rows: rows with the log-probs of the policy at the start of the step.
      temperature: divisor of the teacher's logits, as of the policy's.
    """
    if teacher is None:
        return Lesson(model, rows, None, {})
    if config.teacher.divergence == "sampled":
        rows, metrics = with_teacher(teacher, weights, rows, temperature, config, images)
        return Lesson(model, rows, None, metrics)
    both = packed_alike(model, teacher)
    rows = dataclasses.replace(rows, advantages=config.teacher.reward_weight * rows.advantages)
    return Lesson(both, rows, functools.partial(_divergence_fn, both, teacher, weights), {})


def packed_alike(model: Model, teacher: Model) -> Model:
    """The policy's functions, with rows packed as the attention of either model allows: both read the same bins."""
    return model._replace(packs=model.packs and teacher.packs, shares=model.shares and teacher.shares)


def with_teacher(
    teacher: Model,
    weights: Params | None,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> tuple[Rows, Metrics]:
    """`rows` with the teacher's advantage of each token, those of completions weighed by teacher.reward_weight.

    The metric teacher/kl is the mean of log pi - log q over the fresh tokens in the loss, in nats. The arguments are
    those of `prepare_lesson`.
    """
    found = score(teacher, weights, rows, temperature, config, images=images)[0]
    gain = jnp.where(rows.mask, found - jax.lax.stop_gradient(rows.old_log_probs), 0)
    fresh = rows.mask & ~rows.stale
    kl = -jnp.where(fresh, gain, 0).sum() / jnp.maximum(fresh.sum(), 1)
    t = config.teacher
    rows = dataclasses.replace(rows, advantages=t.reward_weight * rows.advantages, token_advantages=t.weight * gain)
    return rows, {"teacher/kl": kl}


def _divergence_fn(model: Model, teacher: Model, weights: PyTree, images: Images | None) -> Partial:
    """`Teach` of a teacher: `microbatch_divergence` with the teacher's arrays, which make it a pytree."""
    function = functools.partial(microbatch_divergence, model, teacher)
    return Partial(function, weights, encoded(teacher, weights, images))


def microbatch_divergence(
    model: Model,
    teacher: Model,
    teacher_weights: PyTree,
    teacher_embeddings: Float[Array, "B U E"] | None,
    weights: PyTree,
    part: Microbatch,
    temperature: Float[Array, ""],
    config: Config,
    entropy_gradient: bool = False,
    embeddings: Float[Array, "B U D"] | None = None,
) -> TokenDivergence:
    """`microbatch_log_probs` with the divergence of the teacher in the state of each token, in nats.

    Args:
      teacher_weights: what the teacher's functions take; they have no gradient.
      teacher_embeddings: images of the prompts as `encoded` by the teacher; None = all prompts are text.
      embeddings: the same images as `encoded` by the policy.
    """
    rows, t, of_teacher = part.rows, part.rows.tokens.shape[1], config.teacher
    both = (model, weights, embeddings), (teacher, jax.lax.stop_gradient(teacher_weights), teacher_embeddings)
    compare = functools.partial(
        chunked_divergence,
        kind=cast(Divergence, of_teacher.divergence),
        beta=of_teacher.jsd_beta,
        temperature=temperature,
        logits_mib=logits_mib(config),
        entropy_gradient=entropy_gradient,
    )
    if part.owns_prompt is None or part.shape is None:
        prompts = rows.prompts, rows.lengths, rows.tokens
        policy, other = (
            Predictor(m, w, completion_hidden(m, w, *prompts, compact_images(rows.images, e, t))) for m, w, e in both
        )
        return compare(policy, other, rows.tokens)
    layout = lay_out_bins(rows, part.owns_prompt, part.shape, shares_prompts(model, config))
    policy, other = (Predictor(m, w, packed_hidden(m, w, rows, layout, e)) for m, w, e in both)
    found = compare(policy, other, layout.targets, valid=layout.valid)
    return TokenDivergence(*(by_row(x, layout, t) for x in found))
