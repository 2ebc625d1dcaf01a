"""The attention kernels of a run: asked for, or the first that is found right on this machine.

Kernels depend on the device, its driver and the shape, and have been wrong without an error. So a candidate is run
before a run starts, forward and backward, on the run's own shape, beside attention by XLA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import processes
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.kernels import KERNELS, obstacle, run_kernel
from pspo_jax.model.attention.xla import attend
from pspo_jax.model.interface import Packed

KERNEL_FROM_TOKENS = 512
"""Places of a row from which on `auto` looks for a kernel."""
_TOLERANCE = 0.03
"""Of the largest number: what 16 bits leave open. A mask that is ignored is off by the number itself."""

Run = Callable[..., Array]


def with_kernels(
    a: Architecture,
    wanted: str,
    platform: str,
    places: int,
    mesh: Any,
    probe: bool,
    say: Callable[[str], None],
    share_prompts: bool | None = None,
) -> Architecture:
    """The architecture with the kernels for plain and for packed rows.

    Args:
      wanted: model.attention.
      places: of the longest row.
      mesh: sizes by axis; heads are along tensor.
      probe: False = the devices are not there, as in a plan: what could serve is taken.
      say: told what was dropped, and what was taken.
      share_prompts: loss.share_prompts; with it packed rows are XLA's.
    Raises:
      ConfigError: a kernel was named that cannot serve or is wrong here.
    """
    if wanted == "xla" or (wanted == "auto" and (places < KERNEL_FROM_TOKENS or platform == "cpu")):
        return a
    found = {}
    for packed in (False, True):
        found[packed] = "xla"
        for name in KERNELS if wanted == "auto" else (wanted,):
            reason = obstacle(name, platform, a, mesh["context"])
            if packed and (share_prompts or not KERNELS[name].packs):
                continue
            if reason is None and probe:
                reason = agreed(difference(name, local(a, mesh["tensor"]), places, packed))
            if reason is None:
                found[packed] = name
                break
            if wanted != "auto":
                raise ConfigError(f'model.attention={wanted}: {reason}; use "auto" or "xla"')
            if KERNELS[name].platform == platform:
                say(f"attention: {name}{' for packed rows' if packed else ''} dropped: it {reason}")
    say(f"attention: {found[False]}, packed rows {found[True]}{'' if probe else ' (not tried here)'}")
    return dataclasses.replace(a, attention=found[False], packed_attention=found[True])


def local(a: Architecture, tensor: int) -> Architecture:
    """With the heads of one device."""
    return dataclasses.replace(a, heads=a.heads // tensor, kv_heads=a.kv_heads // tensor)


def agreed(reason: str | None) -> str | None:
    """A reason on any process is one for all: they run the same program."""
    if processes.any_process(reason is not None) and reason is None:
        return "failed on another process"
    return reason


def difference(name: str, a: Architecture, places: int, packed: bool, run: Run = run_kernel) -> str | None:
    """What is wrong with a kernel on this process's first device; None = it agrees with XLA, gradients included.

    Args:
      run: takes run_kernel's arguments.
    """
    scale = a.attention_scale
    with jax.default_device(jax.local_devices()[0]):
        operands, segments = _operands(a, places, packed)

        def plain(q: Array, k: Array, v: Array) -> Array:
            """A row at a time: its float32 scores are the largest array here."""
            ids = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments

            def row(x: tuple[Array, Array, Array, Array]) -> Array:
                q, k, v, ids = (part[None] for part in x)
                return attend(q, k, v, scale, packed=Packed(ids, jnp.zeros_like(ids)))[0]

            return jax.lax.map(row, (q, k, v, ids))

        try:
            expected = _results(plain, operands, jnp.float32)
            kernel = _results(lambda q, k, v: run(name, q, k, v, scale, segments), operands, a.compute_dtype)
            off = {part: _off(kernel[part], expected[part]) for part in expected}
        # A check that fails is a result here, whatever a driver or a compiler raises.
        except Exception as error:  # noqa: BLE001
            text = str(error).strip()
            return f"raised {type(error).__name__}" + (f": {text.splitlines()[0][:200]}" if text else "")
    part = max(off, key=lambda part: off[part])
    return None if off[part] <= _TOLERANCE else f"is wrong by {off[part]:.2g} of the largest number in {part}"


def _operands(a: Architecture, places: int, packed: bool) -> tuple[tuple[Array, ...], Array | None]:
    """q, k, v and the output's cotangent of two rows, in the compute type; packed rows have four segments."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    made = [
        jax.random.normal(key, (2, places, n, a.head_dim), jnp.dtype(a.compute_dtype))
        for key, n in zip(keys, heads, strict=True)
    ]
    bounds = jnp.asarray([[1, 3, 6], [2, 5, 7]]) * places // 8
    segments = (jnp.arange(places) >= bounds[..., None]).sum(axis=1) if packed else None
    return tuple(made), segments


def _results(run: Callable[..., Array], operands: tuple[Array, ...], dtype: Any) -> dict[str, Array]:
    """Output and gradients, computed in a type."""

    def both(q: Array, k: Array, v: Array, g: Array) -> dict[str, Array]:
        out, back = jax.vjp(run, q, k, v)
        return dict(zip(("output", "dq", "dk", "dv"), (out, *back(g.astype(out.dtype))), strict=True))

    return jax.jit(both)(*(x.astype(dtype) for x in operands))


def _off(found: Array, expected: Array) -> float:
    """Largest difference, as a share of the largest number; infinite if any is not finite."""
    gap = jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max() / jnp.abs(expected).max()
    return float(jnp.where(jnp.isfinite(gap), gap, jnp.inf))
