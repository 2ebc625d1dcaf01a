"""Attention of new tokens by a kernel that reads live columns only: the prompt's part and the completion's, merged.

`xla.attend_shared_prefix` reads every column of the cache, of which those beyond a row's length hold no token yet. A
kernel that knows lengths can leave them out. It computes each part by itself, with the log-sum-exp l of the part's
scores, and the two are merged by these (section 3.1.1 of FlashAttention-2, arXiv 2307.08691):

    l = log(exp(l_1) + exp(l_2)),    out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.distributed.jax_internals import cudnn_attention
from pspo_jax.distributed.mesh import spec, split_axes
from pspo_jax.model.attention.xla import Prefix, Suffix
from pspo_jax.model.interface import MASKED

Part = tuple[Float[Array, "R K q h"], Float[Array, "R K q"]]
"""Attention over some of the keys, and the log-sum-exp of their scores."""


class PartFn(Protocol):
    """Attention of q queries for each key/value head over the first keys of each row.

    Args:
      lengths: number of keys of each row. A row with none may have any result.
      scale: factor of the products of queries and keys.
    """

    def __call__(
        self,
        q: Float[Array, "R K q h"],
        k: Float[Array, "R K S h"],
        v: Float[Array, "R K S h"],
        lengths: Int[Array, "R"],
        scale: float,
    ) -> Part: ...


PART_KERNELS: dict[str, PartFn] = {"cudnn": cudnn_attention}
"""The kernels of decoding; all are for GPUs."""


def merge(one: Part, other: Part) -> Float[Array, "R K q h"]:
    """Attention over the keys of both parts, in float32; see the formula above."""
    (out, log_sum), (other_out, other_log_sum) = one, other
    top = jnp.maximum(log_sum, other_log_sum)
    weight, other_weight = jnp.exp(log_sum - top)[..., None], jnp.exp(other_log_sum - top)[..., None]
    return (weight * out + other_weight * other_out) / (weight + other_weight)


def attend_by_parts(
    run: PartFn, q: Float[Array, "B G H h"], prefix: Prefix, suffix: Suffix, scale: float
) -> Float[Array, "B G H h"]:
    """`xla.attend_shared_prefix` without a window, by a kernel; each device computes its own rows and heads."""
    lengths = prefix.lengths.astype(jnp.int32)
    # A slot whose row has ended may count on beyond its columns.
    t = jnp.broadcast_to(jnp.minimum(suffix.t, suffix.keys.shape[3] - 1), lengths.shape).astype(jnp.int32)

    def on_device(q: Array, of_prompt: tuple[Array, ...], of_row: tuple[Array, ...]) -> Array:
        (keys, values, lengths), (own_keys, own_values, t) = of_prompt, of_row
        b, g, heads, h = q.shape
        kv = keys.shape[1]
        m = heads // kv
        q = q.reshape(b, g, kv, m, h)
        # As in xla.py, the prompt's queries are all those of its group.
        part = _part(run, q.swapaxes(1, 2).reshape(b, kv, g * m, h), keys, values, lengths, scale)
        out, log_sum = (x.reshape(b, kv, g, m, *x.shape[3:]).swapaxes(1, 2) for x in part)
        rows, own_keys, own_values = (x.reshape(b * g, *x.shape[2:]) for x in (q, own_keys, own_values))
        part = _part(run, rows, own_keys, own_values, jnp.repeat(t + 1, g), scale)
        own_out, own_log_sum = (x.reshape(b, g, *x.shape[1:]) for x in part)
        merged = merge((out, log_sum), (own_out, own_log_sum))
        return merged.reshape(b, g, heads, h).astype(values.dtype)

    mesh = split_axes()
    attend = on_device
    if mesh:
        queries, rows = spec(("batch", None, "kv_heads", None), mesh), spec(("batch",), mesh)
        in_prompt = spec(("batch", "kv_heads", None, None), mesh)
        own = spec(("batch", None, "kv_heads", None, None), mesh)
        specs = queries, (in_prompt, in_prompt, rows), (own, own, rows)
        attend = jax.shard_map(on_device, in_specs=specs, out_specs=queries, axis_names=set(mesh), check_vma=False)
    return attend(q, (prefix.keys, prefix.values, lengths), (suffix.keys, suffix.values, t))


def _part(run: PartFn, q: Array, k: Array, v: Array, lengths: Array, scale: float) -> Part:
    """A part in float32 that has no weight where a row has no keys, whatever the kernel returns for it."""
    out, log_sum = (x.astype(jnp.float32) for x in run(q, k, v, lengths, scale))
    there = (lengths > 0)[:, None, None]
    return jnp.where(there[..., None], out, 0.0), jnp.where(there, log_sum, MASKED)
