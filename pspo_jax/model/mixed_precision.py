"""Matrix products and lookups of embeddings in a low precision, with gradients that lose no more than they must."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pspo_jax.distributed.mesh import cannot_index_split, constrain, in_slice, spec, split_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum_lowp(spec: str, x: Array, w: Array, dtype: DTypeLike, out_dtype: DTypeLike) -> Array:
    """einsum of x and w in `dtype` with float32 accumulation, in both directions.

    Autodiff of a product that accumulates in float32 multiplies float32 by float32 in the backward pass, at half the
    rate or less on every backend with bfloat16 units. Here cotangents are cast to `dtype` first. In float32 the result
    is that of autodiff; on CPU, updates took about a third less processor time (few repetitions, on a busy machine).

    Args:
      spec: an einsum of two operands, with every index spelled out (no "...") and in the output or in both operands.
      dtype: type of the operands of each product; the gradients have the types of x and w.
      out_dtype: type of the result.
    """
    return _multiply(spec, x.astype(dtype), w.astype(dtype)).astype(out_dtype)


def _multiply(spec: str, x: Array, w: Array) -> Array:
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def _forward(
    spec: str, x: Array, w: Array, dtype: DTypeLike, out_dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return einsum_lowp(spec, x, w, dtype, out_dtype), (x, w)


def _backward(
    spec: str, dtype: DTypeLike, out_dtype: DTypeLike, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    operands, result = spec.split("->")
    left, right = operands.split(",")
    g = g.astype(dtype)
    dx = _multiply(f"{result},{right}->{left}", g, w.astype(dtype))
    dw = _multiply(f"{left},{result}->{right}", x.astype(dtype), g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum_lowp.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Array, tokens: Array, dtype: DTypeLike) -> Array:
    return table[tokens].astype(dtype)


def _lookup_forward(table: Array, tokens: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype: DTypeLike, saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, tokens = saved
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(g.astype(jnp.float32))
    return total.astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup_on_devices(table: Array, tokens: Array, dtype: DTypeLike) -> Array:
    """`lookup` of tokens by each device in its own part of the table, split by vocabulary and by width."""
    of_table, of_tokens, of_found = _lookup_specs()

    def own(table: Array, tokens: Array) -> Array:
        index, mine = _own_index(table, tokens)
        return jax.lax.psum(jnp.where(mine[..., None], table[index].astype(dtype), 0), "tensor")

    return _by_device(own, (of_table, of_tokens), of_found)(table, tokens)


def _lookup_on_devices_forward(table: Array, tokens: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return _lookup_on_devices(table, tokens, dtype), (table, tokens)


def _lookup_on_devices_backward(dtype: DTypeLike, saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    of_table, of_tokens, of_found = _lookup_specs()

    def own(table: Array, tokens: Array, g: Array) -> Array:
        index, mine = _own_index(table, tokens)
        g = jnp.where(mine[..., None], g.astype(jnp.float32), 0)
        total = jnp.zeros(table.shape, jnp.float32).at[index].add(g)
        return jax.lax.psum(total, "data").astype(table.dtype)

    return _by_device(own, (of_table, of_tokens, of_found), of_table)(*saved, g), None


_lookup_on_devices.defvjp(_lookup_on_devices_forward, _lookup_on_devices_backward)


def _by_device(
    own: Callable[..., Array], in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec
) -> Callable[..., Array]:
    """The function, run by each device of a slice on its own part of the arrays."""
    axes = set(split_axes())
    return jax.shard_map(own, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _lookup_specs() -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How the mesh splits a table of embeddings, tokens and their embeddings."""
    mesh = split_axes()
    axes = ("vocab", "embed"), ("outer_batch", None), ("outer_batch", None, "embed")
    return spec(axes[0], mesh), spec(axes[1], mesh), spec(axes[2], mesh)


def _own_index(table: Array, tokens: Array) -> tuple[Array, Array]:
    """Index of each token in this device's rows of the table, and whether it is among them; index 0 if it is not."""
    index = tokens - jax.lax.axis_index("tensor") * table.shape[0]
    mine = (index >= 0) & (index < table.shape[0])
    return jnp.where(mine, index, 0), mine


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "R S"], dtype: DTypeLike) -> Float[Array, "R S D"]:
    """Rows of a table in `dtype`; the table's gradient adds up in float32, whatever its type.

    Autodiff adds in the type of the table: in bfloat16, a token that occurs often would lose most of its gradient.
    """
    if cannot_index_split():
        return _lookup_on_devices(table, tokens, dtype)
    if table.dtype == jnp.bfloat16:
        return _lookup(table, tokens, dtype)
    return table[tokens].astype(dtype)


def lookup_in_batch(table: Float[Array, "N D"], rows: Int[Array, "R S"], dtype: DTypeLike) -> Float[Array, "R S D"]:
    """`lookup` in a table that belongs to the batch, such as the embeddings of its images, and is split as it is.

    Inside a slice, every device first has the table whole: XLA's partitioner aborts the process at a lookup along a
    split dimension, as `cannot_index_split` describes.
    """
    table = constrain(table, None, None) if in_slice() else table
    return _lookup(table, rows, dtype) if table.dtype == jnp.bfloat16 else table[rows].astype(dtype)
