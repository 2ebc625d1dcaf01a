"""`python -m pspo_jax.train ... --plan [TARGET]`: memory per device, before any weight is read.

TARGET is a device kind and a count, such as v5e-8, h100x8 or h200; without one it is this machine. The programs are
compiled from shapes alone, so the plan of a large model is made on a small machine: by the TPU's own compiler for its
slices, if libtpu is installed, else for as many CPU devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.distributed.devices import (
    DEVICES,
    THIS_MACHINE,
    DeviceSpec,
    Target,
    devices_for,
    has_tpu_compiler,
    host_bytes,
    parse_target,
)
from pspo_jax.distributed.mesh import ROWS, UPDATE_ROWS, WEIGHTS, microbatch_size, size_along
from pspo_jax.losses.packing import padded_length
from pspo_jax.planning.roofline import rollout_lower_bound, update_lower_bound
from pspo_jax.training.compile import lower_programs
from pspo_jax.training.scoring import bins_at_a_time, packs_lengths
from pspo_jax.training.setup import Setup, device_bytes, prepare

_GIB = 2**30


def take_target(argv: Sequence[str]) -> tuple[list[str], Target | None]:
    """argv without `--plan [TARGET]`, and the target; None = no plan is asked for."""
    rest: list[str] = []
    target = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--plan" and words and not words[0].startswith("--"):
            target = parse_target(words.pop(0))
        elif word.startswith("--plan="):
            target = parse_target(word.partition("=")[2])
        elif word == "--plan":
            target = THIS_MACHINE
        else:
            rest.append(word)
    return rest, target


class Peak(NamedTuple):
    """Bytes that a phase needs on one device."""

    least: float
    """By arithmetic: arrays that the phase cannot do without at one moment. No compiler takes less."""
    compiled: float
    """By the compiler. The CPU's stands in where the accelerator's own is not there, which may take less: on a CPU,
    bfloat16 weights are multiplied as float32 copies. Infinity = the compiler says that it does not fit."""
    reason: str = ""
    """What the compiler says then."""


def show(config: Config, target: Target) -> int:
    """Print the plan of a config."""
    kind = DEVICES[target.kind] if target.kind else None
    devices = devices_for(target)
    setup = prepare(config, weights=False, capacity=kind.memory if kind else None, devices=devices, say=print)
    capacity, residents, details = kind.memory if kind else _own_capacity(), _residents(setup), _details(setup)
    peaks = _peaks(setup, residents, details)
    console = Console(width=max(Console().width, 100))
    mesh = ", ".join(f"{k} {v}" for k, v in setup.mesh.shape.items())
    table = Table("Per device", "GiB", title=f"{config.model.source or 'built-in policy'} on {target.name} ({mesh})")
    for name, size in residents.items():
        table.add_row(name, f"{size / _GIB:.2f}")
    for phase, parts in details.items():
        for name, need in parts.items():
            table.add_row(f"  in the {phase}: {name}", f"{need / _GIB:.2f}")
    compiler = "the TPU's compiler" if has_tpu_compiler(target) else "the CPU's compiler"
    for name, peak in peaks.items():
        table.add_row(f"peak of the {name}: sum of the above, the least", f"{peak.least / _GIB:.2f}")
        found = "too large" if math.isinf(peak.compiled) else f"{peak.compiled / _GIB:.2f}"
        table.add_row(f"peak of the {name}: by {compiler}", found)
    table.add_row("capacity", "unknown" if math.isinf(capacity) else f"{capacity / _GIB:.2f}")
    console.print(table)
    for name, peak in peaks.items():
        console.print(f"{name}: {_verdict(name, peak, capacity, exact=has_tpu_compiler(target))}")
    if kind:
        console.print(_floors(setup, kind))
    return 0


def _verdict(name: str, peak: Peak, capacity: float, exact: bool) -> str:
    if math.isinf(capacity):
        return "capacity unknown; compare with your device"
    if peak.compiled <= capacity:
        return "fits"
    if peak.reason:
        return f"does not fit: {peak.reason}: {_advice(name)}"
    sizes = f"{peak.least / _GIB:.2f} to {peak.compiled / _GIB:.2f} GiB of {capacity / _GIB:.2f}"
    surely = exact or peak.least > capacity
    return f"{'does not fit' if surely else 'may not fit'} ({sizes}): {_advice(name)}"


def _floors(setup: Setup, kind: DeviceSpec) -> str:
    """One line: what a step takes at least."""
    floors = {"rollout": rollout_lower_bound(setup, kind), "update": update_lower_bound(setup, kind)}
    phases = ", ".join(
        f"{name} {f.seconds:.3g} s (products {f.products:.3g}, memory {f.memory:.3g}, links {f.links:.3g})"
        for name, f in floors.items()
    )
    return f"least time of a step by arithmetic, every completion at its longest, not a measurement: {phases}"


def _peaks(setup: Setup, residents: dict[str, int], details: dict[str, dict[str, float]]) -> dict[str, Peak]:
    total = sum(residents.values())
    # A rollout takes the weights alone as arguments; the rest of the state is there beside them.
    beside = {"rollout": total - residents["model"] - residents.get("frozen base", 0), "update": 0}
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        compiled = {"rollout": _compiled(lowered["sample"]), "update": _compiled(lowered["step"])}
    return {
        name: Peak(total + sum(details[name].values()), beside[name] + size, reason)
        for name, (size, reason) in compiled.items()
    }


def _compiled(program: Any) -> tuple[float, str]:
    """Bytes that a program needs on a device; infinity, and the compiler's words, if it says that they are too many."""
    try:
        m = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf, _first_sentences(str(error))
    arguments_and_results = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return arguments_and_results + m.temp_size_in_bytes, ""


def _first_sentences(text: str) -> str:
    """The compiler's summary, without its list of buffers."""
    found = re.search(r"Used [^.]*\.\d+\w+ of [\d.]+\w+ \w+|Ran out of memory[^\n]*", text)
    return found[0] if found else text.splitlines()[0]


def _own_capacity() -> float:
    """Bytes of one device of this machine's accelerator, or this host's memory over its devices."""
    if jax.devices()[0].platform == "cpu":
        return host_bytes() / len(jax.devices())
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
        "model": s.params,
        "frozen base": s.frozen,
        "reference": s.reference,
        "optimizer": s.opt_state,
        "per-prompt state": (s.selector, s.advantage),
        "replay": s.replay if setup.config.replay.memory == "device" else (),
        "groups that wait": s.queue,
    }
    return {name: size for name, part in parts.items() if (size := bytes_per_device(part)) or name == "model"}


def _details(setup: Setup) -> dict[str, dict[str, float]]:
    """What each phase needs at least beside what stays, by arithmetic: arrays that exist at one moment."""
    c = setup.config
    on_host = c.replay.memory != "device" and c.replay.name == "popo"
    stored = {"replay, else in the host's memory": float(bytes_per_device(setup.abstract.replay))} if on_host else {}
    return {"rollout": _rollout_details(setup), "update": _update_details(setup) | stored}


def _rollout_details(setup: Setup) -> dict[str, float]:
    """Bytes per device that rolling out one part of a round needs, with every completion at its longest."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    shards, tensor = size_along(mesh, ROWS), mesh["tensor"]
    width = jnp.dtype(a.compute_dtype).itemsize
    prompts, new = round_prompts(c) // c.rollout.chunks, c.rollout.max_new_tokens
    rows = prompts * c.rollout.group_size
    rows = min(rows, c.rollout.slots or rows)
    # The last token of a completion is never read.
    cached = prompts * setup.task.train.tokens.shape[1] + rows * (new - 1)
    decoded = sum(x.size for x in jax.tree.leaves(setup.abstract.weights)) * width / tensor
    if a.split_decode:
        split = 3 * a.layers * a.width * a.mlp_width + (1 if a.tied else 2) * a.vocab_size * a.width
        decoded -= split * width / tensor * (1 - 1 / mesh["fsdp"])
    return {
        # Where nothing splits the weights, they may be decoded as they lie.
        "weights as they are decoded": decoded if size_along(mesh, WEIGHTS) > 1 else 0.0,
        "KV cache": 2 * a.layers * a.kv_heads * a.head_dim * cached * width / shards / tensor,
        "logits of one token": 4 * rows * a.vocab_size / shards / tensor,
    }


def _update_details(setup: Setup) -> dict[str, float]:
    """Bytes per device as a microbatch's backward pass begins: sums of gradients, what is kept, and what is at work."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    tensor, width = mesh["tensor"], jnp.dtype(a.compute_dtype).itemsize
    new, rows = c.rollout.max_new_tokens, c.rollout.prompts * c.rollout.group_size // c.loss.minibatches
    with jax.set_mesh(setup.mesh):
        packed = packs_lengths(rows, new, c)
        at_once = bins_at_a_time(rows, c) if packed else microbatch_size(rows, c.loss.microbatch_rows)
    length = setup.task.train.tokens.shape[1] + new
    length = padded_length(length - 1) if packed else length
    places = at_once * length / size_along(mesh, UPDATE_ROWS) / mesh["context"]
    # The backward pass of attention needs q, k and v, that of the MLP its two inner halves, whichever weights train.
    inner = ((a.heads + 2 * a.kv_heads) * a.head_dim + 2 * a.mlp_width) / tensor
    kept = {"none": inner + a.width, "dots": inner + a.width, "full": a.width, "offload": 0}[a.remat]
    again = inner if a.remat in ("full", "offload") else 0
    columns = max(1, min(new, c.loss.logits_mib * 2**20 // (4 * a.vocab_size * at_once)))
    columns = min(columns, -(-new // 8)) if packed else columns
    # Chunks of equal size may be smaller than what the config allows.
    chunk = 4 * a.vocab_size * at_once * columns / 2 / size_along(mesh, UPDATE_ROWS) / mesh["context"] / tensor
    trained = jax.tree.leaves(setup.abstract.params)
    gradients = float(sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in trained))
    return {
        # Those of a single microbatch come into being as its activations go.
        "gradients": gradients if packed or at_once < rows else 0.0,
        f"activations kept (model.remat {a.remat})": a.layers * places * width * kept,
        "a block's activations, or a chunk of logits": max(places * width * again, chunk),
    }


def _advice(name: str) -> str:
    if name == "rollout":
        return "more mesh.fsdp or mesh.tensor, fewer rollout.prompts, or a lower rollout.max_new_tokens"
    return "more mesh.fsdp, lora.rank, model.remat, or a lower loss.microbatch_rows"
