"""Attention kernels of accelerators for whole rows: their abilities, and a common way to call them.

`model.attention` says which one a run uses, and probe.py chooses among them. A kernel never holds the scores of a row,
forward or backward. All compute causal grouped-query attention; sliding windows and rows that are split along context
are left to xla.py.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.distributed.mesh import spec, split_axes
from pspo_jax.model.architecture import Architecture

_PADDING_SEGMENT = -1
"""Segment of the padding that fills a row up to whole tiles; no token of a row has it."""


class KernelFn(Protocol):
    """Attention of one device's rows and heads.

    Args:
      segments: for each token, the index of its row in the bin; None = each row stands alone.
      scale: factor of the products of queries and keys.
      interpret: whether XLA runs the body of a Pallas kernel, for tests on CPU.
    """

    def __call__(
        self,
        q: Float[Array, "R S H h"],
        k: Float[Array, "R S K h"],
        v: Float[Array, "R S K h"],
        segments: Int[Array, "R S"] | None,
        scale: float,
        interpret: bool,
    ) -> Float[Array, "R S H h"]: ...


class Kernel(NamedTuple):
    """One implementation of attention."""

    platform: str
    """`platform` of the jax.Device that it runs on."""
    packs: bool
    """Whether it takes segments, so that bins of several rows can use it."""
    run: KernelFn
    module: str
    """The module that has it. A release of JAX may lack it, and so may an environment without tokamax."""


def run_kernel(
    name: str,
    q: Float[Array, "R S H h"],
    k: Float[Array, "R S K h"],
    v: Float[Array, "R S K h"],
    scale: float,
    segments: Int[Array, "R S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "R S H h"]:
    """`xla.attend` by a kernel; each device of a mesh computes its own rows and heads.

    Args:
      name: a key of KERNELS.
      scale, segments, interpret: see KernelFn.
    """
    length = q.shape[1]
    fill = -length % _tile(length)
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q, k, v))
    operands: tuple[Array, ...] = (q, k, v)
    if segments is not None:
        operands += (jnp.pad(segments, ((0, 0), (0, fill)), constant_values=_PADDING_SEGMENT),)

    def on_device(*operands: Array) -> Array:
        q, k, v, *rest = operands
        return KERNELS[name].run(q, k, v, rest[0] if rest else None, scale, interpret)

    mesh = split_axes()
    if mesh:
        heads = spec(("rows", None, "heads", None), mesh)
        specs = (heads,) * 3 + ((spec(("rows", None), mesh),) if segments is not None else ())
        on_device = jax.shard_map(on_device, in_specs=specs, out_specs=heads, axis_names=set(mesh), check_vma=False)
    return on_device(*operands)[:, :length]


def _tile(length: int) -> int:
    """Number of tokens of which the padded length of a row is a multiple; large tiles run faster and waste little."""
    return 128 if length <= 1024 else 512


def _splash(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """Splash attention for TPUs, which skips the blocks above the diagonal."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    block = next(b for b in (512, 256, 128) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    def row(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        return kernel(q, k, v, None if ids is None else splash.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out = jax.vmap(row, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return out.swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """cuDNN's fused attention, through jax.nn."""
    assert segments is None and not interpret
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")


def _triton(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
    """JAX's Pallas kernel for GPUs, lowered by Triton. It knows no groups of heads: keys and values are repeated."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    # All versions of JAX find the nondifferentiable arguments of a custom_vjp by position; some do not by name.
    return mha(q, k, v, segments, scale, True, interpret=interpret)


def by_tokamax(implementation: Literal["mosaic", "triton", "xla"]) -> KernelFn:
    """Attention by tokamax, the successor of JAX's own kernels for GPUs; "xla" runs on all platforms, for tests.

    Its kernels know no segments. They take a mask of a byte for each pair of tokens of a bin.
    """

    def run(q: Array, k: Array, v: Array, segments: Array | None, scale: float, interpret: bool) -> Array:
        import tokamax

        assert not interpret
        same = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
        out: Array = tokamax.dot_product_attention(
            q, k, v, mask=same, scale=scale, is_causal=True, implementation=implementation
        )
        return out

    return run


KERNELS: dict[str, Kernel] = {
    "splash": Kernel("tpu", True, _splash, "jax.experimental.pallas.ops.tpu.splash_attention"),
    "cudnn": Kernel("gpu", False, _cudnn, "jax.nn"),
    "tokamax_mosaic": Kernel("gpu", True, by_tokamax("mosaic"), "tokamax"),
    "tokamax_triton": Kernel("gpu", True, by_tokamax("triton"), "tokamax"),
    "triton": Kernel("gpu", True, _triton, "jax.experimental.pallas.ops.gpu.attention"),
}
"""The kernels, in the order of preference on each platform."""
_TOKAMAX = "pip install 'pspo-jax[tokamax]' (Python 3.12 or newer)"


def candidates() -> list[str]:
    """The kernels that model.attention=auto looks at: all but those of an extra that is not installed."""
    return [name for name, kernel in KERNELS.items() if kernel.module != "tokamax" or _found("tokamax")]


def _found(module: str) -> bool:
    """Whether a module is there, without importing more than its parents; a mere folder of its name is not it."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return False
    return spec is not None and spec.origin is not None


def _lacks(kernel: Kernel) -> str | None:
    """What to install, if the module of a kernel is not there."""
    if _found(kernel.module):
        return None
    if kernel.module == "tokamax":
        return f"needs the package tokamax; {_TOKAMAX}"
    successor = f"; its successor on GPUs: {_TOKAMAX}" if kernel.platform == "gpu" else ""
    return f"needs {kernel.module}, which jax {jax.__version__} does not have{successor}"


def obstacle(name: str, platform: str, a: Architecture, context: int) -> str | None:
    """The reason why a kernel cannot be used, as far as it is known without a trial; None = it may work.

    Args:
      name: a key of KERNELS.
      platform: `platform` of the run's devices.
      context: devices along the mesh's context axis.
    """
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
    return _lacks(KERNELS[name])
