"""Log-probs and entropies of completions, computed so that logits [tokens, vocabulary] never exist as a whole."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.arrays.rows import RowImages
from pspo_jax.arrays.state import Params
from pspo_jax.distributed.mesh import cannot_index_split, constrain
from pspo_jax.model.interface import ImageTokens, Model

_LEAST_PREDICTIONS = 64
"""Number of predictions of a chunk below which the head is slow, since each chunk reads all weights of the head."""


def compact_rows(
    prompts: Int[Array, "R P"], lengths: Int[Array, "R"], completions: Int[Array, "R T"]
) -> Int[Array, "R P+T"]:
    """Rows with each completion right behind its prompt: the prompt's padding moves to the end of the row."""
    p = prompts.shape[1]
    t = completions.shape[1]
    position = jnp.arange(p + t)
    in_prompt = position < lengths[:, None]
    joined = jnp.concatenate([prompts, completions], axis=1)
    source = jnp.where(in_prompt, position, position - lengths[:, None] + p)
    return jnp.take_along_axis(joined, jnp.minimum(source, p + t - 1), axis=1)


def compact_images(images: RowImages | None, embeddings: Float[Array, "B U D"] | None, t: int) -> ImageTokens | None:
    """The tokens of images in `compact_rows`, whose completions have t tokens; None = all tokens are text.

    Args:
      embeddings: what `Model.encode_images` makes of the prompts' images.
    """
    if images is None or embeddings is None:
        return None
    units, p = embeddings.shape[1], images.unit.shape[1]
    index = jnp.where(images.unit >= 0, images.prompt[:, None] * units + images.unit, -1)
    # Positions of a prompt's padding go on behind the prompt, and those of a completion are the same numbers.
    behind = images.delta[:, None, None] + jnp.arange(p, p + t)[:, None]
    behind = jnp.broadcast_to(behind, (*behind.shape[:2], images.positions.shape[2]))
    return ImageTokens(
        embeddings=embeddings.reshape(-1, embeddings.shape[2]),
        embedding_of=jnp.pad(index, ((0, 0), (0, t)), constant_values=-1),
        positions=jnp.concatenate([images.positions, behind], axis=1),
    )


def completion_log_probs(
    model: Model,
    params: Params,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    completions: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
    images: ImageTokens | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-prob of each completion token given all tokens before it, and the entropy of each of those distributions.

    The head runs on chunks, each a few columns of all rows, and the backward pass computes each chunk again, so that
    the peak is one chunk of logits. Chunks are cut along T, so that rows stay spread over devices.

    Args:
      prompts: right-padded.
      lengths: tokens of each prompt.
      temperature: divisor of the logits, the same as in the sampler.
      logits_mib: size of one chunk of float32 logits.
      entropy_gradient: whether entropies carry a gradient.
      images: the tokens of images in the compact rows; None = all tokens are text.
    """
    hidden = completion_hidden(model, params, prompts, lengths, completions, images)
    return chunked_log_probs(model, params, hidden, completions, temperature, logits_mib, entropy_gradient)


def completion_hidden(
    model: Model,
    params: Params,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, "R"],
    completions: Int[Array, "R T"],
    images: ImageTokens | None = None,
) -> Float[Array, "R T D"]:
    """The hidden state from which each completion token is predicted; the arguments are `completion_log_probs`'s."""
    rows = compact_rows(prompts, lengths, completions)
    hidden = model.hidden(params, rows) if images is None else model.hidden(params, rows, images=images)
    source = (lengths - 1)[:, None] + jnp.arange(completions.shape[1])
    return hidden_at(hidden, source)


def hidden_at(hidden: Float[Array, "R S D"], source: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """The hidden states at these positions of each row, which are gathered along context if they must be."""
    if cannot_index_split():
        hidden = constrain(hidden, "rows", None, None)
    return jnp.take_along_axis(hidden, source[..., None], axis=1)


def chunked_log_probs(
    model: Model,
    params: Params,
    hidden: Float[Array, "R T D"],
    targets: Int[Array, "R T"],
    temperature: Float[Array, ""] | float = 1.0,
    logits_mib: int = 160,
    entropy_gradient: bool = False,
    valid: Bool[Array, "R T"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """The head of `completion_log_probs`: log-probs and entropies of the targets, from the hidden states before them.

    Args:
      valid: predictions that are wanted. A chunk without any is skipped and its results are 0; None = all are wanted.
    """
    r, t = targets.shape
    columns = chunk_columns(r, t, model.vocab_size, logits_mib, valid is not None)
    chunks = num_chunks(t, columns)
    columns = -(-t // chunks)
    pad = chunks * columns - t

    def cut(x: Array) -> Array:
        """[R, T, ...] -> [R, chunks, columns, ...]; nothing is copied where the chunks divide T."""
        if pad:
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(r, chunks, columns, *x.shape[2:])

    wanted = jnp.ones(chunks, bool) if valid is None else cut(valid).any(axis=(0, 2))
    hidden = constrain(cut(hidden), "rows", None, "length", None)
    head, weights = jax.closure_convert(lambda h: model.logits(params, h), hidden[:, 0])
    settings = _Settings(head, entropy_gradient, valid is not None)
    log_probs, entropy = _chunks(settings, hidden, cut(targets), jnp.asarray(temperature), wanted, tuple(weights))
    return log_probs.reshape(r, -1)[:, :t], entropy.reshape(r, -1)[:, :t]


def chunk_columns(rows: int, t: int, vocab_size: int, logits_mib: int, skips: bool) -> int:
    """Largest number of columns of a chunk.

    Where chunks may be skipped, there are about eight, or fewer so that each has `_LEAST_PREDICTIONS` predictions.
    """
    columns = max(1, min(t, logits_mib * 2**20 // (4 * vocab_size * rows)))
    return min(columns, max(-(-t // 8), -(-_LEAST_PREDICTIONS // rows))) if skips else columns


def num_chunks(t: int, columns: int) -> int:
    """Number of chunks of at most `columns` columns: the fewest, or up to twice as many if that number divides t."""
    fewest = -(-t // columns)
    return next((n for n in range(fewest, min(2 * fewest, t) + 1) if t % n == 0), fewest)


class _Head(Protocol):
    """`Model.logits` with its weights as arguments, so that they get gradients."""

    def __call__(self, hidden: Float[Array, "R C D"], *weights: Array) -> Float[Array, "R C V"]: ...


@dataclass(frozen=True)
class _Settings:
    """The static arguments of `_chunks`."""

    head: _Head
    entropy_gradient: bool
    skips: bool
    """Whether a chunk may be skipped."""


Results = tuple[Float[Array, "R N C"], Float[Array, "R N C"]]
"""Log-probs and entropies of N chunks of C columns."""


class _Saved(NamedTuple):
    """The values that the forward pass keeps for the backward pass of a head that trains."""

    hidden: Float[Array, "R N C D"]
    targets: Int[Array, "R N C"]
    temperature: Float[Array, ""]
    wanted: Bool[Array, "N"]
    weights: tuple[Array, ...]
    log_total: Float[Array, "R N C"]
    """The log-sum-exp of the logits."""
    entropy: Float[Array, "R N C"]


class _Slopes(NamedTuple):
    """The values that the forward pass keeps for the backward pass of a head that does not train."""

    slopes: Float[Array, "R N C D"]
    """The gradient of each log-prob in its hidden state."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(
    settings: _Settings,
    hidden: Float[Array, "R N C D"],
    targets: Int[Array, "R N C"],
    temperature: Float[Array, ""],
    wanted: Bool[Array, "N"],
    weights: tuple[Array, ...],
) -> Results:
    """Log-probs and entropies, one chunk of logits at a time.

    The backward pass computes a chunk's logits again and normalises them by the log-sum-exp that the forward pass kept.
    It writes the gradient of the hidden states chunk by chunk, so that there is no second copy of them.

    The gradient of a log-prob in its hidden state depends on the weights alone. Where the head does not train, as under
    adapters, the forward pass keeps this gradient, and the backward pass multiplies by cotangents: the head computes
    two products instead of three.

    Args:
      wanted: chunks that are computed; the others are skipped if `settings.skips`.
    """
    return _forward(settings, hidden, targets, temperature, wanted, weights)[0]


def _logits(settings: _Settings, h: Array, temperature: Array, weights: tuple[Array, ...]) -> Float[Array, "R C V"]:
    return constrain(settings.head(h, *weights) / temperature, "rows", "length", "vocab")


def _forward(
    settings: _Settings,
    hidden: Float[Array, "R N C D"],
    targets: Int[Array, "R N C"],
    temperature: Float[Array, ""],
    wanted: Bool[Array, "N"],
    weights: tuple[Array, ...],
) -> tuple[Results, _Saved]:
    def compute(h: Array, ids: Array) -> tuple[Array, ...]:
        return of_logits(_logits(settings, h, temperature, weights), ids)

    def skip(h: Array, ids: Array) -> tuple[Array, ...]:
        return (jnp.zeros(ids.shape),) * 3

    log_probs, entropy, log_total = _each_chunk(settings, compute, skip, hidden, targets, wanted)
    return (log_probs, entropy), _Saved(hidden, targets, temperature, wanted, weights, log_total, entropy)


def _forward_with_slopes(
    settings: _Settings,
    hidden: Float[Array, "R N C D"],
    targets: Int[Array, "R N C"],
    temperature: Float[Array, ""],
    wanted: Bool[Array, "N"],
    weights: tuple[Array, ...],
) -> tuple[Results, _Slopes]:
    def compute(h: Array, ids: Array) -> tuple[Array, ...]:
        logits, vjp = jax.vjp(lambda h: _logits(settings, h, temperature, weights), h)
        log_probs, entropy, log_total = of_logits(logits, ids)
        (slopes,) = vjp(_is_target(logits, ids) - jnp.exp(logits - log_total[..., None]))
        return log_probs, entropy, slopes

    def skip(h: Array, ids: Array) -> tuple[Array, ...]:
        return jnp.zeros(ids.shape), jnp.zeros(ids.shape), jnp.zeros_like(h)

    log_probs, entropy, slopes = _each_chunk(settings, compute, skip, hidden, targets, wanted)
    return (log_probs, entropy), _Slopes(slopes)


def of_logits(logits: Float[Array, "R C V"], ids: Int[Array, "R C"]) -> tuple[Array, Array, Array]:
    """Log-probs of the ids, entropies, and the log-sum-exp of the logits."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    if cannot_index_split():
        chosen = jnp.where(_is_target(logits, ids), logits, 0).sum(axis=-1)
    else:
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    entropy = log_total - (jnp.exp(logits - log_total[..., None]) * logits).sum(axis=-1)
    return chosen - log_total, entropy, log_total


def _is_target(logits: Float[Array, "R C V"], ids: Int[Array, "R C"]) -> Bool[Array, "R C V"]:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == ids[..., None]


class _ChunkFn(Protocol):
    """A function that gives the results of one chunk."""

    def __call__(self, h: Float[Array, "R C D"], ids: Int[Array, "R C"], /) -> tuple[Array, ...]: ...


def _each_chunk(
    settings: _Settings,
    compute: _ChunkFn,
    skip: _ChunkFn,
    hidden: Float[Array, "R N C D"],
    targets: Int[Array, "R N C"],
    wanted: Bool[Array, "N"],
) -> tuple[Array, ...]:
    """The results of every chunk, [R, N, C, ...]: those of `compute`, or of `skip` for chunks that are not wanted."""

    def body(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, ...]]:
        i, ids, is_wanted = xs
        h = jax.lax.dynamic_index_in_dim(hidden, i, axis=1, keepdims=False)
        return None, jax.lax.cond(is_wanted, compute, skip, h, ids) if settings.skips else compute(h, ids)

    xs = jnp.arange(hidden.shape[1]), targets.swapaxes(0, 1), wanted
    return tuple(x.swapaxes(0, 1) for x in jax.lax.scan(body, None, xs)[1])


def _forward_to_differentiate(
    settings: _Settings,
    hidden: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    temperature: CustomVJPPrimal,
    wanted: CustomVJPPrimal,
    weights: tuple[CustomVJPPrimal, ...],
) -> tuple[Results, _Saved | _Slopes]:
    """The forward pass before a backward pass; each argument says whether a gradient in it is wanted (`perturbed`)."""
    trains = settings.entropy_gradient or any(w.perturbed for w in weights)
    args = hidden.value, targets.value, temperature.value, wanted.value, tuple(w.value for w in weights)
    return _forward(settings, *args) if trains else _forward_with_slopes(settings, *args)


def _backward(
    settings: _Settings, saved: _Saved | _Slopes, cotangents: tuple[Array | SymbolicZero, Array | SymbolicZero]
) -> tuple[Array, None, None, None, tuple[Array, ...] | None]:
    d_log_probs, d_entropy = (jnp.zeros(x.shape) if isinstance(x, SymbolicZero) else x for x in cotangents)
    if isinstance(saved, _Slopes):
        return (saved.slopes * d_log_probs[..., None]).astype(saved.slopes.dtype), None, None, None, None
    hidden, targets, temperature, wanted, weights, log_total, entropy = saved

    def compute(
        h: Array, ids: Array, total: Array, chunk_entropy: Array, d_log_prob: Array, d_chunk_entropy: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        logits, vjp = jax.vjp(lambda h, w: _logits(settings, h, temperature, w), h, weights)
        log_p = logits - total[..., None]
        p = jnp.exp(log_p)
        d_logits = d_log_prob[..., None] * (_is_target(logits, ids) - p)
        if settings.entropy_gradient:
            d_logits -= d_chunk_entropy[..., None] * p * (log_p + chunk_entropy[..., None])
        return vjp(d_logits)

    def skip(h: Array, *_: Array) -> tuple[Array, tuple[Array, ...]]:
        return jnp.zeros_like(h), jax.tree.map(jnp.zeros_like, weights)

    def body(
        carry: tuple[Array, tuple[Array, ...]], xs: tuple[Array, ...]
    ) -> tuple[tuple[Array, tuple[Array, ...]], None]:
        d_hidden, d_weights = carry
        i, is_wanted, *rest = xs
        operands = (jax.lax.dynamic_index_in_dim(hidden, i, axis=1, keepdims=False), *rest)
        dh, dw = jax.lax.cond(is_wanted, compute, skip, *operands) if settings.skips else compute(*operands)
        d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, dh, i, axis=1)
        return (d_hidden, jax.tree.map(jnp.add, d_weights, dw)), None

    start = jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, weights)
    parts = (targets, log_total, entropy, d_log_probs, d_entropy)
    xs = (jnp.arange(hidden.shape[1]), wanted, *(x.swapaxes(0, 1) for x in parts))
    (d_hidden, d_weights), _ = jax.lax.scan(body, start, xs)
    return d_hidden, None, None, None, d_weights


_chunks.defvjp(_forward_to_differentiate, _backward, symbolic_zeros=True)
