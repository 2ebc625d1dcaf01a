"""Defaults that follow the machine: compute type, activations that are kept, packing, and the size of microbatches.

On a TPU or GPU, products run in bfloat16, the backward pass recomputes blocks, and long rows are packed. Most CPUs
emulate bfloat16, and their memory is large compared with their speed; there, rows of any length are worth packing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.schema import LEAST_LOGITS_MIB, Config, Dtype, Remat, round_prompts, update_completions
from pspo_jax.distributed import processes
from pspo_jax.distributed.devices import host_bytes
from pspo_jax.distributed.mesh import ROWS, UPDATE_ROWS, microbatch_size, size_along, smallest_fsdp, split_into_slices
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.xla import block_size
from pspo_jax.model.weights import Weight, named_weights, table, trained_and_frozen
from pspo_jax.rollout.stages import automatic_stages, make_stages

ENOUGH_TOKENS = 256
"""Number of tokens of a microbatch of packed rows beyond which a CPU hardly computes a token faster."""
_LOGITS_FROM_BYTES, _LOGITS_SHARE, _MOST_LOGITS_MIB = 16 * 2**30, 1 / 48, 1280
"""loss.logits_mib of an accelerator: so much of its memory beyond so many bytes, and the largest number."""
_MEMORY_SHARE = 0.25
"""Share of a CPU's memory that activations may take by default; weights, optimizer and rollouts need the rest."""


def with_type(config: Config, on_cpu: bool) -> tuple[Config, list[str]]:
    """`config` with model.compute_dtype filled in if it is None, and a text on each choice and its reason."""
    if config.model.compute_dtype is not None:
        return config, []
    chosen, why = compute_dtype(on_cpu)
    return replace(config, {"model.compute_dtype": chosen}), [f"model.compute_dtype {chosen} ({why})"]


def compute_dtype(on_cpu: bool) -> tuple[Dtype, str]:
    """The default type of products on a machine, and the reason in words.

    XLA emulates bfloat16 on most CPUs. Where the processor's flags name bfloat16, measurements have disagreed on which
    type is faster, so the flags do not decide.
    """
    if on_cpu:
        return "float32", "bfloat16 is emulated on most CPUs; set it where yours is faster with it"
    return "bfloat16", "an accelerator's own"


def with_fsdp(
    config: Config, a: Architecture, capacity: float, devices: Sequence[jax.Device], teacher: Architecture | None
) -> Config:
    """The config with mesh.fsdp, which follows from the memory of weights, optimizer state and a gradient if unset.

    Args:
      capacity: bytes of a device.
      devices: the devices of the run; fsdp stays within a slice.
      teacher: the architecture of the teacher, whose weights take memory too; None = there is none.
    """
    if config.mesh.fsdp is not None:
        return config
    itemsize = jnp.dtype(a.param_dtype).itemsize
    held = itemsize * _size(table(a))
    if a.lora is None:
        trained = _size(trained_and_frozen(a)[0])
        # AdamW keeps two numbers a weight, and a gradient is a third, all float32. Adapters and their state are small.
        held += 12 * trained + (itemsize * trained if config.loss.kl_coef > 0 else 0)
    width = a.split_width
    if teacher is not None:
        held += jnp.dtype(teacher.param_dtype).itemsize * _size(table(teacher))
        width = math.gcd(width, teacher.split_width)
    of_slice = len(split_into_slices(config, devices)[0])
    fsdp = smallest_fsdp(held, capacity, of_slice // (config.mesh.tensor * config.mesh.context) or 1, width)
    return replace(config, {"mesh.fsdp": fsdp})


def _size(weights: PyTree[Weight]) -> int:
    """Number of parameters of a table."""
    return sum(math.prod(w.shape) for _, w in named_weights(weights))


def with_memory(
    config: Config, a: Architecture, mesh: Mesh, prompt_length: int, on_cpu: bool
) -> tuple[Config, list[str]]:
    """`config` with the fields that depend on memory filled in where they are None, and a text on each choice.

    The fields are model.remat, loss.packing and loss.microbatch_tokens.
    """
    values: dict[str, object] = {}
    words = []
    if config.model.remat is None:
        values["model.remat"], why = _remat(config, a, mesh, prompt_length) if on_cpu else ("full", "memory is scarce")
        words.append(f"model.remat {values['model.remat']} ({why})")
    if config.loss.packing is None and on_cpu and not uses_char_tokenizer(config):
        values["loss.packing"] = True
        words.append("loss.packing true (padding would be computed)")
    if on_cpu and config.loss.microbatch_tokens is None and (config.loss.packing or "loss.packing" in values):
        values["loss.microbatch_tokens"] = ENOUGH_TOKENS
        words.append(f"loss.microbatch_tokens {ENOUGH_TOKENS} (larger products are hardly faster)")
    return replace(config, values), words


def with_logits(config: Config, capacity: float, on_cpu: bool) -> tuple[Config, list[str]]:
    """`config` with loss.logits_mib filled in if it is None and the machine has an accelerator of much memory.

    Args:
      capacity: bytes of a device.
    Returns:
      The config, and a text on the choice.
    """
    if config.loss.logits_mib is not None or on_cpu or not math.isfinite(capacity):
        return config, []
    more = max(0.0, capacity - _LOGITS_FROM_BYTES) * _LOGITS_SHARE / 2**20
    mib = min(LEAST_LOGITS_MIB + round(more), _MOST_LOGITS_MIB)
    if mib == LEAST_LOGITS_MIB:
        return config, []
    return replace(config, {"loss.logits_mib": mib}), [f"loss.logits_mib {mib} (larger chunks of logits are faster)"]


def with_stages(config: Config, a: Architecture, mesh: Mesh) -> tuple[Config, list[str]]:
    """`config` with rollout.stages filled in if it is None and slots are set, and a text on the choice.

    Raises:
      ConfigError: the memory of rollout.slots is too small for so many stages.
    """
    c = config.rollout
    if c.slots is None:
        return config, []
    shards = size_along(mesh.shape, ROWS)
    slots, rows = c.slots // shards, round_prompts(config) // c.chunks * c.group_size // shards
    words = []
    count = c.stages
    if count is None:
        column, weights = decoding_bytes(a, mesh)
        count = automatic_stages(slots, c.max_new_tokens, column, weights)
        reason = "reading weights costs more than keys and values" if count == 1 else "keys and values cost most"
        words = [f"rollout.stages {count} ({reason})"]
    make_stages(slots, count, c.max_new_tokens, rows)
    return replace(config, {"rollout.stages": count}), words


def decoding_bytes(a: Architecture, mesh: Mesh) -> tuple[float, float]:
    """Bytes on a device of the keys and values of a token, and of the weights that a step of decoding reads."""
    shape: Mapping[str, int] = mesh.shape
    width = jnp.dtype(a.compute_dtype).itemsize / shape["tensor"]
    column = 2 * a.layers * a.kv_heads * a.head_dim
    block = a.width * (2 * a.heads + 2 * a.kv_heads) * a.head_dim + 3 * a.width * a.mlp_width
    return column * width, (a.layers * block + a.vocab_size * a.width) * width


def _remat(config: Config, a: Architecture, mesh: Mesh, prompt_length: int) -> tuple[Remat, str]:
    """The remat that recomputes least within the memory that activations may take, and the reason in words."""
    allowed = host_bytes() * _MEMORY_SHARE / max(jax.local_device_count(), 1)
    kinds: tuple[Remat, ...] = ("none", "dots")
    for kind in kinds:
        size = sum(activations(config, a, kind, mesh, prompt_length))
        if not processes.any_process(size > allowed):
            return kind, f"activations of {size / 2**30:.2f} GiB fit"
    return "full", "activations would not fit"


def activations(config: Config, a: Architecture, remat: Remat, mesh: Mesh, prompt_length: int) -> tuple[float, float]:
    """Bytes of activations on a device: those that a microbatch's forward pass keeps, and those inside one block."""
    shape: Mapping[str, int] = mesh.shape
    tensor, width = shape["tensor"], jnp.dtype(a.compute_dtype).itemsize
    rows = update_completions(config) // config.loss.minibatches
    with jax.set_mesh(mesh):
        rows = microbatch_size(rows, config.loss.microbatch_rows) // size_along(shape, UPDATE_ROWS)
    length = prompt_length + config.rollout.max_new_tokens
    places = rows * length / shape["context"]
    projections = (a.heads + 2 * a.kv_heads) * a.head_dim / tensor + 2 * a.mlp_width / tensor + 2 * a.width
    block = block_size(length, shape["context"]) / length
    by_kernel = "xla" not in (a.attention, a.packed_attention)
    scores = 0 if by_kernel else places * block * a.heads / tensor * length * (4 + width)
    inside = places * width * (projections + 2 * a.mlp_width / tensor + 2 * a.width) + scores
    kept: dict[Remat, float] = {
        "none": inside if math.isclose(block, 1) else inside - scores,
        "dots": places * width * (projections + a.width),
        "full": places * width * a.width,
        "offload": 0,
    }
    return a.layers * kept[remat], inside
