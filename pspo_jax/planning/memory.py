"""`python -m pspo_jax.train ... --plan [TARGET]`: does a run fit into the memory of its devices?

The first line that is printed answers the question and, if the answer is no, says what to change. TARGET is a device
and a count, such as v5e-8, h100x8 or h200, or 2xv5e-8 for two slices; without it, the plan is for this machine. No
weight is read: the programs are compiled from shapes alone, so that a small machine can plan a large model. For a TPU
slice the TPU's own compiler is used if libtpu is installed; otherwise the CPU's compiler stands in, for as many
devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Lowered
from jax.typing import DTypeLike
from jaxtyping import PyTree
from rich.console import Console
from rich.table import Table

from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config, logits_mib, round_prompts, update_completions
from pspo_jax.config.strategies import STORING
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
from pspo_jax.losses.log_probs import chunk_columns
from pspo_jax.planning import images
from pspo_jax.planning.roofline import bytes_across_slices, rollout_lower_bound, update_lower_bound
from pspo_jax.rewards.reward_model import abstract_weights
from pspo_jax.rollout.stages import SHORTEST_STAGE_TOKENS, automatic_stages, cache_columns, make_stages
from pspo_jax.training.compile import lower_programs
from pspo_jax.training.distillation import packed_alike
from pspo_jax.training.machine_defaults import decoding_bytes
from pspo_jax.training.scoring import bin_shape, packs_lengths, shares_prompts
from pspo_jax.training.setup import Setup, device_bytes, prepare

_GIB = 2**30
PENDING = "groups that go on in the next step"
"""Name, among the arrays that stay, of those that carry-over holds."""


def take_target(argv: Sequence[str]) -> tuple[list[str], Target | None]:
    """argv without `--plan [TARGET]`, and the target; None = no plan is asked for.

    Raises:
      ConfigError: the device is unknown, or there is no slice of this size.
    """
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
    """The memory that a phase needs on one device at its peak, in bytes."""

    least: float
    """Sum of the arrays that must exist at one moment; no compiler needs less."""
    compiled: float
    """The compiler's own number; infinity = the compiler says that the program does not fit. Where the CPU's compiler
    stands in, the number is too high: on a CPU, bfloat16 weights are multiplied as float32 copies."""
    reason: str = ""
    """The compiler's words where it says that the program does not fit."""


Answer = Literal["fits", "capacity unknown", "may not fit", "does not fit"]
"""Whether a phase fits on a device, from the best answer to the worst."""
_ANSWERS: tuple[Answer, ...] = ("fits", "capacity unknown", "may not fit", "does not fit")


class Verdict(NamedTuple):
    """The answer whether a phase fits on a device, and the memory that it needs."""

    answer: Answer
    need: str
    """The memory that the phase needs, in words."""


class Plan(NamedTuple):
    """The memory of a run on one device, in bytes."""

    setup: Setup
    capacity: float
    """Memory of the device; infinity = unknown."""
    residents: dict[str, int]
    """Arrays that stay from step to step, by name."""
    details: dict[str, dict[str, float]]
    """For each phase, and for moments at which the vision tower runs, such as "update, as the tower is
    differentiated", the further arrays that it needs at the same moment, by name."""
    peaks: dict[str, Peak]
    """The peak of each phase, "rollout" and "update"."""


def show(config: Config, target: Target) -> int:
    """Print the plan of a config: whether it fits, what it consists of, and the least time of a step. Returns 0."""
    notes: list[str] = []
    plan = _make_plan(config, target, notes.append)
    exact = has_tpu_compiler(target)
    verdicts = {phase: _verdict(peak, plan.capacity, exact) for phase, peak in plan.peaks.items()}
    console = Console(width=max(Console().width, 100), highlight=False)
    console.print(_headline(verdicts, target.name), soft_wrap=True, markup=False)
    for line in notes:
        print(line)
    if table := images.table_bytes(plan.setup):
        print(f"images: the embeddings of {table[0]:,} images take {table[1] / _GIB:.2f} GiB on disk, in task.cache")
    console.print(_to_table(plan, target))
    for phase, (answer, need) in verdicts.items():
        console.print(f"{phase}: {answer} ({need})", markup=False)
    if (slots := _slots_that_fit(plan)) is not None:
        console.print(slots, markup=False)
    if (across := _across_slices(plan.setup)) is not None:
        console.print(across, markup=False, soft_wrap=True)
    if target.kind:
        console.print(_least_time(plan.setup, DEVICES[target.kind]))
    return 0


def _make_plan(config: Config, target: Target, say: Callable[[str], None]) -> Plan:
    device = DEVICES[target.kind] if target.kind else None
    devices = devices_for(target)
    if target.slices > 1 and config.mesh.slices is None:
        config = replace(config, {"mesh.slices": target.slices})
    setup = prepare(config, weights=False, capacity=device.memory if device else None, devices=devices, say=say)
    residents, details = _residents(setup), _details(setup)
    capacity = device.memory if device else _own_capacity()
    return Plan(setup, capacity, residents, details, _peaks(setup, residents, details))


def _headline(verdicts: dict[str, Verdict], target: str) -> str:
    """The plan in one line: whether the run fits and, if it does not, which phase needs how much and what to change."""
    worst = max((verdict.answer for verdict in verdicts.values()), key=_ANSWERS.index)
    if worst in ("fits", "capacity unknown"):
        needs = ", ".join(f"{phase} {verdict.need}" for phase, verdict in verdicts.items())
        return f"{worst} on {target}, per device: {needs}"
    phases = [phase for phase, verdict in verdicts.items() if verdict.answer not in ("fits", "capacity unknown")]
    return f"{worst} on {target}: " + "; ".join(
        f"the {phase} needs {verdicts[phase].need} per device; {_ADVICE[phase]}" for phase in phases
    )


def _verdict(peak: Peak, capacity: float, exact: bool) -> Verdict:
    """Whether a peak fits into the capacity.

    Args:
      exact: whether the device's own compiler was asked, so that its number needs no allowance.
    """
    if peak.reason:
        return Verdict("does not fit", peak.reason)
    if math.isinf(capacity):
        return Verdict("capacity unknown", f"{peak.least / _GIB:.2f} to {peak.compiled / _GIB:.2f} GiB")
    if peak.compiled <= capacity:
        return Verdict("fits", f"{peak.compiled / _GIB:.2f} GiB of {capacity / _GIB:.2f}")
    need = f"{peak.least / _GIB:.2f} to {peak.compiled / _GIB:.2f} GiB of {capacity / _GIB:.2f}"
    return Verdict("does not fit" if exact or peak.least > capacity else "may not fit", need)


_SLOTS_SHARE = 0.9
"""Share of a device's memory that a suggestion of slots fills; the compiler needs the rest."""

_ADVICE = {
    "rollout": "raise mesh.fsdp or mesh.tensor, set rollout.slots or rollout.chunks, or lower rollout.prompts or "
    "rollout.max_new_tokens",
    "update": "raise mesh.fsdp, set lora.rank or model.remat=full, or lower loss.microbatch_rows",
}
"""The changes that lower the peak of each phase."""


def _to_table(plan: Plan, target: Target) -> Table:
    """The arrays of a run on one device, and the peaks of its phases, in GiB."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.setup.mesh.shape.items())
    model = plan.setup.config.model.source or "built-in model"
    table = Table("Per device", "GiB", title=f"{model} on {target.name} ({mesh})")
    for name, size in plan.residents.items():
        table.add_row(name, f"{size / _GIB:.2f}")
    for phase, parts in plan.details.items():
        for name, need in parts.items():
            table.add_row(f"  in the {phase}: {name}", f"{need / _GIB:.2f}")
    compiler = "the TPU's compiler" if has_tpu_compiler(target) else "the CPU's compiler"
    for phase, peak in plan.peaks.items():
        table.add_row(f"peak of the {phase}: sum of the arrays above, the least", f"{peak.least / _GIB:.2f}")
        compiled = "too large" if math.isinf(peak.compiled) else f"{peak.compiled / _GIB:.2f}"
        table.add_row(f"peak of the {phase}: by {compiler}", compiled)
    table.add_row("capacity", "unknown" if math.isinf(plan.capacity) else f"{plan.capacity / _GIB:.2f}")
    return table


def _across_slices(setup: Setup) -> str | None:
    """The bytes that cross from slice to slice, in one line; None = there is one slice."""
    slices = setup.mesh.shape["slice"]
    if slices == 1:
        return None
    return (
        f"across {slices} slices, by arithmetic: each slice sends {bytes_across_slices(setup) / 1e9:.3g} GB of "
        "gradients per update, once, whatever the number of microbatches; the least times below leave it out"
    )


def _slots_that_fit(plan: Plan) -> str | None:
    """The slots and stages that the free memory allows, in one line; None = completions are short, or all fit."""
    setup = plan.setup
    c, shards = setup.config, size_along(setup.mesh.shape, ROWS)
    new, rows = c.rollout.max_new_tokens, round_prompts(c) // c.rollout.chunks * c.rollout.group_size // shards
    if math.isinf(plan.capacity) or new < 2 * SHORTEST_STAGE_TOKENS:
        return None
    column, weights = decoding_bytes(setup.architecture, setup.mesh)
    others = [size for name, size in plan.details["rollout"].items() if not name.startswith("KV cache")]
    prompts = column * setup.task.train.tokens.shape[1] * rows / c.rollout.group_size
    free = plan.capacity * _SLOTS_SHARE - sum(plan.residents.values()) - sum(others) - prompts
    slots = int(free / column / new)
    if slots >= rows or slots < 1:
        return None
    count = automatic_stages(slots, new, column, weights)
    shown = ", ".join(f"{stage.slots} x {stage.columns}" for stage in make_stages(slots, count, new, rows))
    return (
        f"the free memory holds rollout.slots {slots * shards} with rollout.stages {count}: each device decodes "
        f"{shown} columns of keys and values"
    )


def _least_time(setup: Setup, device: DeviceSpec) -> str:
    """The least time of a step, in one line."""
    bounds = {"rollout": rollout_lower_bound(setup, device), "update": update_lower_bound(setup, device)}
    phases = ", ".join(
        f"{phase} {bound.seconds:.3g} s (products {bound.products:.3g}, memory {bound.memory:.3g}, "
        f"links {bound.links:.3g})"
        for phase, bound in bounds.items()
    )
    return f"least time of a step by arithmetic, every completion at its longest, not a measurement: {phases}"


def _peaks(setup: Setup, residents: dict[str, int], details: dict[str, dict[str, float]]) -> dict[str, Peak]:
    """The peak of each phase, by arithmetic and by the compiler."""
    total = sum(residents.values())
    # The arguments of a rollout are the weights, and what goes on with carry-over; the rest takes memory beside them.
    arguments = sum(residents.get(name, 0) for name in ("model", "frozen base", PENDING))
    beside = {"rollout": total - arguments, "update": 0}
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        compiled = {
            "rollout": _compiled(lowered["roll_out" if setup.config.rollout.carry else "sample"]),
            "update": _compiled(lowered["step"]),
        }
    least = {
        name: max(sum(parts.values()) for moment, parts in details.items() if moment.partition(",")[0] == name)
        for name in compiled
    }
    return {name: Peak(total + least[name], beside[name] + size, reason) for name, (size, reason) in compiled.items()}


def _compiled(program: Lowered) -> tuple[float, str]:
    """The bytes that a program needs on a device, and ""; infinity and the compiler's words if it does not fit."""
    try:
        m = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf, _first_sentences(str(error))
    assert m is not None
    arguments_and_results = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return arguments_and_results + m.temp_size_in_bytes, ""


def _first_sentences(text: str) -> str:
    """The summary in a compiler's message, without its list of buffers."""
    found = re.search(r"Used [^.]*\.\d+\w+ of [\d.]+\w+ \w+|Ran out of memory[^\n]*", text)
    return found[0] if found else text.splitlines()[0]


def _own_capacity() -> float:
    """Bytes of memory of one device of this machine; a CPU device has its share of the host's memory."""
    if jax.devices()[0].platform == "cpu":
        return host_bytes() / len(jax.devices())
    return device_bytes()


def bytes_per_device(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The bytes that arrays take on one device; the pytree is of ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _itemsize(dtype: DTypeLike) -> int:
    """Bytes of one number, or of a random key."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _residents(setup: Setup) -> dict[str, int]:
    """Bytes of the arrays that stay on a device from step to step."""
    s = setup.abstract
    parts = {
        "model": s.params,
        "frozen base": s.frozen,
        "reference": s.reference,
        "teacher": s.teacher,
        "reward model": _reward_model(setup),
        "optimizer": s.opt_state,
        "per-prompt state": (s.selector, s.advantage),
        "replay": s.replay if setup.config.replay.memory == "device" else (),
        "groups that wait for a batch": s.queue,
        PENDING: s.pending,
    }
    return {name: size for name, part in parts.items() if (size := bytes_per_device(part)) or name == "model"}


def _reward_model(setup: Setup) -> PyTree[jax.ShapeDtypeStruct]:
    """The weights of the reward model on the devices of a process; none if no reward.model is named."""
    if setup.config.reward.model is None:
        return ()
    devices = list(setup.mesh.devices.flat)
    process = devices[0].process_index
    return abstract_weights(setup.config, [device for device in devices if device.process_index == process])


def _details(setup: Setup) -> dict[str, dict[str, float]]:
    """For each phase, bytes of the further arrays that must exist at one moment."""
    c = setup.config
    on_host = c.replay.memory != "device" and c.replay.name in STORING
    stored = (
        {"replay, which is otherwise in the host's memory": float(bytes_per_device(setup.abstract.replay))}
        if on_host
        else {}
    )
    prompts = round_prompts(c) // c.rollout.chunks
    held = images.of_batch(setup, prompts), images.of_batch(setup, c.rollout.prompts)
    of_update = _update_details(setup)
    found = {"rollout": _rollout_details(setup) | held[0], "update": of_update | held[1] | stored}
    if tower := images.of_tower_in_rollout(setup):
        found["rollout, as the tower runs"] = tower | held[0]
    if tower := images.of_tower_in_update(setup):
        found["update, as the tower is differentiated"] = (
            {"gradients": _gradients(setup)} | images.embeddings_in_update(setup) | tower | held[1] | stored
        )
    return found


def _rollout_details(setup: Setup) -> dict[str, float]:
    """Bytes per device while a part of a batch is rolled out, with every completion at its longest."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    shards, tensor = size_along(mesh, ROWS), mesh["tensor"]
    width = jnp.dtype(a.compute_dtype).itemsize
    prompts, new = round_prompts(c) // c.rollout.chunks, c.rollout.max_new_tokens
    rows, slots = prompts * c.rollout.group_size, c.rollout.slots
    column = 2 * a.layers * a.kv_heads * a.head_dim * width / shards / tensor
    # The last token of a completion needs no place in the cache.
    caches, at_once = {"KV cache": column * (prompts * setup.task.train.tokens.shape[1] + rows * (new - 1))}, rows
    if slots is not None and slots < rows:
        caches, at_once = _slot_caches(setup, slots, rows, column * shards)
    decoded = sum(x.size for x in _decoded(setup.abstract.weights)) * width / tensor
    if a.split_decode:
        split = 3 * a.layers * a.width * a.mlp_width + (1 if a.tied else 2) * a.vocab_size * a.width
        decoded -= split * width / tensor * (1 - 1 / mesh["fsdp"])
    return {
        # Where nothing splits the weights, decoding may use them where they are.
        "weights as they are decoded": decoded if size_along(mesh, WEIGHTS) > 1 else 0.0,
        "logits of one token": 4 * at_once * a.vocab_size / shards / tensor,
        **caches,
    }


def _gradients(setup: Setup) -> float:
    """Bytes per device of the float32 gradient of all weights that train."""
    return float(sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(setup.abstract.params)))


def _decoded(weights: PyTree) -> list[jax.ShapeDtypeStruct]:
    """The weights that decoding reads: all but the vision tower's."""
    found = jax.tree_util.tree_leaves_with_path(weights)
    return [x for path, x in found if jax.tree_util.DictKey("vision") not in path]


def _slot_caches(setup: Setup, slots: int, rows: int, column: float) -> tuple[dict[str, float], int]:
    """Bytes of the keys and values on a device where completions are decoded in slots, by name; and the largest number
    of completions that all devices decode at a time.

    The slots of one stage exist at a time, beside all rows that wait between stages.

    Args:
      column: bytes of the keys and values of a token on a device.
    """
    c, shards = setup.config, size_along(setup.mesh.shape, ROWS)
    new, prompt = c.rollout.max_new_tokens, setup.task.train.tokens.shape[1]
    stages = make_stages(slots // shards, c.rollout.stages or 1, new, rows // shards)
    largest = max(stages, key=lambda stage: stage.slots * (stage.columns + prompt))
    shown = ", ".join(f"{stage.slots} x {stage.columns}" for stage in stages)
    found = {
        "KV cache of prompts": column * prompt * rows / c.rollout.group_size / shards,
        f"KV cache of a stage's slots and their prompts ({shown})": column * largest.slots * (largest.columns + prompt),
    }
    if len(stages) > 1:
        waiting = cache_columns(stages) - max(stage.slots * stage.columns for stage in stages)
        shown = ", ".join(str(stage.waiting) for stage in stages[1:])
        found[f"KV cache of rows between stages ({shown})"] = column * waiting
    return found, shards * max(stage.slots for stage in stages)


def _update_details(setup: Setup) -> dict[str, float]:
    """Bytes per device as the backward pass of a microbatch begins: gradients, kept activations, and those in use."""
    c, a, mesh = setup.config, setup.architecture, setup.mesh.shape
    tensor, width = mesh["tensor"], jnp.dtype(a.compute_dtype).itemsize
    new, rows = c.rollout.max_new_tokens, update_completions(c) // c.loss.minibatches
    # Only a divergence over the vocabulary has the teacher beside the policy in a microbatch.
    teacher = setup.teacher if c.teacher.divergence != "sampled" else None
    model = setup.model if teacher is None else packed_alike(setup.model, teacher.model)
    vocabulary = a.vocab_size + (0 if teacher is None else teacher.architecture.vocab_size)
    with jax.set_mesh(setup.mesh):
        packed = packs_lengths(rows, new, c)
        at_once, predictions = microbatch_size(rows, c.loss.microbatch_rows), new
        length = setup.task.train.tokens.shape[1] + new
        if packed:
            bins = bin_shape(rows, length - new, new, model, c)
            at_once, length = bins.at_a_time, bins.length
            predictions = bins.predictions(shares_prompts(model, c))
    tokens = at_once * length / size_along(mesh, UPDATE_ROWS) / mesh["context"]
    # The backward pass of attention needs q, k and v, and that of the MLP needs gate and up, whichever weights train.
    inner = ((a.heads + 2 * a.kv_heads) * a.head_dim + 2 * a.mlp_width) / tensor
    kept = {"none": inner + a.width, "dots": inner + a.width, "full": a.width, "offload": 0}[a.remat]
    again = inner if a.remat in ("full", "offload") else 0
    columns = chunk_columns(at_once, predictions, vocabulary, logits_mib(c), packed)
    # Chunks are of equal size, which may be less than the config allows.
    chunk = 4 * vocabulary * at_once * columns / 2 / size_along(mesh, UPDATE_ROWS) / mesh["context"] / tensor
    states = 0.0 if teacher is None else tokens / length * predictions * width * teacher.architecture.width
    return {
        # The gradients of a single microbatch are made as its activations are freed.
        "gradients": _gradients(setup) if packed or at_once < rows else 0.0,
        f"activations kept (model.remat {a.remat})": a.layers * tokens * width * kept,
        "a block's activations, or a chunk of logits": max(tokens * width * again, chunk),
        **({"the teacher's hidden states": states} if states else {}),
    } | images.embeddings_in_update(setup)
