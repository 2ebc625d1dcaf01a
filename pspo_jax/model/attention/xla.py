"""Attention: causal over compact rows (training, prefill), and one token against a shared prompt and its suffix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.model.attention.kernels import run_kernel
from pspo_jax.model.interface import MASKED, Packed

BLOCKS = 8
"""Parts that the queries of long rows are computed in."""
BLOCKWISE_FROM_TOKENS = 1024
"""Places from which on they are."""
_MANY_KEYS = 512


def attend(
    q: Float[Array, "R S H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    scale: float,
    window: Int[Array, ""] | None = None,
    packed: Packed | None = None,
    kernel: str = "xla",
) -> Float[Array, "R S H h"]:
    """Causal grouped-query attention with a float32 softmax.

    Queries of long rows are taken in blocks, which are computed again in the backward pass: scores of one block at a
    time. A block sees the keys up to its end, half the work of the whole square; where a mesh splits the places, each
    device takes a part of its own, against all keys.

    Args:
      scale: multiplies q k.
      window: each query sees this many tokens, itself included; None = all before it.
      packed: the rows that stand in one; None = there is one.
      kernel: one of `kernels.KERNELS`, which take no window, context axis or shared prompt; or XLA, as described.
    """
    if kernel != "xla":
        assert window is None and (packed is None or packed.leader is None)
        return run_kernel(kernel, q, k, v, scale, None if packed is None else packed.rows)
    s = q.shape[1]
    context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    size = block_size(s, context)
    if size == s:
        return _attend_block(q, k, v, packed, packed, window, jnp.arange(s), scale)
    block = jax.checkpoint(_attend_block, static_argnums=7)
    if context == 1:
        found = []
        for start in range(0, s, size):
            end = min(start + size, s)
            own, seen = (jax.tree.map(lambda x, b=b, e=end: x[:, b:e], packed) for b in (start, 0))
            places = jnp.arange(start, end)
            found.append(block(q[:, start:end], k[:, :end], v[:, :end], own, seen, window, places, scale))
        return jnp.concatenate(found, axis=1)

    def part(x: Any, i: int, axis: int = 1) -> Any:
        """Part i of every device's places."""

        def one(x: Array) -> Array:
            split = x.reshape(*x.shape[:axis], context, s // size, -1, *x.shape[axis + 1 :])
            return jnp.take(split, i, axis=axis + 1).reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])

        return jax.tree.map(one, x)

    found = [
        block(part(q, i), k, v, part(packed, i), packed, window, part(jnp.arange(s), i, axis=0), scale)
        for i in range(s // size)
    ]
    stacked = jnp.stack([x.reshape(x.shape[0], context, -1, *x.shape[2:]) for x in found], axis=2)
    return stacked.reshape(q.shape)


def block_size(places: int, context: int) -> int:
    """Queries that are computed at a time, of all devices along context."""
    if places < BLOCKWISE_FROM_TOKENS or (context > 1 and places % (BLOCKS * context)):
        return places
    return -(-places // BLOCKS)


def _attend_block(
    q: Float[Array, "R s H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    own: Packed | None,
    packed: Packed | None,
    window: Int[Array, ""] | None,
    places: Int[Array, "s"],
    scale: float,
) -> Float[Array, "R s H h"]:
    """Queries at some places against keys from place 0 on; `own` = what `packed` says of the queries."""
    r, s, heads, h = q.shape
    kv, m = k.shape[2], heads // k.shape[2]
    # The query heads of one kv head become rows of one matrix product; places are the outer index, so that a mesh that
    # splits them splits the rows.
    q = q.reshape(r, s, kv, m, h).swapaxes(1, 2).reshape(r, kv, s * m, h)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("rkqh,rkth->rkqt", q, k, preferred_element_type=jnp.float32) * scale
    before = places[:, None] - jnp.arange(k.shape[2])
    seen = before >= 0
    if own is not None and packed is not None:
        same = own.rows[:, :, None] == packed.rows[:, None]
        if own.leader is not None and packed.prompt is not None:
            same |= own.leader[:, :, None] == packed.prompt[:, None]
        seen = seen & same
        before = own.places[:, :, None] - packed.places[:, None]
    if window is not None:
        seen &= before < window
    seen = jnp.repeat(seen, m, axis=-2)
    seen = seen if packed is None else seen[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("rkqt,rkth->rkqh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(r, kv, s, m, h).swapaxes(1, 2).reshape(r, s, heads, h).astype(v.dtype)


def attend_shared_prefix(
    q: Float[Array, "B G H h"],
    prefix_k: Float[Array, "B K P h"],
    prefix_v: Float[Array, "B K P h"],
    lengths: Int[Array, "B"],
    suffix_k: Float[Array, "B G K T h"],
    suffix_v: Float[Array, "B G K T h"],
    t: Int[Array, ""] | Int[Array, "B"],
    scale: float,
    window: int | None = None,
    ages: Int[Array, "B T"] | None = None,
) -> Float[Array, "B G H h"]:
    """Attention of one new token per row: over its prompt, held once for the group, and its own tokens 0..t.

    The two parts are normalised together by one maximum and one sum, which is exact. The prompt part is a matrix
    product with the group's rows, where separate caches would be G matrix-vector products. `scale` and `window` are
    those of `attend`. `ages` says how many tokens before the newest each column of the suffix is, -1 = it holds none;
    None = columns are places.
    """
    b, g, heads, h = q.shape
    kv = prefix_k.shape[1]
    m = heads // kv
    dtype = prefix_v.dtype
    q = q.reshape(b, g, kv, m, h)
    # The group's rows and the query heads of one kv head are the rows of one product with the prompt: [B, K, G M, h].
    rows = q.swapaxes(1, 2).reshape(b, kv, g * m, h)
    in_prompt = jnp.einsum("bkrh,bkph->bkrp", rows, prefix_k, preferred_element_type=jnp.float32) * scale
    in_suffix = _own_scores(q, suffix_k) * scale
    place = jnp.arange(prefix_k.shape[2])
    ages = (t - jnp.arange(suffix_k.shape[3]))[None] if ages is None else ages
    real, drawn = place < lengths[:, None], ages >= 0
    if window is not None:
        real &= (lengths + t)[:, None] - place < window
        drawn &= ages < window
    in_prompt = jnp.where(real[:, None, None], in_prompt, MASKED)
    in_suffix = jnp.where(drawn[:, None, None, None], in_suffix, MASKED)

    def by_group(x: Array) -> Array:
        """[B, K, G M, c] -> [B, G, K, M, c]."""
        return x.reshape(b, kv, g, m, -1).swapaxes(1, 2)

    def by_prompt(x: Array) -> Array:
        """The inverse of by_group."""
        return x.swapaxes(1, 2).reshape(b, kv, g * m, -1)

    top = jnp.maximum(by_group(in_prompt.max(axis=-1, keepdims=True)), in_suffix.max(axis=-1, keepdims=True))
    in_prompt, in_suffix = jnp.exp(in_prompt - by_prompt(top)), jnp.exp(in_suffix - top)
    total = by_group(in_prompt.sum(axis=-1, keepdims=True)) + in_suffix.sum(axis=-1, keepdims=True)
    of_prompt = jnp.einsum("bkrp,bkph->bkrh", in_prompt.astype(dtype), prefix_v, preferred_element_type=jnp.float32)
    of_suffix = jnp.einsum("bgkmt,bgkth->bgkmh", in_suffix.astype(dtype), suffix_v, preferred_element_type=jnp.float32)
    return ((by_group(of_prompt) + of_suffix) / total).reshape(b, g, heads, h).astype(dtype)


def _own_scores(q: Float[Array, "B G K m h"], k: Float[Array, "B G K T h"]) -> Float[Array, "B G K m T"]:
    """Products of each row's queries with its own keys.

    Keys come first where the CPU's products are several times faster so: 2.9 for 256 keys in float32, 8 for 1,024; in
    bfloat16 with many keys alone.
    """
    if k.dtype == jnp.float32 or k.shape[3] >= _MANY_KEYS:
        return jnp.einsum("bgkth,bgkmh->bgktm", k, q, preferred_element_type=jnp.float32).swapaxes(-1, -2)
    return jnp.einsum("bgkmh,bgkth->bgkmt", q, k, preferred_element_type=jnp.float32)
