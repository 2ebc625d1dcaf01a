"""`python -m pspo_jax.train ... --plan [TARGET]`: memory per device, before any weight is read.

TARGET is a device kind and a count, such as v5e-8, h100x8 or h200; without one it is this machine. The programs are
compiled for as many CPU devices from shapes alone, so the plan of a large model is made on a small machine.
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
from pspo_jax.setup import Setup, device_bytes, prepare

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


class Peak(NamedTuple):
    """Bytes that a phase needs on one device."""

    least: float
    """By arithmetic, activations left out."""
    compiled: float
    """By this machine's compiler, whose temporaries an accelerator's may undercut: on a CPU, bfloat16 weights are
    multiplied as float32 copies."""


def show(config: Config, target: Target) -> int:
    """Print the plan of a config."""
    setup = prepare(config, weights=False, capacity=target.capacity if target.devices else None)
    capacity, residents, details = _capacity(target), _residents(setup), _details(setup)
    peaks = _peaks(setup, residents, details)
    console = Console(width=max(Console().width, 100))
    mesh = ", ".join(f"{k} {v}" for k, v in setup.mesh.shape.items())
    table = Table("Per device", "GiB", title=f"{config.policy.source or 'built-in policy'} on {target.name} ({mesh})")
    for name, size in residents.items():
        table.add_row(name, f"{size / _GIB:.2f}")
    for phase, parts in details.items():
        for name, need in parts.items():
            table.add_row(f"  in the {phase}: {name}", f"{need / _GIB:.2f}")
    for name, peak in peaks.items():
        table.add_row(f"peak of the {name}: sum of the above", f"{peak.least / _GIB:.2f}")
        table.add_row(f"peak of the {name}: as compiled here", f"{peak.compiled / _GIB:.2f}")
    table.add_row("capacity", "unknown" if math.isinf(capacity) else f"{capacity / _GIB:.2f}")
    console.print(table)
    for name, peak in peaks.items():
        console.print(f"{name}: {_verdict(name, peak, capacity)}")
    return 0


def _verdict(name: str, peak: Peak, capacity: float) -> str:
    if math.isinf(capacity):
        return "capacity unknown; compare with your device"
    if peak.compiled <= capacity:
        return "fits"
    sizes = f"{peak.least / _GIB:.2f} to {peak.compiled / _GIB:.2f} GiB of {capacity / _GIB:.2f}"
    return f"{'does not fit' if peak.least > capacity else 'may not fit'} ({sizes}): {_advice(name)}"


def _peaks(setup: Setup, residents: dict[str, int], details: dict[str, dict[str, float]]) -> dict[str, Peak]:
    total = sum(residents.values())
    # A rollout takes the weights alone as arguments; the rest of the state is there beside them.
    beside = {"rollout": total - residents["policy"] - residents.get("frozen base", 0), "update": 0}
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        compiled = {"rollout": lowered["sample"].compile(), "update": lowered["step"].compile()}
    return {
        name: Peak(total + sum(details[name].values()), beside[name] + _compiled_peak(program))
        for name, program in compiled.items()
    }


def _capacity(target: Target) -> float:
    """Bytes of one device: of the target, of this machine's accelerator, or this host's memory over its devices."""
    if target.devices:
        return target.capacity
    if jax.devices()[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(jax.devices())
    return device_bytes()


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
        "replay": s.replay if setup.config.replay.memory == "device" else (),
        "groups that wait": s.queue,
    }
    return {name: size for name, part in parts.items() if (size := bytes_per_device(part)) or name == "policy"}


def _details(setup: Setup) -> dict[str, dict[str, float]]:
    """The largest temporaries of each phase, by arithmetic."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    width = jnp.dtype(a.compute_dtype).itemsize
    rows, new = c.rollout.prompts * c.rollout.group_size, c.rollout.max_new_tokens
    cached = c.rollout.prompts * setup.task.train.tokens.shape[1] + rows * new
    weights = jax.tree.leaves(setup.abstract.params)
    decoded = sum(x.size for x in jax.tree.leaves(setup.abstract.weights)) * width / tensor
    on_host = c.replay.memory != "device" and c.replay.name == "fill"
    stored = {"replay, else in the host's memory": float(bytes_per_device(setup.abstract.replay))} if on_host else {}
    chunk = min(c.objective.logits_mib * 2**20, 4 * rows * new * a.vocab_size)
    return {
        "rollout": {
            "weights as they are decoded": decoded,
            "KV cache": 2 * a.layers * a.kv_heads * a.head_dim * cached * width / shards / tensor,
            "logits of one token": 4 * rows * a.vocab_size / shards / tensor,
        },
        "update": {
            "gradients": float(sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in weights)),
            "one chunk of logits": chunk / shards / tensor,
            **stored,
        },
    }


def _compiled_peak(compiled: Any) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def _advice(name: str) -> str:
    if name == "rollout":
        return "more mesh.fsdp or mesh.tensor, fewer rollout.prompts, or a lower rollout.max_new_tokens"
    return "more mesh.fsdp, lora.rank, policy.remat, or a lower objective.microbatch_rows"
