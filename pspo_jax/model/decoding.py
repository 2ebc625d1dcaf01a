"""Decoding: a token at a time, against a cache of keys and values.

The stacked layers are sliced once, before the token loop, and run unrolled: the loop then reads each weight in place
(slicing inside it was measured 1.7x slower in bfloat16).

A prompt's keys and values are held once and shared by its completions; a completion's own are in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.distributed.mesh import ROWS, constrain, gather_for_decode, microbatch_size
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.decode import PART_KERNELS, attend_by_parts
from pspo_jax.model.attention.xla import Prefix, Suffix, attend_shared_prefix
from pspo_jax.model.block import BlockWeights, embed, finish_block, forward, logits_of, norm, qkv
from pspo_jax.model.interface import Begun, Decoder, SlotDecoder
from pspo_jax.model.rotary import Rotation, rotation
from pspo_jax.model.vision import encode_images, image_tokens
from pspo_jax.model.weights import lora_table, merge, table

FEWEST_ROWS_READ = 8
"""Smallest number of begun completions that are read at a time, since products of fewer rows are slow."""
_Tree = TypeVar("_Tree")

KeysValues = tuple[Array, Array]
"""Keys and values of one layer."""

Rotations = list[Rotation]
"""The angles of the next token, for each of the architecture's rotary embeddings."""

GroupCache = tuple[list[KeysValues], Rotations]
"""For each layer, keys and values [B, G, K, T, h] of the completions; and the angles of the next token.

The angles are carried because XLA, where they were looked up at their use, did so number by number inside the loops of
every layer, which was several times as slow on CPU.
"""


class PromptCache(NamedTuple):
    """Prompts that have been read."""

    lengths: Int[Array, "B"]
    """Tokens of each prompt."""
    delta: Int[Array, "B"] | None
    """`Images.delta` of each prompt; None = no prompt has images."""
    layers: list[KeysValues]
    """For each layer, keys and values [B, K, P, h]."""


class SlotCache(NamedTuple):
    """The rows of S slots."""

    prompts: PromptCache
    """The prompt of each slot's row."""
    completions: list[KeysValues]
    """For each layer, keys and values [S, K, T, h]; column t holds token t of the slot's row."""


def group_decoder(
    a: Architecture,
    params: PyTree,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    group_size: int,
    max_new_tokens: int,
    images: Images | None = None,
    begun: Begun | None = None,
) -> Decoder:
    """The built-in model's `DecoderFn` and, with `begun`, its `ResumeFn`; its cache is a `GroupCache`."""
    last, prefixes = _prefill(a, params, prompts, lengths, images)
    b = prompts.shape[0]
    shape = (b, group_size, a.kv_heads, max_new_tokens, a.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(a.compute_dtype))
    empty = constrain(empty, "batch", None, "kv_heads", None, None)
    cache = [(empty, empty)] * a.layers
    if begun is not None and begun.tokens.shape[2]:
        cache = _read_begun(a, params, prompts, lengths, begun, cache)
    params, layers = _for_decoding(a, params)
    first = lengths if images is None else lengths + images.delta
    positions = first[:, None] + jnp.arange(max_new_tokens)
    tables = [rotation(positions, rotary) for rotary in a.rotaries]

    def rotations_at(t: Int[Array, "*B"] | int) -> Rotations:
        return [(_column(sin, t), _column(cos, t)) for sin, cos in tables]

    def step(
        cache: GroupCache, tokens: Int[Array, "B G"], t: Int[Array, "*B"]
    ) -> tuple[Float[Array, "B G V"], GroupCache]:
        layer_caches, rotations = cache

        def write(held: Float[Array, "B G K T h"], new: Float[Array, "B G K h"]) -> Float[Array, "B G K T h"]:
            if t.ndim:
                return held.at[jnp.arange(b), :, :, t].set(new, mode="drop")
            return jax.lax.dynamic_update_slice_in_dim(held, new[:, :, :, None], t, axis=3)

        def attend(i: int, q: Float[Array, "B G H h"], keys: Array, values: Array) -> Float[Array, "B G H h"]:
            prefix, suffix = Prefix(*prefixes[i], lengths), Suffix(keys, values, t)
            return _attend(a, i, q, prefix, suffix)

        logits, layer_caches = _decode_token(a, params, layers, tokens, rotations, layer_caches, write, attend)
        return logits, (layer_caches, rotations_at(t + 1))

    return Decoder(
        _head(a, params, last[:, None])[:, 0], (cache, rotations_at(0 if begun is None else _resumed_at(begun))), step
    )


def resize(cache: GroupCache, max_new_tokens: int) -> GroupCache:
    """`group_decoder`'s cache with another T."""

    def one(x: Float[Array, "B G K T h"]) -> Float[Array, "B G K t h"]:
        more = max(0, max_new_tokens - x.shape[3])
        grown = jnp.pad(x[:, :, :, :max_new_tokens], [(0, 0)] * 3 + [(0, more), (0, 0)])
        return constrain(grown, "batch", None, "kv_heads", None, None)

    layer_caches, rotations = cache
    return [(one(k), one(v)) for k, v in layer_caches], rotations


def _resumed_at(begun: Begun) -> Int[Array, "B"]:
    """Index of the token that each prompt's completions are continued with: the last one that they have, or 0."""
    return jnp.maximum(begun.lengths.max(axis=1) - 1, 0)


def _read_begun(
    a: Architecture,
    params: PyTree,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    begun: Begun,
    cache: list[KeysValues],
) -> list[KeysValues]:
    """The cache with the keys and values of the tokens that completions have, some rows at a time.

    A row is read with its own prompt in front of it. Rows that have no token to read cost nothing.
    """
    b, g, width = begun.tokens.shape
    tokens, drawn = begun.tokens.reshape(b * g, width), begun.lengths.reshape(-1)
    at_a_time = microbatch_size(b * g, max(b * g // 8, FEWEST_ROWS_READ), ROWS)
    wanted = jnp.nonzero(drawn > 0, size=b * g, fill_value=b * g)[0]

    def read_some(state: tuple[Int[Array, ""], list[KeysValues]]) -> tuple[Int[Array, ""], list[KeysValues]]:
        i, cache = state
        ids = jax.lax.dynamic_slice_in_dim(wanted, i * at_a_time, at_a_time)
        row = jnp.minimum(ids, b * g - 1)
        of_prompt = lengths[row // g]
        whole = jnp.concatenate([prompts[row // g], jnp.zeros((at_a_time, width), prompts.dtype)], axis=1)
        places = of_prompt[:, None] + jnp.arange(width)
        whole = whole.at[jnp.arange(at_a_time)[:, None], places].set(tokens[row])
        _, found = forward(a, params, None, whole, keep_cache=True)
        assert found is not None
        index = places[None, :, :, None, None]
        new = [jnp.swapaxes(jnp.take_along_axis(x, index, axis=2), 2, 3) for x in found]

        def put(held: Float[Array, "B G K T h"], new: Float[Array, "r K W h"]) -> Float[Array, "B G K T h"]:
            flat = held.reshape(b * g, *held.shape[2:]).at[ids, :, :width].set(new, mode="drop")
            return constrain(flat.reshape(held.shape), "batch", None, "kv_heads", None, None)

        return i + 1, [(put(k, new[0][layer]), put(v, new[1][layer])) for layer, (k, v) in enumerate(cache)]

    def rows_left(state: tuple[Int[Array, ""], list[KeysValues]]) -> Bool[Array, ""]:
        return state[0] * at_a_time < (drawn > 0).sum()

    filled: list[KeysValues] = jax.lax.while_loop(rows_left, read_some, (jnp.int32(0), cache))[1]
    return filled


def _column(x: Float[Array, "B T c"], t: Int[Array, "*B"] | int) -> Float[Array, "B 1 c"]:
    if jnp.ndim(t):
        return jnp.take_along_axis(x, jnp.asarray(t)[:, None, None], axis=1, mode="clip")
    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)


def slot_decoder(
    a: Architecture,
    params: PyTree,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    shards: int,
    images: Images | None = None,
) -> SlotDecoder:
    """The built-in model's `SlotDecoderFn`; its cache is a `SlotCache`, and that of waiting rows its completions."""
    last, layers_read = _prefill(a, params, prompts, lengths, images)
    params, layers = _for_decoding(a, params)
    read = PromptCache(lengths, None if images is None else images.delta, layers_read)
    dtype = jnp.dtype(a.compute_dtype)

    def empty_rows(rows: int, columns: int) -> Float[Array, "S K T h"]:
        zeros = jnp.zeros((shards * rows, a.kv_heads, columns, a.head_dim), dtype)
        return constrain(zeros, "batch", "kv_heads", None, None)

    def waiting(rows: int, columns: int) -> list[KeysValues]:
        return [(empty_rows(rows, columns), empty_rows(rows, columns)) for _ in range(a.layers)]

    def slots(rows: int, columns: int) -> SlotCache:
        of_prompts = PromptCache(
            jnp.ones(shards * rows, lengths.dtype),
            None if read.delta is None else jnp.zeros(shards * rows, read.delta.dtype),
            waiting(rows, prompts.shape[1]),
        )
        return SlotCache(of_prompts, waiting(rows, columns))

    def load(
        cache: SlotCache,
        slot: Int[Array, "n"],
        prompt: Int[Array, "n"],
        waiting: list[KeysValues] | None,
        place: Int[Array, "n"],
    ) -> SlotCache:
        completions = cache.completions if waiting is None else _copy_row(cache.completions, slot, waiting, place)
        return SlotCache(_copy_row(cache.prompts, slot, read, prompt), completions)

    def save(
        waiting: list[KeysValues], place: Int[Array, "n"], cache: SlotCache, slot: Int[Array, "n"]
    ) -> list[KeysValues]:
        return _copy_row(waiting, place, cache.completions, slot)

    step = functools.partial(_slot_step, a, params, layers)
    return SlotDecoder(_head(a, params, last[:, None])[:, 0], slots, waiting, load, save, step)


def _copy_row(into: _Tree, at: Int[Array, "n"], source: PyTree, of: Int[Array, "n"]) -> _Tree:
    """`into` with one row of `source` in each shard copied to one of its own; the shards are parts of the rows.

    Args:
      at: index of the row that is replaced, within the shard; one that is out of bounds = none.
      of: index of the row that is copied, within the shard. It may be narrower than the one that it replaces.
    """

    def of_shard(into: Array, source: Array, at: Array, of: Array) -> Array:
        row = source[of]
        return into.at[(at, *(slice(0, size) for size in row.shape))].set(row, mode="drop")

    def one(into: Array, source: Array) -> Array:
        targets, sources = (x.reshape(at.shape[0], -1, *x.shape[1:]) for x in (into, source))
        return jax.vmap(of_shard)(targets, sources, at, of).reshape(into.shape)

    return jax.tree.map(one, into, source)


def _slot_step(
    a: Architecture,
    params: PyTree,
    layers: Sequence[BlockWeights],
    cache: SlotCache,
    tokens: Int[Array, "n s"],
    t: Int[Array, "n s"],
) -> tuple[Float[Array, "n s V"], SlotCache]:
    """One token of every slot; see SlotStep."""
    lengths, delta, prefixes = cache.prompts
    flat_t = t.reshape(-1)
    position = lengths + flat_t if delta is None else lengths + flat_t + delta
    rotations = [rotation(position[:, None], rotary) for rotary in a.rotaries]

    def write(held: Float[Array, "S K T h"], new: Float[Array, "S 1 K h"]) -> Float[Array, "S K T h"]:
        def of_slot(held: Float[Array, "K T h"], new: Float[Array, "K h"], t: Int[Array, ""]) -> Float[Array, "K T h"]:
            return held.at[:, t].set(new, mode="drop")

        return jax.vmap(of_slot)(held, new[:, 0], flat_t)

    def attend(i: int, q: Float[Array, "S 1 H h"], keys: Array, values: Array) -> Float[Array, "S 1 H h"]:
        prefix, suffix = Prefix(*prefixes[i], lengths), Suffix(keys[:, None], values[:, None], flat_t)
        return _attend(a, i, q, prefix, suffix)

    copies = 2 if tokens.shape[1] == 1 else 1
    logits, completions = _decode_token(
        a, params, layers, tokens.reshape(-1, 1), rotations, cache.completions, write, attend, copies
    )
    return logits.reshape(*tokens.shape, -1), SlotCache(cache.prompts, completions)


def _attend(a: Architecture, layer: int, q: Float[Array, "B G H h"], prefix: Prefix, suffix: Suffix) -> Array:
    """Attention of the newest tokens in a layer, as model.decode_attention says: [B, G, H, h]."""
    if a.decode_attention != "xla":
        return attend_by_parts(PART_KERNELS[a.decode_attention], q, prefix, suffix, a.attention_scale)
    return attend_shared_prefix(q, prefix, suffix, a.attention_scale, a.windows[layer])


def _decode_token(
    a: Architecture,
    params: PyTree,
    layers: Sequence[BlockWeights],
    tokens: Int[Array, "B s"],
    rotations: Rotations,
    cache: list[KeysValues],
    write: Callable[[Array, Array], Array],
    attend: Callable[[int, Array, Array, Array], Array],
    copies: int = 1,
) -> tuple[Float[Array, "B s V"], list[KeysValues]]:
    """The tokens through all blocks and the head: logits, and the cache with their keys and values.

    Args:
      write: `write(held, new)` puts new keys or values into those of a layer's cache.
      attend: `attend(layer, q, keys, values)` mixes the values of the prompt and of the layer's cache.
      copies: number of equal copies of each row in the products with weights. A product of one row is another
        algorithm than that of several, whose sums differ in the last bit.
    """
    s = tokens.shape[1]
    x = _embedded(a, params, jnp.repeat(tokens, copies, axis=1))
    new_cache = []
    for i, (w, (keys, values)) in enumerate(zip(layers, cache, strict=True)):
        q, k, v = (y[:, :s] for y in qkv(a, w, x, rotations[a.layer_rotary[i]]))
        keys, values = write(keys, k), write(values, v)
        mixed = jnp.repeat(attend(i, q, keys, values), copies, axis=1)
        x = finish_block(a, w, x, mixed, split=a.split_decode)
        new_cache.append((keys, values))
    return _head(a, params, norm(a, params, "final_norm", x))[:, :s], new_cache


def _prefill(
    a: Architecture, params: PyTree, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], images: Images | None
) -> tuple[Float[Array, "B D"], list[KeysValues]]:
    """The hidden state after each prompt, and every layer's keys and values [B, K, P, h]."""
    seen = None if images is None else image_tokens(encode_images(a, params, images), images)
    hidden, cache = forward(a, params, None, prompts, keep_cache=True, images=seen)
    assert cache is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    k, v = cache
    return last, [(jnp.swapaxes(k[i], 1, 2), jnp.swapaxes(v[i], 1, 2)) for i in range(a.layers)]


def _embedded(a: Architecture, params: PyTree, tokens: Int[Array, "B s"]) -> Float[Array, "B s D"]:
    tokens = constrain(tokens, "outer_batch", None) if a.split_decode else tokens
    return constrain(embed(a, params["embed"], tokens), "batch", None, None)


def _head(a: Architecture, params: PyTree, x: Float[Array, "B s D"]) -> Float[Array, "B s V"]:
    if not a.split_decode:
        return logits_of(a, params, x)
    logits = logits_of(a, params, constrain(x, "outer_batch", None, None))
    return constrain(logits, "outer_batch", None, "split_vocab")


def _for_decoding(a: Architecture, params: PyTree) -> tuple[dict[str, Array], list[BlockWeights]]:
    """The weights outside the blocks, and those of each block, cast and gathered once, before the token loop.

    The vision tower is not among them, since decoding does not run it.

    Norm scales keep their type, as in training.
    """
    adapted = a.lora is not None and any("_lora_" in name for name in params["layers"])
    weights = merge(table(a), lora_table(a)) if adapted else table(a)
    dtype = jnp.dtype(a.compute_dtype)

    def ready(name: str, w: Array, axes: tuple[str | None, ...]) -> Array:
        return gather_for_decode(w if "norm" in name else w.astype(dtype), axes, a.split_decode)

    inside = ("layers", "vision")
    outside = {name: ready(name, w, weights[name].axes) for name, w in params.items() if name not in inside}
    blocks = [
        {name: ready(name, w[i], weights["layers"][name].axes[1:]) for name, w in params["layers"].items()}
        for i in range(a.layers)
    ]
    return outside, blocks
