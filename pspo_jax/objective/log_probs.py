"""Log-probs and entropies of completions without [tokens, vocab] ever existing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.parallel.mesh import constrain
from pspo_jax.policy.base import Policy
from pspo_jax.state import Params


def pack_rows(
    prompts: Int[Array, "R P"], lengths: Int[Array, "R"], completions: Int[Array, "R T"]
) -> Int[Array, "R P+T"]:
    """Compact rows: each completion right behind its prompt, the prompt's padding moved to the end."""
    p = prompts.shape[1]
    t = completions.shape[1]
    place = jnp.arange(p + t)
    in_prompt = place < lengths[:, None]
    joined = jnp.concatenate([prompts, completions], axis=1)
    source = jnp.where(in_prompt, place, place - lengths[:, None] + p)
    return jnp.take_along_axis(joined, jnp.minimum(source, p + t - 1), axis=1)


def completion_log_probs(
    policy: Policy,
    params: Params,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    completions: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-prob of each completion token given all before it, and the entropy of each of those distributions.

    The head runs on chunks of a few columns of all rows, each recomputed in the backward pass, so the peak is one chunk
    of logits. Chunks are cut along T: rows stay spread over devices.

    Args:
      temperature: divides the logits, as it did in the sampler.
      logits_mib: size of one chunk of float32 logits.
      entropy_gradient: let entropies carry a gradient.
    """
    t = completions.shape[1]
    rows = pack_rows(prompts, lengths, completions)
    hidden = policy.hidden(params, rows)
    at = (lengths - 1)[:, None] + jnp.arange(t)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return chunked_log_probs(policy, params, hidden, completions, temperature, logits_mib, entropy_gradient)


def chunked_log_probs(
    policy: Policy,
    params: Params,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
    live: Bool[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """The head of `completion_log_probs`: hidden states in, log-probs and entropies of the targets out.

    Args:
      live: columns in which no row is live are left out, and their results 0; None = all are computed.
    """
    r, t = targets.shape
    columns = max(1, min(t, logits_mib * 2**20 // (4 * policy.vocab_size * r)))
    # With columns to leave out, chunks are small enough to leave some.
    columns = columns if live is None else min(columns, -(-t // 8))
    chunks = -(-t // columns)
    pad = chunks * columns - t
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(r, chunks, columns, -1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(r, chunks, columns)

    @jax.checkpoint
    def chunk(h: Float[Array, "R C D"], ids: Int[Array, "R C"]) -> tuple[Array, Array]:
        logits = constrain(policy.logits(params, h) / temperature, "rows", "length", "vocab")
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        probs = jnp.exp(logits - log_total[..., None])
        entropy = log_total - (probs * logits).sum(axis=-1)
        return chosen - log_total, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)

    wanted = jnp.ones(chunks, bool)
    if live is not None:
        wanted = jnp.pad(live.any(axis=0), (0, pad)).reshape(chunks, columns).any(axis=1)

    def nothing(h: Array, ids: Array) -> tuple[Array, Array]:
        return jnp.zeros(ids.shape), jnp.zeros(ids.shape)

    def body(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        h, ids, run = xs
        return None, chunk(h, ids) if live is None else jax.lax.cond(run, chunk, nothing, h, ids)

    if chunks == 1:
        log_probs, entropy = chunk(hidden[:, 0], targets[:, 0])
        return log_probs, entropy
    _, (log_probs, entropy) = jax.lax.scan(body, None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1), wanted))
    log_probs, entropy = (x.swapaxes(0, 1).reshape(r, -1)[:, :t] for x in (log_probs, entropy))
    return log_probs, entropy
