"""The device mesh (data, fsdp, context, tensor), and the one table from logical axes to mesh axes.

Model code names dimensions ("heads", "mlp"); what a name means on a mesh is said here alone, so a new layout of the
same model is a change of this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspo_jax.arrays.per_prompt import FANOUT, padded_rows
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, round_prompts

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp", "context")
"""Mesh axes that split a batch of rollouts, per-prompt state and stored groups."""
UPDATE_ROWS = ("data", "fsdp")
"""Mesh axes that split the rows of an update, whose places are along context."""
WEIGHTS = ("fsdp", "context")
"""Mesh axes that split every weight."""

RULES: dict[str, Any] = {
    "batch": ROWS,
    "outer_batch": "data",  # a batch whose other dimensions take fsdp
    "rows": UPDATE_ROWS,
    "length": "context",
    "prompts": ROWS,  # per-prompt state, N long
    "embed": WEIGHTS,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "split_mlp": ("tensor", "fsdp"),  # decoding with rollout.weights=split
    "split_vocab": ("tensor", "fsdp"),
}


def spec(axes: tuple[str | None, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """PartitionSpec of logical axes on a mesh of this shape; axes that it lacks split nothing."""
    return PartitionSpec(*(_on(mesh, RULES[a]) if a else None for a in axes))


def _on(mesh: Mapping[str, int], rule: str | tuple[str, ...] | None) -> Any:
    if rule is None or isinstance(rule, str):
        return rule if rule in mesh else None
    return tuple(axis for axis in rule if axis in mesh) or None


def make_mesh(config: Config, shape: Any = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh a config asks for, over the first devices.

    Args:
      shape: has heads, kv_heads, mlp_width and width, such as an Architecture; None = config.policy.
      devices: None = all that JAX has.
    Raises:
      ConfigError: it does not fit the devices, the batch or the policy; the message names a value that works.
    """
    m, devices = config.mesh, jax.devices() if devices is None else devices
    fsdp = m.fsdp or 1
    inner = fsdp * m.context * m.tensor
    if m.data == 0:
        raise ConfigError("mesh.data=0: must be at least 1, or -1 for all devices that fsdp and tensor leave")
    data = len(devices) // inner if m.data == -1 else m.data
    inside = f"mesh.fsdp={fsdp} x mesh.context={m.context} x mesh.tensor={m.tensor}"
    if data * inner > len(devices) or data == 0:
        raise ConfigError(
            f"mesh.data={m.data} x {inside}: needs {max(data, 1) * inner} devices, there are {len(devices)}; "
            "lower one of them"
        )
    if m.data == -1 and data * inner != len(devices):
        raise ConfigError(f"{inside}: does not divide the {len(devices)} devices; choose divisors, or set mesh.data")
    if jax.process_count() > 1 and data * inner != len(devices):
        raise ConfigError(
            f"mesh.data={m.data} x {inside}: needs {data * inner} devices, and the {jax.process_count()} processes "
            f"have {len(devices)}, all of which take part; set mesh.data=-1"
        )
    _check_divides(config, data * fsdp * m.context, shape or config.model)
    sizes = (data, fsdp, m.context, m.tensor)
    # An axis of the mesh may be a part of one of a TPU slice's, such as 2 x 2 x 4 on 4 x 4; jax.make_mesh refuses that.
    grid = create_device_mesh(sizes, devices[: math.prod(sizes)], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def smallest_fsdp(state_bytes: float, capacity: float, devices: int, width: int) -> int:
    """The fewest devices that leave half of each one's memory free of weights, gradients and optimizer state.

    A divisor of the devices and of the policy's width; the largest there is, if none is enough.

    Args:
      capacity: bytes of a device; infinity = unknown.
    """
    works = [d for d in range(1, devices + 1) if devices % d == 0 and width % d == 0]
    return next((d for d in works if state_bytes / d <= capacity / 2), works[-1])


def _check_divides(c: Config, row_shards: int, shape: Any) -> None:
    where = f"mesh.data x mesh.fsdp{' x mesh.context' if c.mesh.context > 1 else ''} = {row_shards}"
    minibatch = c.rollout.prompts // c.loss.minibatches
    for name, size in (
        ("rollout.prompts", c.rollout.prompts),
        ("prompts of a minibatch", minibatch),
        ("prompts of a chunk (rollout.chunks)", round_prompts(c) // c.rollout.chunks),
        ("rollout.slots", c.rollout.slots or row_shards),
        ("sft.batch", c.sft.batch if c.sft.steps else row_shards),
    ):
        if size % row_shards:
            works = max(d for d in range(1, row_shards + 1) if size % d == 0 and row_shards % d == 0)
            raise ConfigError(f"{where}: does not divide {name}={size}; {works} would, or make it a multiple")
    weights = "mesh.fsdp x mesh.context" if c.mesh.context > 1 else "mesh.fsdp"
    split = (c.mesh.fsdp or 1) * c.mesh.tensor if c.rollout.weights == "split" else 1
    for name, size, shards, axis in (
        ("model.heads", shape.heads, c.mesh.tensor, "mesh.tensor"),
        ("model.kv_heads", shape.kv_heads, c.mesh.tensor, "mesh.tensor"),
        ("model.mlp_width", shape.mlp_width, c.mesh.tensor, "mesh.tensor"),
        ("model.width", shape.width, (c.mesh.fsdp or 1) * c.mesh.context, weights),
        ("model.mlp_width", shape.mlp_width, split, "rollout.weights=split: mesh.fsdp x mesh.tensor"),
    ):
        if size % shards:
            works = max(d for d in range(1, shards + 1) if size % d == 0)
            raise ConfigError(f"{axis}={shards}: does not divide {name}={size}; {works} would")


def size_along(shape: Mapping[str, int], axes: Sequence[str]) -> int:
    """Devices along several axes of a mesh's shape; an axis that it lacks counts one."""
    return math.prod(shape.get(axis, 1) for axis in axes)


def microbatch_size(rows: int, at_most: int) -> int:
    """The largest divisor of `rows` up to `at_most` (0 = no bound) that spreads evenly over the mesh in context.

    Raises:
      ConfigError: the mesh does not divide the rows.
    """
    shards = size_along(jax.sharding.get_abstract_mesh().shape, UPDATE_ROWS)
    if rows % shards:
        raise ConfigError(
            f"mesh.data x mesh.fsdp = {shards}: does not divide the {rows} completions that are computed together; "
            "make rollout.prompts x rollout.group_size a multiple of it, or choose another mesh"
        )
    limit = max(at_most or rows, shards)
    return max(d for d in range(1, rows + 1) if rows % d == 0 and d % shards == 0 and d <= limit)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the layout of an array inside jit; without a mesh in context, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, mesh.shape))


def gather_for_decode(w: jax.Array, axes: tuple[str | None, ...], split: bool) -> jax.Array:
    """A weight as decoding wants it, gathered once and not per token.

    Whole along fsdp, still split along tensor; with `split`, MLPs and vocabulary are split along both.
    """
    wide = {"mlp": "split_mlp", "vocab": "split_vocab"} if split else {}
    return constrain(w, *(None if name == "embed" else wide.get(name or "", name) for name in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(mesh: Mesh, params: Any, axes: Any) -> Any:
    """A NamedSharding for each weight; `axes` as in Policy.axes."""
    if axes is None:
        return jax.tree.map(lambda _: replicated(mesh), params)
    return jax.tree.map(
        lambda names, _: NamedSharding(mesh, spec(names, mesh.shape)),
        axes,
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def prompts_shardings(mesh: Mesh, tree: Any, num_prompts: int) -> Any:
    """Per-prompt state: arrays with a row a prompt are split over the batch axes in whole blocks, the rest replicated.

    Where blocks do not divide, which happens to at most 16,384 prompts unless the mesh is odd, all are replicated.
    """
    shards = size_along(mesh.shape, ROWS)
    rows = padded_rows(num_prompts)

    def one(x: Any) -> NamedSharding:
        split = x.ndim > 0 and x.shape[0] == rows and rows // FANOUT % shards == 0
        return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)) if split else PartitionSpec())

    return jax.tree.map(one, tree)


def groups_shardings(mesh: Mesh, tree: Any) -> Any:
    """Stored groups: arrays with a row a group are split over the batch axes where these divide them."""
    shards = size_along(mesh.shape, ROWS)

    def one(x: Any) -> NamedSharding:
        split = x.ndim > 0 and x.shape[0] % shards == 0
        return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)) if split else PartitionSpec())

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)))


def check_vocabulary(config: Config, rows: int) -> None:
    """Raise ConfigError for a mesh that does not divide the `rows` of the embedding among its devices."""
    m = config.mesh
    if rows % m.tensor:
        raise ConfigError(f"mesh.tensor={m.tensor}: does not divide the vocabulary of {rows}; choose a divisor")
    split = (m.fsdp or 1) * m.tensor if config.rollout.weights == "split" else 1
    if rows % split:
        raise ConfigError(
            f"rollout.weights=split: mesh.fsdp x mesh.tensor = {split} does not divide the vocabulary of {rows}; use "
            "gathered, or a smaller mesh.fsdp"
        )
