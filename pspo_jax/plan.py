"""`python -m pspo_jax.train ... --plan [TARGET]`: memory per device, before any weight is read.

TARGET is a device kind and a count, such as v5e-8, h100x8 or h200; without one it is this machine. The programs are
compiled for as many CPU devices from shapes alone, so the plan of a large model is made on a small machine. What lives
on a device between steps is exact; temporaries are the CPU compiler's, which an accelerator's may undercut or exceed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pspo_jax.config import Config, ConfigError
from pspo_jax.programs import lower_programs
from pspo_jax.setup import Setup, prepare

DEVICES = {
    "v4": 32,
    "v5e": 16,
    "v5p": 95,
    "v6e": 32,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "l4": 24,
    "l40s": 48,
}
"""Memory of one device as its maker states it: GiB for TPUs, 10^9 bytes for GPUs."""
_TPU = re.compile(r"v\d")
_GIB = 2**30


class Target(NamedTuple):
    """Where a plan is for."""

    name: str
    devices: int
    capacity: float
    """Bytes a device; infinity = unknown."""


def take_target(argv: Sequence[str]) -> tuple[list[str], Target | None]:
    """argv without `--plan [TARGET]`, and the target; None = no plan is asked for."""
    rest: list[str] = []
    target = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--plan" and words and not words[0].startswith("--"):
            target = _target(words.pop(0))
        elif word.startswith("--plan="):
            target = _target(word.partition("=")[2])
        elif word == "--plan":
            target = Target("this machine", 0, math.inf)
        else:
            rest.append(word)
    return rest, target


def _target(text: str) -> Target:
    match = re.fullmatch(r"([a-z]\w*?)(?:[x-](\d+))?", text.lower())
    if match is None or match[1] not in DEVICES or match[2] == "0":
        raise ConfigError(
            f"--plan {text}: name a device and a count, such as v5e-8 or h100x8; known: {', '.join(DEVICES)}"
        )
    unit = _GIB if _TPU.match(match[1]) else 10**9
    return Target(text, int(match[2] or 1), DEVICES[match[1]] * unit)


def fake_devices(target: Target) -> None:
    """Make JAX see the target's number of devices; before the first array."""
    if target.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", target.devices)


def show(config: Config, target: Target) -> int:
    """Print the plan of a config."""
    setup = prepare(config, weights=False)
    capacity = _capacity(target)
    residents = _residents(setup)
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        peaks = {
            name: _peak(lowered[program].compile()) for name, program in (("rollout", "sample"), ("update", "step"))
        }
    # A rollout takes the weights alone as arguments; the optimizer's state is there beside them.
    elsewhere = sum(residents.values()) - residents["policy"] - residents.get("frozen base", 0)
    peaks["rollout"] += elsewhere
    console = Console(width=max(Console().width, 100))
    mesh = ", ".join(f"{k} {v}" for k, v in setup.mesh.shape.items())
    table = Table("Per device", "GiB", title=f"{config.policy.source or 'built-in policy'} on {target.name} ({mesh})")
    for name, size in (residents | _details(setup)).items():
        table.add_row(name, f"{size / _GIB:.2f}")
    for name, size in peaks.items():
        table.add_row(f"peak of the {name}, temporaries included", f"{size / _GIB:.2f}")
    table.add_row("capacity", "unknown" if math.isinf(capacity) else f"{capacity / _GIB:.2f}")
    console.print(table)
    over = {name: size for name, size in peaks.items() if size > capacity}
    for name, size in over.items():
        console.print(f"does not fit: the {name} needs {size / _GIB:.2f} GiB of {capacity / _GIB:.2f}; {_advice(name)}")
    if not over:
        console.print("fits" if not math.isinf(capacity) else "capacity unknown: compare with your device")
    return 0


def _capacity(target: Target) -> float:
    """Bytes of one device: of the target, of this machine's accelerator, or this host's memory over its devices."""
    if target.devices:
        return target.capacity
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(jax.devices())
    return math.inf


def bytes_per_device(tree: Any) -> int:
    """Bytes of a pytree of ShapeDtypeStructs with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _residents(setup: Setup) -> dict[str, int]:
    """What stays on a device from step to step."""
    s = setup.abstract
    parts = {
        "policy": s.params,
        "frozen base": s.frozen,
        "reference": s.reference,
        "optimizer": s.opt_state,
        "per-prompt state": (s.selector, s.credit),
        "replay": s.replay,
    }
    return {name: size for name, part in parts.items() if (size := bytes_per_device(part)) or name == "policy"}


def _details(setup: Setup) -> dict[str, float]:
    """The largest temporaries, by arithmetic."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    rows, width = mesh["data"] * mesh["fsdp"], jnp.dtype(a.compute_dtype).itemsize
    b, g = c.rollout.prompts, c.rollout.group_size
    tokens = b * (setup.task.train.tokens.shape[1] + g * c.rollout.max_new_tokens)
    weights = jax.tree.leaves(setup.abstract.params)
    grads = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in weights)
    return {
        "  in the rollout: KV cache": 2 * a.layers * a.kv_heads * a.head_dim * tokens * width / rows / mesh["tensor"],
        "  in the rollout: logits of one token": 4 * b * g * a.vocab_size / rows / mesh["tensor"],
        "  in the update: gradients": grads,
        "  in the update: one chunk of logits": min(
            c.objective.logits_mib * 2**20, 4 * b * g * c.rollout.max_new_tokens * a.vocab_size
        )
        / rows
        / mesh["tensor"],
    }


def _peak(compiled: Any) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def _advice(name: str) -> str:
    if name == "rollout":
        return "more mesh.fsdp or mesh.tensor, fewer rollout.prompts, or a lower rollout.max_new_tokens"
    return "more mesh.fsdp, lora.rank, policy.remat, or a lower objective.microbatch_rows"
