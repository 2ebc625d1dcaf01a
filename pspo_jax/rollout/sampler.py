"""Rollouts of groups inside one jit: prefill, then a token loop that runs until every row has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.state import Params, Prompts, Rollouts
from pspo_jax.distributed.mesh import (
    BY_SLICE,
    ROWS,
    WHOLE,
    cannot_index_split,
    constrain,
    num_slices,
    on_each_slice,
    size_along,
    split_axes,
)
from pspo_jax.model.interface import Model
from pspo_jax.rollout.continuous import decode_slots
from pspo_jax.rollout.stages import Stage, make_stages
from pspo_jax.rollout.token_loop import (
    DrawnTokens,
    RolloutShape,
    Samples,
    SamplingParams,
    draw_row_tokens,
    images_of,
    is_stop,
    no_samples,
    sampling_temperature,
)

SMALLEST_CACHE_TOKENS = 128
"""Smallest number of tokens for which a cache has room, unless completions are shorter."""


class SampleFn(Protocol):
    """A jitted sampler."""

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        key: Key[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""] | int = 0,
    ) -> Rollouts:
        """G completions of each prompt.

        Args:
          first_row: number of the batch's first row, for batches that are cut into several calls.
        """
        ...

    def lower(self, *args: object, **named: object) -> jax.stages.Lowered:
        """`jax.jit`'s `lower`."""
        ...


class Computed(NamedTuple):
    """The work of a rollout, that for rows which had already ended included."""

    tokens: Int[Array, ""]
    """Number of tokens that were computed."""
    columns: Float[Array, ""]
    """Number of columns of completions' caches that were read; a column is the keys and values of one token."""


class CountingSampleFn(Protocol):
    """A sampler that counts."""

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        key: Key[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""] | int = 0,
    ) -> tuple[Rollouts, Computed]:
        """Completions, and the work that they took."""
        ...


def make_sampler(
    model: Model,
    group_size: int,
    max_new_tokens: int,
    pad_id: int,
    slots: int | None = None,
    chunk: int = 1,
    stages: int = 1,
) -> SampleFn:
    """A jitted `sample(params, prompts, key, settings, first_row=0) -> Rollouts`.

    It compiles once per (B, P): prompt lengths inside the padding, temperature, top-p, top-k, stop ids and the length
    limit are traced. Row g of prompt b draws its t-th token with key fold_in(fold_in(key, first_row + b G + g), t).
    Therefore a row's tokens do not depend on the other rows, on how rows are spread over devices, or on how a batch is
    cut into calls. Stop tokens are part of the completions and of the mask.

    Args:
      slots: completions of T tokens for which there is memory; a slot whose row has ended takes the next row (see
        `continuous`). None = that of all rows, which are decoded at once.
      chunk: tokens that are drawn between two tests whether all rows have ended; see `tokens_per_test`.
      stages: stages of a rollout in slots; see `stages.make_stages`.
    """
    sample = counting_sampler(model, group_size, max_new_tokens, pad_id, slots, chunk, stages)
    return jax.jit(lambda *args, **named: sample(*args, **named)[0])


def counting_sampler(
    model: Model,
    group_size: int,
    max_new_tokens: int,
    pad_id: int,
    slots: int | None = None,
    chunk: int = 1,
    stages: int = 1,
) -> CountingSampleFn:
    """`make_sampler` without the jit, whose result includes the work that was done."""
    shape = RolloutShape(group_size, max_new_tokens, pad_id)

    def sample(
        params: Params,
        prompts: Prompts,
        key: Key[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""] | int = 0,
    ) -> tuple[Rollouts, Computed]:
        rows = prompts.tokens.shape[0] * group_size
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))
        slices = num_slices()
        args = params, prompts, row_keys, settings
        if slots is not None and slots < rows:
            shards, of_shard = shard_stages(slots, stages, max_new_tokens, rows)
            samples = decode_slots(model, *args, of_shard, shape)
            loops = [(shards * stage.slots, stage.columns) for stage in of_shard]
            computed = _computed(rows, loops, samples.steps)
        elif slices == 1:
            samples, computed = decode_all(*args)
        else:
            # A slice's loops end with its own rows, without a word to the others.
            specs = WHOLE, BY_SLICE, BY_SLICE, WHOLE
            samples, computed = on_each_slice(of_slice, in_specs=specs, out_specs=(BY_SLICE, WHOLE))(*args)
        return _rollouts(prompts, samples, settings), computed

    def decode_all(
        params: Params, prompts: Prompts, row_keys: Key[Array, "R"], settings: SamplingParams
    ) -> tuple[Samples, Computed]:
        samples = decode_rows(model, params, prompts, row_keys, settings, shape, chunk)
        rows, sizes = row_keys.shape[0], cache_sizes(max_new_tokens, chunk, model.resize is not None)
        return samples, _computed(rows, [(rows, size) for size in sizes], samples.steps)

    def of_slice(*args: PyTree) -> tuple[Samples, Computed]:
        samples, computed = decode_all(*args)
        return samples, jax.lax.psum(computed, "slice")

    return sample


def shard_stages(slots: int, stages: int, max_new_tokens: int, rows: int) -> tuple[int, list[Stage]]:
    """Number of devices that share the batch in the mesh in context, and the stages of each.

    Args:
      rows: completions of all devices; `slots` is for all devices too.
    Raises:
      ValueError: the mesh does not divide the slots, or the stages do not fit into their memory.
    """
    shards = size_along(split_axes(), ROWS)
    if slots % shards:
        raise ValueError(f"rollout.slots={slots}: must be a multiple of the {shards} devices that share the batch")
    return shards, make_stages(slots // shards, stages, max_new_tokens, rows // shards)


def _computed(rows: int, loops: list[tuple[int, int]], steps: Int[Array, "J"]) -> Computed:
    """The work of loops of so many slots with so many columns, after the first token of every row."""
    slots, columns = (jnp.asarray(x) for x in zip(*loops, strict=True))
    return Computed(rows + (slots * steps).sum(), (slots.astype(jnp.float32) * columns * steps).sum())


class TokenLoop(NamedTuple):
    """State of the token loop."""

    t: Int[Array, ""]
    """Position of `last` in its completion, from 0."""
    last: Int[Array, "B G"]
    """Id of the token that was drawn last and is not in the cache yet."""
    alive: Bool[Array, "B G"]
    """Whether another token may be drawn."""
    cache: PyTree
    """Keys and values of the completions, as the model keeps them."""
    samples: Samples
    """Completions so far."""


class RowDecoder(NamedTuple):
    """What stays the same while all rows decode."""

    row_keys: Key[Array, "B G"]
    settings: SamplingParams
    limit: Int[Array, ""]
    """Largest number of tokens of a completion."""
    pad_id: int
    step: Callable[[PyTree, Int[Array, "B G"], Int[Array, ""]], tuple[Float[Array, "B G V"], PyTree]]
    """(cache, last, t) -> (logits, cache); see `Model.decoder`."""


def decode_rows(
    model: Model,
    params: Params,
    prompts: Prompts,
    row_keys: Key[Array, "R"],
    settings: SamplingParams,
    shape: RolloutShape,
    chunk: int,
) -> Samples:
    """Completions [B, G] of all rows, R = B x G, decoded at once."""
    rows, longest = (prompts.tokens.shape[0], shape.group_size), shape.max_new_tokens
    logits, cache, step = model.decoder(
        params, prompts.tokens, prompts.lengths, shape.group_size, longest, *images_of(model, prompts)
    )
    limit = jnp.minimum(settings.max_new_tokens, longest)
    decoder = RowDecoder(row_keys.reshape(rows), settings, limit, shape.pad_id, step)
    # The last chunk may reach past the longest completion.
    room = 1 + -(-(longest - 1) // chunk) * chunk
    no_token = jnp.full(rows, shape.pad_id, jnp.int32)
    loop = TokenLoop(jnp.int32(0), no_token, jnp.ones(rows, bool), cache, no_samples(rows, room, shape.pad_id))
    logits = jnp.broadcast_to(logits[:, None], (*rows, logits.shape[-1]))
    if cannot_index_split():
        # Drawing a token indexes the vocabulary.
        logits = constrain(logits, "batch", None, None)
    loop = append(decoder, loop, logits, jnp.int32(0))
    steps = []
    for size in cache_sizes(longest, chunk, model.resize is not None):
        before = loop.t
        if model.resize:
            loop = loop._replace(cache=model.resize(loop.cache, size))
        loop = _decode_to(decoder, loop, size, chunk)
        steps.append(loop.t - before)
    samples = loop.samples
    return Samples(
        tokens=samples.tokens[..., :longest],
        log_probs=samples.log_probs[..., :longest],
        sampling_log_probs=samples.sampling_log_probs[..., :longest],
        lengths=samples.lengths,
        ended=~loop.alive,
        steps=jnp.stack(steps),
    )


def _decode_to(decoder: RowDecoder, loop: TokenLoop, size: int, chunk: int) -> TokenLoop:
    """The loop after all rows have ended or the cache, with room for `size` tokens, is full."""

    def unfinished(loop: TokenLoop) -> Bool[Array, ""]:
        # The cache does not hold the token that was drawn last.
        return (loop.t + 1 < jnp.minimum(decoder.limit, size + 1)) & loop.alive.any()

    def decode_chunk(loop: TokenLoop) -> TokenLoop:
        if chunk == 1:
            return decode_token(decoder, loop)
        after: TokenLoop = jax.lax.fori_loop(0, chunk, lambda _, loop: decode_token(decoder, loop), loop)
        return after

    return jax.lax.while_loop(unfinished, decode_chunk, loop)


def decode_token(decoder: RowDecoder, loop: TokenLoop) -> TokenLoop:
    """The loop after one decoding step: every live row has another token."""
    logits, cache = decoder.step(loop.cache, loop.last, loop.t)
    return append(decoder, loop._replace(cache=cache), constrain(logits, "batch", None, None), loop.t + 1)


def append(decoder: RowDecoder, loop: TokenLoop, logits: Float[Array, "B G V"], t: Int[Array, ""]) -> TokenLoop:
    """The loop after every live row got token t, drawn from `logits`."""
    drawn = draw_row_tokens(logits, decoder.row_keys, t, decoder.settings)
    live = loop.alive & (t < decoder.limit)
    drawn = DrawnTokens(
        jnp.where(live, drawn.token, decoder.pad_id),
        jnp.where(live, drawn.log_prob, 0),
        jnp.where(live, drawn.sampling_log_prob, 0),
    )
    samples = loop.samples
    return TokenLoop(
        t=t,
        last=drawn.token,
        alive=loop.alive & ~(live & is_stop(drawn.token, decoder.settings.stop_ids)),
        cache=loop.cache,
        samples=samples._replace(
            tokens=_put_column(samples.tokens, drawn.token, t),
            log_probs=_put_column(samples.log_probs, drawn.log_prob, t),
            sampling_log_probs=_put_column(samples.sampling_log_probs, drawn.sampling_log_prob, t),
            lengths=samples.lengths + live,
        ),
    )


def cache_sizes(max_new_tokens: int, chunk: int = 1, grows: bool = True) -> list[int]:
    """Sizes of the cache in tokens, one after the other, so that a token pays for the tokens so far and not for all.

    Each size has a loop of its own, which compiles anew; therefore there are few. All sizes but the last are whole
    chunks.

    Args:
      grows: whether the model can change the size of its cache.
    """
    parts = (max_new_tokens // part // chunk * chunk for part in (4, 2)) if grows else ()
    return [part for part in parts if part >= SMALLEST_CACHE_TOKENS] + [max_new_tokens]


def tokens_per_test(platform: str, max_new_tokens: int) -> int:
    """The sampler's `chunk` for a platform.

    A GPU's loop waits for the host at every test, except where the number of turns is known. Elsewhere a test costs
    nothing, and a chunk would only draw tokens for rows that have ended.
    """
    return max(1, min(32, max_new_tokens // 16)) if platform == "gpu" else 1


def _rollouts(prompts: Prompts, samples: Samples, settings: SamplingParams) -> Rollouts:
    return Rollouts(
        prompts=prompts,
        tokens=samples.tokens,
        mask=jnp.arange(samples.tokens.shape[-1]) < samples.lengths[..., None],
        log_probs=samples.log_probs,
        sampling_log_probs=samples.sampling_log_probs,
        lengths=samples.lengths,
        ended=samples.ended,
        temperature=sampling_temperature(settings.temperature),
    )


def _put_column(array: Array, column: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, column[..., None].astype(array.dtype), t, axis=2)
