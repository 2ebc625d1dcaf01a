"""Attention kernels of accelerators for whole rows: what each can do, and how it is called.

Which one a run uses is said by `model.attention`; see `kernel_choice`. Kernels never hold a row's scores, forward or
backward. Each computes causal grouped-query attention; sliding windows and rows split along context are XLA's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.distributed.mesh import spec

_PADDING = -1
"""Segment of places that fill a row up to whole tiles: no segment of a row has it."""


class Kernel(NamedTuple):
    """One implementation; `run(q, k, v, segments, scale, interpret)` on one device's rows and heads."""

    platform: str
    """Of jax.Device."""
    packs: bool
    """Whether it takes segments."""
    run: Callable[..., Array]


def run_kernel(
    name: str,
    q: Float[Array, "R S H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    scale: float,
    segments: Int[Array, "R S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "R S H h"]:
    """`attention.attend` by a kernel; each device of a mesh computes its own rows and heads.

    Args:
      interpret: run a Pallas kernel's body by XLA, for tests on CPU.
    """
    places = q.shape[1]
    fill = -places % _tile(places)
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q, k, v))
    operands: tuple[Array, ...] = (q, k, v)
    if segments is not None:
        operands += (jnp.pad(segments, ((0, 0), (0, fill)), constant_values=_PADDING),)

    def local(*operands: Array) -> Array:
        q, k, v, *rest = operands
        return KERNELS[name].run(q, k, v, rest[0] if rest else None, scale, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        heads = spec(("rows", None, "heads", None), mesh.shape)
        specs = (heads,) * 3 + ((spec(("rows", None), mesh.shape),) if segments is not None else ())
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    return local(*operands)[:, :places]


def _tile(places: int) -> int:
    """Rows are filled up to a multiple of this: large tiles cost long rows little and run faster."""
    return 128 if places <= 1024 else 512


def _splash(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """Splash attention for TPUs: blocks above the diagonal are not visited."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    places, heads = q.shape[1:3]
    block = next(b for b in (512, 256, 128) if places % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((places, places)) for _ in range(heads)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    def row(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        return kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out = jax.vmap(row, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return out.swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """cuDNN's fused attention, as jax.nn calls it."""
    assert segments is None and not interpret
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")


def _triton(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """JAX's Pallas kernel for GPUs, lowered by Triton; it has no groups of heads."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    # Positional: nondifferentiable arguments of a custom_vjp are found by place in every version.
    return mha(q, k, v, segments, scale, True, interpret=interpret)


KERNELS: dict[str, Kernel] = {
    "splash": Kernel("tpu", True, _splash),
    "cudnn": Kernel("gpu", False, _cudnn),
    "triton": Kernel("gpu", True, _triton),
}
"""In the order of preference on each platform."""


def obstacle(name: str, platform: str, architecture: Any, context: int) -> str | None:
    """Why a kernel cannot serve, known without running it; None = it may."""
    a = architecture
    if platform != KERNELS[name].platform:
        return f"is for {KERNELS[name].platform}, not for {platform}"
    if a.compute_dtype == "float32":
        return "computes in 16 bits; model.compute_dtype is float32"
    if any(a.windows):
        return "has no sliding windows, which this model has"
    if context > 1:
        return f"needs whole rows on a device; mesh.context={context}"
    if a.head_dim & (a.head_dim - 1) or a.head_dim > 256:
        return f"needs heads of a power of two up to 256; they have {a.head_dim}"
    return None
