"""The choice of a run's attention kernels: the one that is asked for, or the first that is correct on this machine.

Whether a kernel is correct depends on the device, its driver and the shape, and kernels have been wrong without an
error. A candidate is therefore tried before the run, forward and backward, on the shape of the run, and compared with
XLA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed import processes
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.decode import PART_KERNELS, PartFn, attend_by_parts
from pspo_jax.model.attention.kernels import KERNELS, candidates, obstacle, run_kernel
from pspo_jax.model.attention.xla import Prefix, Suffix, attend, attend_shared_prefix
from pspo_jax.model.interface import Packed

KERNEL_FROM_TOKENS = 512
"""Length of a row, in tokens, from which model.attention=auto looks for a kernel."""
_TOLERANCE = 0.03
"""Largest difference from XLA, as a share of the largest number: 16 bits explain so much. A kernel that ignored the
mask would differ by the number itself."""


class RunKernel(Protocol):
    """The signature of `kernels.run_kernel`, so that tests can put a wrong kernel in its place."""

    def __call__(
        self,
        name: str,
        q: Float[Array, "R S H h"],
        k: Float[Array, "R S K h"],
        v: Float[Array, "R S K h"],
        scale: float,
        segments: Int[Array, "R S"] | None = None,
        /,
    ) -> Float[Array, "R S H h"]: ...


def kernels_of_run(
    a: Architecture, config: Config, mesh: Mesh, prompt_length: int, probe: bool, say: Callable[[str], None]
) -> Architecture:
    """`with_kernels` for a run's config and mesh, and prompts of `prompt_length` tokens at most."""
    length, platform = prompt_length + config.rollout.max_new_tokens, mesh.devices.flat[0].platform
    return with_kernels(a, config.model.attention, platform, length, mesh.shape, probe, say, config.loss.share_prompts)


def with_decode_kernel(
    a: Architecture, config: Config, mesh: Mesh, prompt_length: int, probe: bool, say: Callable[[str], None]
) -> Architecture:
    """The architecture with the kernel of decoding that model.decode_attention names, or the first that serves.

    Args:
      prompt_length: tokens of the longest prompt.
      probe, say: see `with_kernels`.
    Raises:
      ConfigError: the kernel cannot be used or is wrong on this machine.
    """
    wanted, platform = config.model.decode_attention, mesh.devices.flat[0].platform
    if wanted == "xla":
        return a
    for name in PART_KERNELS if wanted == "auto" else (wanted,):
        # Decoding computes whole rows whatever the mesh, so that a context axis is no obstacle.
        reason = obstacle(name, platform, a, context=1)
        if reason is None and probe:
            sizes = config.rollout.group_size, prompt_length, config.rollout.max_new_tokens
            reason = agreed(decode_difference(PART_KERNELS[name], heads_of_device(a, mesh.shape["tensor"]), *sizes))
        if reason is None:
            say(f"attention in decoding: {name}{'' if probe else ' (not tried here)'}")
            return dataclasses.replace(a, decode_attention=name)
        if wanted != "auto":
            raise ConfigError(f'model.decode_attention={name}: {reason}; use "auto" or "xla"')
        if platform == KERNELS[name].platform:
            say(f"attention in decoding: {name} dropped: it {reason}")
    return a


def with_kernels(
    a: Architecture,
    wanted: str,
    platform: str,
    length: int,
    mesh: Mapping[str, int],
    probe: bool,
    say: Callable[[str], None],
    share_prompts: bool | None = None,
) -> Architecture:
    """The architecture with the kernels that compute plain and packed rows.

    Args:
      wanted: model.attention: "auto", "xla" or a key of KERNELS.
      platform: `platform` of the run's devices.
      length: tokens of the longest row.
      mesh: size of each axis of the mesh; heads are split along tensor.
      probe: whether candidates are tried; False = the devices are not there, as in a plan, and the first candidate
        without an obstacle is taken.
      say: is called with a line for each kernel that is dropped, and one for the choice.
      share_prompts: loss.share_prompts; if it is true, XLA computes packed rows.
    Raises:
      ConfigError: `wanted` names a kernel that cannot be used or is wrong on this machine.
    """
    if wanted == "xla" or (wanted == "auto" and (length < KERNEL_FROM_TOKENS or platform == "cpu")):
        return a
    found = {}
    for packed in (False, True):
        found[packed] = "xla"
        for name in candidates() if wanted == "auto" else (wanted,):
            reason = obstacle(name, platform, a, mesh["context"])
            if packed and (share_prompts or not KERNELS[name].packs):
                continue
            if reason is None and probe:
                reason = agreed(difference(name, heads_of_device(a, mesh["tensor"]), length, packed))
            if reason is None:
                found[packed] = name
                break
            if wanted != "auto":
                raise ConfigError(f'model.attention={wanted}: {reason}; use "auto" or "xla"')
            if KERNELS[name].platform == platform:
                say(f"attention: {name}{' for packed rows' if packed else ''} dropped: it {reason}")
    say(f"attention: {found[False]}, packed rows {found[True]}{'' if probe else ' (not tried here)'}")
    return dataclasses.replace(a, attention=found[False], packed_attention=found[True])


def heads_of_device(a: Architecture, tensor: int) -> Architecture:
    """The architecture with the number of heads that one device computes."""
    return dataclasses.replace(a, heads=a.heads // tensor, kv_heads=a.kv_heads // tensor)


def agreed(reason: str | None) -> str | None:
    """The reason to drop a kernel, on every process if there is one on any, since all run the same program."""
    if processes.any_process(reason is not None) and reason is None:
        return "failed on another process"
    return reason


def difference(name: str, a: Architecture, length: int, packed: bool, run: RunKernel = run_kernel) -> str | None:
    """The error of a kernel on this process's first device, in words; None = results and gradients agree with XLA's.

    Args:
      name: a key of KERNELS.
      length: tokens of a row.
      packed: whether it is tried on bins of several rows.
    """
    scale = a.attention_scale
    with jax.default_device(jax.local_devices()[0]):
        operands, segments = _operands(a, length, packed)

        def plain(q: Array, k: Array, v: Array) -> Array:
            """XLA's attention, a row at a time, since the float32 scores of a row are the largest array here."""
            ids = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments

            def row(x: tuple[Array, Array, Array, Array]) -> Array:
                q, k, v, ids = (part[None] for part in x)
                return attend(q, k, v, scale, packed=Packed(ids, jnp.zeros_like(ids)))[0]

            return jax.lax.map(row, (q, k, v, ids))

        try:
            expected = _results(plain, operands, jnp.float32)
            kernel = _results(lambda q, k, v: run(name, q, k, v, scale, segments), operands, a.compute_dtype)
            error_of = {part: _relative_error(kernel[part], expected[part]) for part in expected}
        # Whatever a driver or a compiler raises means that the kernel cannot be used.
        except Exception as error:  # noqa: BLE001
            return _raised(error)
    part = max(error_of, key=lambda part: error_of[part])
    return None if error_of[part] <= _TOLERANCE else f"is wrong by {error_of[part]:.2g} of the largest number in {part}"


def decode_difference(run: PartFn, a: Architecture, group_size: int, prompt: int, new_tokens: int) -> str | None:
    """The error of a kernel of decoding on this process's first device, in words; None = it agrees with XLA.

    It is tried on two groups: one with a prompt of one token at its first token, one with whole caches.

    Args:
      prompt: columns of a prompt's cache.
      new_tokens: columns of a completion's cache.
    """
    scale, keys = a.attention_scale, jax.random.split(jax.random.key(0), 5)
    of_prompt, own = (2, a.kv_heads, prompt, a.head_dim), (2, group_size, a.kv_heads, new_tokens, a.head_dim)
    shapes = ((2, group_size, a.heads, a.head_dim), of_prompt, of_prompt, own, own)
    lengths, t = jnp.asarray([1, prompt]), jnp.asarray([0, new_tokens - 1])
    with jax.default_device(jax.local_devices()[0]):
        made = [jax.random.normal(key, s, jnp.dtype(a.compute_dtype)) for key, s in zip(keys, shapes, strict=True)]

        def plain(q: Array, k: Array, v: Array, own_k: Array, own_v: Array) -> Array:
            return attend_shared_prefix(q, Prefix(k, v, lengths), Suffix(own_k, own_v, t), scale)

        def by_kernel(q: Array, k: Array, v: Array, own_k: Array, own_v: Array) -> Array:
            return attend_by_parts(run, q, Prefix(k, v, lengths), Suffix(own_k, own_v, t), scale)

        try:
            expected = jax.jit(plain)(*(x.astype(jnp.float32) for x in made))
            error = _relative_error(jax.jit(by_kernel)(*made), expected)
        # Whatever a driver or a compiler raises means that the kernel cannot be used.
        except Exception as found:  # noqa: BLE001
            return _raised(found)
    return None if error <= _TOLERANCE else f"is wrong by {error:.2g} of the largest number in output"


def _raised(error: Exception) -> str:
    """An exception in words."""
    text = str(error).strip()
    return f"raised {type(error).__name__}" + (f": {text.splitlines()[0][:200]}" if text else "")


def _operands(a: Architecture, length: int, packed: bool) -> tuple[tuple[Array, ...], Array | None]:
    """Random q, k, v and cotangent of the output for two rows, in the compute type; and four segments a row if
    packed."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    made = [
        jax.random.normal(key, (2, length, n, a.head_dim), jnp.dtype(a.compute_dtype))
        for key, n in zip(keys, heads, strict=True)
    ]
    bounds = jnp.asarray([[1, 3, 6], [2, 5, 7]]) * length // 8
    segments = (jnp.arange(length) >= bounds[..., None]).sum(axis=1) if packed else None
    return tuple(made), segments


def _results(
    run: Callable[[Array, Array, Array], Array], operands: tuple[Array, ...], dtype: DTypeLike
) -> dict[str, Array]:
    """The output and the gradients of attention, computed in a type."""

    def both(q: Array, k: Array, v: Array, g: Array) -> dict[str, Array]:
        out, back = jax.vjp(run, q, k, v)
        return dict(zip(("output", "dq", "dk", "dv"), (out, *back(g.astype(out.dtype))), strict=True))

    return jax.jit(both)(*(x.astype(dtype) for x in operands))


def _relative_error(found: Array, expected: Array) -> float:
    """The largest difference, as a share of the largest number; infinity if any number is not finite."""
    error = jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max() / jnp.abs(expected).max()
    return float(jnp.where(jnp.isfinite(error), error, jnp.inf))
