"""The divergence of a teacher's next-token distribution from the policy's over the whole vocabulary, state by state.

A state is a prompt with the completion so far, which the policy has drawn and which has no gradient. In each, the
divergence of the policy pi and the teacher q is a sum over all tokens, so that its gradient has no noise of the token
that was drawn:

    forward_kl    KL(q || pi) = sum q (log q - log pi)
    reverse_kl    KL(pi || q) = sum pi (log pi - log q)
    jsd           beta KL(q || m) + (1 - beta) KL(pi || m),    m = beta q + (1 - beta) pi

The last is the generalised Jensen-Shannon divergence of Agarwal et al. (GKD, arXiv 2306.13649, equation 1), in whose
setting, the student's own completions, all three stand. Each is 0 where pi = q, and only there.

The logits of policy and teacher exist for one chunk of predictions at a time, in the backward pass too.

Letters: R rows, T predictions of a row, D width of a model, V the policy's vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.distributed.mesh import constrain
from pspo_jax.losses.log_probs import chunk_columns, num_chunks, of_logits
from pspo_jax.model.interface import MASKED, Model

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class Predictor(NamedTuple):
    """A model with its hidden states of some predictions, from which its head makes logits."""

    model: Model
    weights: PyTree
    hidden: Float[Array, "R T D"]
    """The hidden state from which each prediction is made."""


class TokenDivergence(NamedTuple):
    """What the heads of policy and teacher say about each prediction, in nats."""

    log_probs: Float[Array, "R T"]
    """log pi of the token that was drawn."""
    entropy: Float[Array, "R T"]
    """Entropy of the policy's distribution."""
    divergence: Float[Array, "R T"]
    """Divergence of the two distributions, with its gradient in the policy."""
    teacher_log_probs: Float[Array, "R T"]
    """log q of the token that was drawn, without a gradient."""


def divergence_of(
    log_p: Float[Array, "*n V"], log_q: Float[Array, "*n V"], kind: Divergence, beta: float = 0.5
) -> Float[Array, "*n"]:
    """The divergence of each pair of distributions, in nats.

    Args:
      log_p: log-probs under the policy.
      log_q: log-probs under the teacher.
      beta: share of the teacher in the mixture of `jsd`, between 0 and 1.
    """
    if kind == "forward_kl":
        return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)
    if kind == "reverse_kl":
        return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    log_m = jnp.logaddexp(log_q + jnp.log(beta), log_p + jnp.log1p(-beta))
    return (beta * jnp.exp(log_q) * (log_q - log_m) + (1 - beta) * jnp.exp(log_p) * (log_p - log_m)).sum(axis=-1)


def chunked_divergence(
    policy: Predictor,
    teacher: Predictor,
    targets: Int[Array, "R T"],
    kind: Divergence,
    beta: float = 0.5,
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
    valid: Bool[Array, "R T"] | None = None,
) -> TokenDivergence:
    """`chunked_log_probs` with the divergence of the teacher in each state.

    A chunk's logits are computed again in the backward pass. Ids beyond the policy's vocabulary are cut from the
    teacher's distribution, and those that the teacher lacks have probability 0 there: neither is ever drawn.

    Args:
      teacher: the teacher, with its own hidden states of the same predictions; nothing in it has a gradient.
      targets: the tokens that were drawn.
      temperature: divisor of the logits of both.
      logits_mib: size of one chunk of float32 logits, those of policy and teacher together.
      entropy_gradient: whether entropies carry a gradient.
      valid: predictions that are wanted. A chunk without any is skipped and its results are 0; None = all are wanted.
    """
    r, t = targets.shape
    v = policy.model.vocab_size
    columns = chunk_columns(r, t, v + teacher.model.vocab_size, logits_mib, valid is not None)
    chunks = num_chunks(t, columns)
    columns = -(-t // chunks)

    def cut(x: Array) -> Array:
        """[R, T, ...] -> [chunks, R, columns, ...]"""
        x = jnp.pad(x, ((0, 0), (0, chunks * columns - t)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(r, chunks, columns, *x.shape[2:]).swapaxes(0, 1)

    def compute(h: Array, of_teacher: Array, ids: Array) -> TokenDivergence:
        logits = constrain(policy.model.logits(policy.weights, h) / temperature, "rows", "length", "vocab")
        log_probs, entropy, log_total = of_logits(logits, ids)
        theirs = _as_wide(teacher.model.logits(teacher.weights, of_teacher) / temperature, v)
        theirs = jax.lax.stop_gradient(constrain(theirs, "rows", "length", "vocab"))
        of_token, _, their_total = of_logits(theirs, ids)
        found = divergence_of(logits - log_total[..., None], theirs - their_total[..., None], kind, beta)
        entropy = entropy if entropy_gradient else jax.lax.stop_gradient(entropy)
        return TokenDivergence(log_probs, entropy, found, of_token)

    def skip(h: Array, of_teacher: Array, ids: Array) -> TokenDivergence:
        return TokenDivergence(*[jnp.zeros(ids.shape)] * 4)

    @jax.checkpoint
    def chunk(h: Array, of_teacher: Array, ids: Array, wanted: Array) -> TokenDivergence:
        if valid is None:
            return compute(h, of_teacher, ids)
        found: TokenDivergence = jax.lax.cond(wanted, compute, skip, h, of_teacher, ids)
        return found

    wanted = jnp.ones(chunks, bool) if valid is None else cut(valid).any(axis=(1, 2))
    teacher = teacher._replace(hidden=jax.lax.stop_gradient(teacher.hidden))
    states = [constrain(cut(one.hidden), None, "rows", "length", None) for one in (policy, teacher)]
    found = jax.lax.scan(lambda _, xs: (None, chunk(*xs)), None, (*states, cut(targets), wanted))[1]
    joined: TokenDivergence = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(r, -1)[:, :t], found)
    return joined


def _as_wide(logits: Float[Array, "R C W"], vocab_size: int) -> Float[Array, "R C V"]:
    """Logits over the ids of another vocabulary, of which those without a logit are masked."""
    lacking = vocab_size - logits.shape[-1]
    if lacking <= 0:
        return logits[..., :vocab_size]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, lacking)), constant_values=MASKED)
