"""Decoding: a token at a time, against a cache of keys and values.

The stacked layers are sliced once, before the token loop, and run unrolled: the loop then reads each weight in place
(slicing inside it was measured 1.7x slower in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pspo_jax.distributed.mesh import constrain, gather_for_decode
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.xla import attend_shared_prefix
from pspo_jax.model.block import embed, finish_block, forward, logits_of, norm, qkv
from pspo_jax.model.rotary import Rotation, rotation
from pspo_jax.model.weights import lora_table, merge_adapter, table


def group_decoder(
    a: Architecture,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    group_size: int,
    max_new_tokens: int,
) -> tuple[Float[Array, "B V"], Any, Callable[..., Any]]:
    """Prefill each prompt once; see Policy.decoder.

    The cache is a (k, v) pair of [B, G, K, T, h] per layer, and the next token's angles.
    """
    last, prefixes = _prefill(a, params, prompts, lengths)
    params, layers = _for_decoding(a, params)
    b = prompts.shape[0]
    shape = (b, group_size, a.kv_heads, max_new_tokens, a.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(a.compute_dtype))
    empty = constrain(empty, "batch", None, "kv_heads", None, None)
    positions = lengths[:, None] + jnp.arange(max_new_tokens)
    places = [rotation(positions, rotary) for rotary in a.rotaries]

    def at(t: Int[Array, ""] | int) -> list[Rotation]:
        return [(_column(sin, t), _column(cos, t)) for sin, cos in places]

    cache = [(empty, empty) for _ in range(a.layers)], at(0)

    def step(cache: Any, tokens: Int[Array, "B G"], t: Int[Array, ""]) -> tuple[Float[Array, "B G V"], Any]:
        x = _embedded(a, params, tokens)
        held, here = cache
        new_cache = []
        for i, (w, (prefix_k, prefix_v), (keys, values)) in enumerate(zip(layers, prefixes, held, strict=True)):
            q, k, v = qkv(a, w, x, here[a.layer_rotary[i]])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k[:, :, :, None], t, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(values, v[:, :, :, None], t, axis=3)
            mixed = attend_shared_prefix(
                q, prefix_k, prefix_v, lengths, keys, values, t, a.attention_scale, a.windows[i]
            )
            x = finish_block(a, w, x, mixed, split=a.split_decode)
            new_cache.append((keys, values))
        # The next token's angles are carried: looked up where they are used, they would be so number by number inside
        # every layer's loops, several times as slow on CPU.
        return _head(a, params, norm(a, params, "final_norm", x)), (new_cache, at(t + 1))

    return _head(a, params, last[:, None])[:, 0], cache, step


def resize(cache: Any, places: int) -> Any:
    """`group_decoder`'s cache with another T."""

    def one(x: Float[Array, "B G K T h"]) -> Float[Array, "B G K places h"]:
        more = max(0, places - x.shape[3])
        grown = jnp.pad(x[:, :, :, :places], [(0, 0)] * 3 + [(0, more), (0, 0)])
        return constrain(grown, "batch", None, "kv_heads", None, None)

    held, here = cache
    return [(one(k), one(v)) for k, v in held], here


def _column(x: Float[Array, "B T c"], t: Int[Array, ""] | int) -> Float[Array, "B 1 c"]:
    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)


def slot_decoder(
    a: Architecture,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    slots: tuple[int, int],
    max_new_tokens: int,
) -> tuple[Float[Array, "B V"], Any, Any, Callable[..., Any], Callable[..., Any]]:
    """See Policy.slots.

    Taken are each slot's prompt length, and per layer its prompt's keys and values [S, K, P, h]. The cache has its own
    keys and values [S, K, T, h] per layer, a ring over the steps.
    """
    last, prefixes = _prefill(a, params, prompts, lengths)
    params, layers = _for_decoding(a, params)
    n, s = slots
    shape = (n * s, a.kv_heads, max_new_tokens, a.head_dim)
    own = constrain(jnp.zeros(shape, jnp.dtype(a.compute_dtype)), "batch", "kv_heads", None, None)
    of_prompt = jnp.zeros((n * s, *prefixes[0][0].shape[1:]), own.dtype)
    of_prompt = constrain(of_prompt, "batch", "kv_heads", None, None)
    taken = jnp.ones(n * s, lengths.dtype), [(of_prompt, of_prompt) for _ in range(a.layers)]
    cache = [(own, own) for _ in range(a.layers)]

    def fill(taken: Any, prompt: Int[Array, "n s"], fresh: Bool[Array, "n s"]) -> Any:
        def take(new: Array, old: Array) -> Array:
            """Each part's slots take from its own prompts: nothing crosses devices."""
            found = jax.vmap(lambda x, i: x[i])(new.reshape(n, -1, *new.shape[1:]), prompt).reshape(old.shape)
            return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), found, old)

        return jax.tree.map(take, (lengths, prefixes), taken)

    def step(
        taken: Any, cache: Any, tokens: Int[Array, "n s"], t: Int[Array, "n s"], steps: Int[Array, ""]
    ) -> tuple[Float[Array, "n s V"], Any]:
        before, of_prompts = taken
        x, t = _embedded(a, params, tokens.reshape(-1, 1)), t.reshape(-1)
        at = [rotation((before + t)[:, None], rotary) for rotary in a.rotaries]
        column = steps % max_new_tokens
        age = (column - jnp.arange(max_new_tokens)) % max_new_tokens
        ages = jnp.where(age <= t[:, None], age, -1)
        new_cache = []
        for i, (w, (prefix_k, prefix_v), (keys, values)) in enumerate(zip(layers, of_prompts, cache, strict=True)):
            q, k, v = qkv(a, w, x, at[a.layer_rotary[i]])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), column, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), column, axis=2)
            mixed = attend_shared_prefix(
                q,
                prefix_k,
                prefix_v,
                before,
                keys[:, None],
                values[:, None],
                t,
                a.attention_scale,
                a.windows[i],
                ages,
            )
            x = finish_block(a, w, x, mixed, split=a.split_decode)
            new_cache.append((keys, values))
        logits = _head(a, params, norm(a, params, "final_norm", x))
        return logits.reshape(n, s, -1), new_cache

    return _head(a, params, last[:, None])[:, 0], taken, cache, fill, step


def _prefill(
    a: Architecture, params: Any, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B D"], list[tuple[Array, Array]]]:
    """The hidden state after each prompt, and every layer's keys and values [B, K, P, h]."""
    hidden, cache = forward(a, params, None, prompts, keep_cache=True)
    assert cache is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    k, v = cache
    return last, [(jnp.swapaxes(k[i], 1, 2), jnp.swapaxes(v[i], 1, 2)) for i in range(a.layers)]


def _embedded(a: Architecture, params: Any, tokens: Int[Array, "B s"]) -> Float[Array, "B s D"]:
    tokens = constrain(tokens, "outer_batch", None) if a.split_decode else tokens
    return constrain(embed(a, params["embed"], tokens), "batch", None, None)


def _head(a: Architecture, params: Any, x: Float[Array, "B s D"]) -> Float[Array, "B s V"]:
    if not a.split_decode:
        return logits_of(a, params, x)
    logits = logits_of(a, params, constrain(x, "outer_batch", None, None))
    return constrain(logits, "outer_batch", None, "split_vocab")


def _for_decoding(a: Architecture, params: Any) -> tuple[Any, list[dict[str, Array]]]:
    """Weights sliced into layers, cast and gathered once, before the token loop: (those outside blocks, each block's).

    Norm scales keep their type, as in training.
    """
    adapted = a.lora is not None and any("_lora_" in name for name in params["layers"])
    weights = merge_adapter(table(a), lora_table(a)) if adapted else table(a)
    dtype = jnp.dtype(a.compute_dtype)

    def ready(name: str, w: Array, axes: tuple[str | None, ...]) -> Array:
        return gather_for_decode(w if "norm" in name else w.astype(dtype), axes, a.split_decode)

    outside = {name: ready(name, w, weights[name].axes) for name, w in params.items() if name != "layers"}
    blocks = [
        {name: ready(name, w[i], weights["layers"][name].axes[1:]) for name, w in params["layers"].items()}
        for i in range(a.layers)
    ]
    return outside, blocks
