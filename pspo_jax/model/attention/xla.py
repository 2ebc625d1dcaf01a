"""Attention: causal over compact rows (training, prefill), and one token against a shared prompt and its suffix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pspo_jax.model.attention.kernels import run_kernel
from pspo_jax.model.interface import MASKED, Packed

QUERY_BLOCKS = 8
"""Number of blocks in which the queries of long rows are computed, one after another."""
BLOCKWISE_FROM_TOKENS = 1024
"""Length of a row, in tokens, from which queries are computed in blocks."""
_KEYS_FIRST_FROM_KEYS = 512
"""Number of keys from which a bfloat16 product has the keys as its first operand; see `_suffix_scores`."""


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

    Long rows are computed in blocks of queries, and the backward pass computes each block again, so that only the
    scores of one block exist at a time. A block sees the keys up to its end, which halves the work of the whole square.
    Where a mesh splits the positions along `context`, every device computes its own part of each block, against all
    keys.

    Args:
      scale: factor of the products of queries and keys.
      window: number of tokens that each query sees, itself included; None = all before it.
      packed: the layout of several rows in one; None = each row stands alone.
      kernel: "xla", which is described here, or one of `kernels.KERNELS`, which support no window, no context axis
        and no shared prompt.
    """
    if kernel != "xla":
        assert window is None and (packed is None or packed.prompt_row is None)
        return run_kernel(kernel, q, k, v, scale, None if packed is None else packed.row_of)
    s = q.shape[1]
    context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    size = block_size(s, context)
    if size == s:
        return _attend_block(q, k, v, packed, packed, window, jnp.arange(s), scale)
    if context > 1:
        return _attend_along_context(q, k, v, packed, window, scale, size, context)
    block = jax.checkpoint(_attend_block, static_argnums=7)
    found = []
    for start in range(0, s, size):
        end = min(start + size, s)
        of_queries, of_keys = (jax.tree.map(lambda x, b=b, e=end: x[:, b:e], packed) for b in (start, 0))
        index = jnp.arange(start, end)
        found.append(block(q[:, start:end], k[:, :end], v[:, :end], of_queries, of_keys, window, index, scale))
    return jnp.concatenate(found, axis=1)


def _attend_along_context(
    q: Float[Array, "R S H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    packed: Packed | None,
    window: Int[Array, ""] | None,
    scale: float,
    size: int,
    context: int,
) -> Float[Array, "R S H h"]:
    """`attend` in blocks where positions are split over `context` devices.

    Block i holds part i of every device's positions, so that all devices work on each block.
    """
    s = q.shape[1]
    block = jax.checkpoint(_attend_block, static_argnums=7)

    def part(tree: PyTree, i: int, axis: int = 1) -> PyTree:
        """Part i of every device's positions."""

        def one(x: Array) -> Array:
            split = x.reshape(*x.shape[:axis], context, s // size, -1, *x.shape[axis + 1 :])
            return jnp.take(split, i, axis=axis + 1).reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])

        return jax.tree.map(one, tree)

    found = [
        block(part(q, i), k, v, part(packed, i), packed, window, part(jnp.arange(s), i, axis=0), scale)
        for i in range(s // size)
    ]
    stacked = jnp.stack([x.reshape(x.shape[0], context, -1, *x.shape[2:]) for x in found], axis=2)
    return stacked.reshape(q.shape)


def block_size(length: int, context: int) -> int:
    """Number of queries that are computed at a time, summed over the devices along context.

    Args:
      length: tokens of a row.
      context: devices along the mesh's context axis.
    """
    if length < BLOCKWISE_FROM_TOKENS or (context > 1 and length % (QUERY_BLOCKS * context)):
        return length
    return -(-length // QUERY_BLOCKS)


def _attend_block(
    q: Float[Array, "R s H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    of_queries: Packed | None,
    of_keys: Packed | None,
    window: Int[Array, ""] | None,
    index: Int[Array, "s"],
    scale: float,
) -> Float[Array, "R s H h"]:
    """Some queries of each row against its first S keys.

    Args:
      of_queries: the layout of the packed rows at the queries; None = rows stand alone.
      of_keys: the same at the keys.
      index: index of each query in its row.
    """
    r, s, heads, h = q.shape
    kv, m = k.shape[2], heads // k.shape[2]
    # The query heads of one kv head become rows of one matrix product. Positions are the outer index, so that a mesh
    # that splits positions splits the rows of the product.
    q = q.reshape(r, s, kv, m, h).swapaxes(1, 2).reshape(r, kv, s * m, h)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("rkqh,rkth->rkqt", q, k, preferred_element_type=jnp.float32) * scale
    visible = _visible(of_queries, of_keys, window, index, k.shape[2])
    visible = jnp.repeat(visible, m, axis=-2)
    visible = visible if of_keys is None else visible[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("rkqt,rkth->rkqh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(r, kv, s, m, h).swapaxes(1, 2).reshape(r, s, heads, h).astype(v.dtype)


def _visible(
    of_queries: Packed | None, of_keys: Packed | None, window: Int[Array, ""] | None, index: Int[Array, "s"], keys: int
) -> Bool[Array, "s S"] | Bool[Array, "R s S"]:
    """Which keys each query sees: keys before it, of its own row or its row's prompt, and within the window."""
    distance = index[:, None] - jnp.arange(keys)
    visible = distance >= 0
    if of_queries is not None and of_keys is not None:
        same = of_queries.row_of[:, :, None] == of_keys.row_of[:, None]
        if of_queries.prompt_row is not None and of_keys.in_prompt_of is not None:
            same |= of_queries.prompt_row[:, :, None] == of_keys.in_prompt_of[:, None]
        visible = visible & same
        distance = of_queries.positions[:, :, None] - of_keys.positions[:, None]
    return visible if window is None else visible & (distance < window)


class Prefix(NamedTuple):
    """Keys and values of prompts, each held once for the G completions of its prompt."""

    keys: Float[Array, "B K P h"]
    values: Float[Array, "B K P h"]
    lengths: Int[Array, "B"]
    """Tokens of each prompt; keys and values beyond are padding."""


class Suffix(NamedTuple):
    """Keys and values of completions, up to their newest token; column j holds token j."""

    keys: Float[Array, "B G K T h"]
    values: Float[Array, "B G K T h"]
    t: Int[Array, ""] | Int[Array, "B"]
    """Index of the newest token in its completion."""


def attend_shared_prefix(
    q: Float[Array, "B G H h"], prefix: Prefix, suffix: Suffix, scale: float, window: int | None = None
) -> Float[Array, "B G H h"]:
    """Attention of one new token per completion, over its prompt and its completion up to itself.

    The two parts are normalised together by one maximum and one sum, which is exact. The prompt part is a matrix
    product with the group's rows, where separate caches would need G matrix-vector products.

    Args:
      q: queries of the newest token, whose keys and values are in the suffix already.
      scale: factor of the products of queries and keys.
      window: number of tokens that the query sees, itself included; None = all before it.
    """
    b, g, heads, h = q.shape
    kv = prefix.keys.shape[1]
    m = heads // kv
    dtype = prefix.values.dtype
    q = q.reshape(b, g, kv, m, h)
    # The group's rows and the query heads of one kv head are the rows of one product with the prompt: [B, K, G M, h].
    rows = q.swapaxes(1, 2).reshape(b, kv, g * m, h)
    in_prompt = jnp.einsum("bkrh,bkph->bkrp", rows, prefix.keys, preferred_element_type=jnp.float32) * scale
    in_suffix = _suffix_scores(q, suffix.keys) * scale
    position = jnp.arange(prefix.keys.shape[2])
    ages = suffix.t[..., None] - jnp.arange(suffix.keys.shape[3])
    ages = ages if ages.ndim == 2 else ages[None]
    in_range, drawn = position < prefix.lengths[:, None], ages >= 0
    if window is not None:
        in_range &= (prefix.lengths + suffix.t)[:, None] - position < window
        drawn &= ages < window
    in_prompt = jnp.where(in_range[:, None, None], in_prompt, MASKED)
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
    of_prompt = jnp.einsum(
        "bkrp,bkph->bkrh", in_prompt.astype(dtype), prefix.values, preferred_element_type=jnp.float32
    )
    of_suffix = jnp.einsum(
        "bgkmt,bgkth->bgkmh", in_suffix.astype(dtype), suffix.values, preferred_element_type=jnp.float32
    )
    return ((by_group(of_prompt) + of_suffix) / total).reshape(b, g, heads, h).astype(dtype)


def _suffix_scores(q: Float[Array, "B G K m h"], k: Float[Array, "B G K T h"]) -> Float[Array, "B G K m T"]:
    """Products of each completion's queries with its own keys.

    The keys are the first operand where this makes the CPU's product faster: 2.9 times for 256 keys and 8 times for
    1,024 in float32, and in bfloat16 for many keys only.
    """
    if k.dtype == jnp.float32 or k.shape[3] >= _KEYS_FIRST_FROM_KEYS:
        return jnp.einsum("bgkth,bgkmh->bgktm", k, q, preferred_element_type=jnp.float32).swapaxes(-1, -2)
    return jnp.einsum("bgkmh,bgkth->bgkmt", q, k, preferred_element_type=jnp.float32)
