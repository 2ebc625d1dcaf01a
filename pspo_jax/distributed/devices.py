"""Data sheets of accelerators, and stand-in devices for which a plan is compiled on another machine."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from pspo_jax.config.fields import ConfigError


class DeviceSpec(NamedTuple):
    """The data sheet of one device."""

    memory: float
    """Size of its memory, in bytes."""
    flops: float
    """Rate of bfloat16 products with float32 sums and without sparsity, in FLOP/s."""
    bandwidth: float
    """Bandwidth of its memory, in bytes/s."""
    link: float
    """Bandwidth of all its links to the other devices of a slice or a machine, in bytes/s in one direction: half of a
    number that is stated for both directions."""
    cores: int = 1
    """Number of cores that a device counts for in the name of a slice: v5p-8 has eight cores, on four devices."""


_GIB = 2**30
DEVICES = {
    "v4": DeviceSpec(32 * _GIB, 275e12, 1.20e12, 150e9, 2),
    "v5e": DeviceSpec(16 * _GIB, 197e12, 0.82e12, 100e9),
    "v5p": DeviceSpec(95 * _GIB, 459e12, 2.77e12, 300e9, 2),
    "v6e": DeviceSpec(32 * _GIB, 918e12, 1.64e12, 224e9),
    "a100": DeviceSpec(80e9, 312e12, 2.04e12, 300e9),
    "h100": DeviceSpec(80e9, 989e12, 3.35e12, 450e9),
    "h200": DeviceSpec(141e9, 989e12, 4.80e12, 450e9),
    "b200": DeviceSpec(180e9, 2250e12, 8.00e12, 900e9),
    "l4": DeviceSpec(24e9, 121e12, 0.30e12, 32e9),
    "l40s": DeviceSpec(48e9, 362e12, 0.86e12, 32e9),
}

_SLICES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
"""Number of chips -> topology of a v5e or v6e slice."""
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
"""Number of chips -> topology of a small v5p slice."""
TOPOLOGIES = {"v5e": _SLICES, "v6e": _SLICES, "v5p": _CUBES}
"""TPUs for which their compiler compiles on any machine, with the slices that it knows."""


def host_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Bytes of memory of this machine, or of its container's limit if that is lower."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    allowed = limit.read_text().strip() if limit.exists() else ""
    return min(memory, float(allowed)) if allowed.isdecimal() else memory


class Target(NamedTuple):
    """The devices that a plan is for."""

    name: str
    kind: str | None
    """A key of `DEVICES`; None = this machine."""
    devices: int
    """Number of devices of a slice, or of a machine; 0 = all of this machine."""
    slices: int = 1
    """Number of slices or machines."""


THIS_MACHINE = Target("this machine", None, 0)


def parse_target(text: str) -> Target:
    """The target that a text such as `v5e-64`, `h100x8`, `h200` or, for two slices, `2xv5e-64` names.

    Raises:
      ConfigError: the kind of device is unknown, or no slice has this size.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*?)(?:[x-](\d+))?", text.lower())
    if match is None or match[2] not in DEVICES or match[3] == "0":
        raise ConfigError(
            f"--plan {text}: name a device and a count, such as v5e-8, 2xv5e-8 or h100x8; known: {', '.join(DEVICES)}"
        )
    kind, cores = match[2], DEVICES[match[2]].cores
    number = int(match[3] or cores)
    sizes = TOPOLOGIES.get(kind)
    if number % cores or (sizes is not None and match[3] and number // cores not in sizes):
        known = ", ".join(f"{kind}-{n * cores}" for n in sizes or (2, 4, 8))
        raise ConfigError(f"--plan {text}: there is no such slice; there are {known}")
    return Target(text, kind, number // cores, int(match[1] or 1))


def has_tpu_compiler(target: Target) -> bool:
    """Whether the TPU's own compiler is installed (`pip install 'pspo-jax[plan]'`) and knows the target."""
    sizes = TOPOLOGIES.get(target.kind or "", {})
    return target.devices in sizes and importlib.util.find_spec("libtpu") is not None


def devices_for(target: Target) -> Sequence[jax.Device] | None:
    """Devices to compile for, which hold no array and run nothing. It must be called before JAX's first array.

    They are the devices of the TPU's slices if its compiler is installed, else as many CPU devices; None = those of
    this machine.
    """
    if target.kind is None:
        return None
    jax.config.update("jax_platforms", "cpu")
    if not has_tpu_compiler(target):
        jax.config.update("jax_num_cpu_devices", target.devices * target.slices)
        return jax.devices()
    # This machine has no TPU. Without these variables libtpu takes a lock, looks for a metadata server, and warns.
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    assert target.kind is not None
    shape = TOPOLOGIES[target.kind][target.devices]
    several = {"num_slices": target.slices} if target.slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{target.kind}:{shape}", **several).devices
