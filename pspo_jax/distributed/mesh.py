"""The device mesh, and the one table that says which of its axes splits which dimension of an array.

A mesh arranges the devices along five axes:

- slice: the slices of a TPU that a data-centre network joins, each with all weights and its own part of the batch. That
  network is slow, so that slices work on their own (`on_each_slice`) and add up their gradients once per update.
- data: each device has all weights and its own part of the batch.
- fsdp: each device has its own part of the batch, and its own part of every matrix, of its gradient and of its
  optimizer state. A weight is gathered just before a layer uses it, and its gradient is scattered afterwards (FSDP,
  ZeRO-3).
- context: the devices share the rows of an update by their positions, for rows that are too long for one device.
  They split weights as fsdp does.
- tensor: the devices share every row, and split heads, MLP width and vocabulary. Weights stay where they are;
  instead, activations are summed over these devices twice a block.

Model code names dimensions ("heads", "mlp") and knows nothing of the mesh. `RULES` says which axes of the mesh split
a dimension of each name, so that another layout of the same model is a change of this table alone.

Names for activations:

- "rows" and "length" are the rows of an update and their positions. Rows are split along slice, data and fsdp,
  positions along context. Norms, MLPs and projections compute each position by itself; attention alone needs other
  positions, and gathers keys and values along context.
- "batch" is the rows of a rollout, with their caches. A rollout computes one position of each row at a time, which
  leaves context nothing to split along a row, so that it splits the rows as slice, data and fsdp do. Prompts whose
  images pass through the vision tower are split the same way, in rollouts and in updates, since images have no
  positions of a row.
- "outer_batch" is rows of an array in which another dimension takes fsdp and context. This is so where tokens are
  embedded, since the embedding is split along its width, and where decoding splits the MLPs (below).

Names for weights:

- "embed" is the width D of the residual stream. Every matrix has it once, as its input or its output. Splitting it
  along fsdp and context therefore divides all matrices evenly, whatever the number of heads and the width of the
  MLP.
  "embed_and_data" is the same dimension of a gradient while it crosses from slice to slice.
- "heads", "kv_heads" and "mlp" are the inner dimensions of attention and MLP, in the language model and in the vision
  tower. With these along tensor, the first product of each needs no communication, and the last one ends in one sum
  over the devices.
- "vocab" is the rows of the embedding and the columns of the head. Logits, the largest activation of all, are then
  split along tensor too.
- "layers" is the axis along which the weights of the blocks are stacked. It is not split, since the loop over layers
  computes one layer after another on all devices.
- Dimensions without a name, such as the width of a head or that of a norm, are small and are not split.

Decoding reads every weight for every token, and to gather weights for each token would take longer than the
products. It gathers them along fsdp and context once, before the loop over tokens (`gather_for_decode`). Where the
gathered weights do not fit, rollout.weights=split leaves the MLPs ("split_mlp"), the embedding and the head
("split_vocab") split along fsdp, as if fsdp were a part of tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from pspo_jax.arrays.per_prompt import FANOUT, padded_rows
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, extra_completions, round_prompts

Results = TypeVar("Results")

AXES = ("slice", "data", "fsdp", "context", "tensor")
"""The axes of a mesh, in the order of its dimensions."""
ROWS = ("slice", "data", "fsdp", "context")
"""Mesh axes that split a batch of rollouts, per-prompt state and stored groups."""
UPDATE_ROWS = ("slice", "data", "fsdp")
"""Mesh axes that split the rows of an update; context splits their positions."""
WEIGHTS = ("fsdp", "context")
"""Mesh axes that split every matrix."""
BY_SLICE = PartitionSpec("slice")
"""The arrays of which every slice has its own part along their first dimension; see `on_each_slice`."""
WHOLE = PartitionSpec()
"""The arrays of which every slice has all."""

MeshAxes = str | tuple[str, ...] | None
"""The mesh axes that split a dimension; None = it is not split."""

RULES: dict[str, MeshAxes] = {
    "rows": UPDATE_ROWS,
    "length": "context",
    "batch": ROWS,
    "outer_batch": ("slice", "data"),
    "embed": WEIGHTS,
    "embed_and_data": (*WEIGHTS, "data"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "split_mlp": ("tensor", "fsdp"),
    "split_vocab": ("tensor", "fsdp"),
}
"""The mesh axes of each logical axis; the reasons stand at the top of this file."""


class ModelShape(Protocol):
    """The sizes of a model that a mesh splits; an `Architecture` and a `ModelConfig` have them."""

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def width(self) -> int: ...


class TowerShape(Protocol):
    """The sizes of a vision tower that a mesh splits; a `Vision` has them."""

    @property
    def heads(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def width(self) -> int: ...


def spec(axes: tuple[str | None, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; None = the dimension is not split.

    Args:
      mesh: size of each axis of the mesh; an axis that it lacks splits nothing.
    """
    return PartitionSpec(*(_on(mesh, RULES[a]) if a else None for a in axes))


def _on(mesh: Mapping[str, int], rule: MeshAxes) -> MeshAxes:
    """The axes of a rule that a mesh has."""
    if rule is None or isinstance(rule, str):
        return rule if rule in mesh else None
    return tuple(axis for axis in rule if axis in mesh) or None


def make_mesh(config: Config, shape: ModelShape | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config asks for, over the first of the devices, or over the first of each slice.

    Args:
      shape: the sizes of the model; None = those of config.model.
      devices: None = all that JAX has.
    Raises:
      ConfigError: the mesh does not fit the devices, the batch or the model; the message names a value that works.
    """
    m, devices = config.mesh, jax.devices() if devices is None else devices
    slices = split_into_slices(config, devices)
    fsdp = m.fsdp or 1
    inner = fsdp * m.context * m.tensor
    if m.data == 0:
        raise ConfigError("mesh.data=0: must be at least 1, or -1 for all devices that fsdp and tensor leave")
    inside = f"mesh.fsdp={fsdp} x mesh.context={m.context} x mesh.tensor={m.tensor}"
    _check_slices(config, len(slices), len(slices[0]), inner, inside)
    data = len(devices) // inner if m.data == -1 else m.data
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
    sizes = (data // len(slices), fsdp, m.context, m.tensor)
    # An axis of the mesh may be a part of an axis of a TPU slice, as in a mesh of 2 x 2 x 4 on a slice of 4 x 4;
    # jax.make_mesh refuses that.
    grids = [create_device_mesh(sizes, part[: math.prod(sizes)], allow_split_physical_axes=True) for part in slices]
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_into_slices(config: Config, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice: those of the TPU slices that JAX reports, or else mesh.slices parts in their order.

    Raises:
      ConfigError: the slices are of different sizes, or mesh.slices does not fit them.
    """
    reported: dict[int, list[jax.Device]] = {}
    for device in devices:
        number = device.slice_index if device.platform == "tpu" else 0
        reported.setdefault(number, []).append(device)
    sizes = [len(reported[number]) for number in sorted(reported)]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"mesh.slices={config.mesh.slices}: the TPU's slices have {', '.join(map(str, sizes))} devices; all need "
            "equally many"
        )
    wanted = config.mesh.slices or len(sizes)
    if len(sizes) > 1:
        if wanted != len(sizes):
            raise ConfigError(f"mesh.slices={wanted}: JAX reports {len(sizes)} slices of {sizes[0]} devices; drop it")
        return [reported[number] for number in sorted(reported)]
    size = len(devices) // wanted
    if size * wanted != len(devices):
        raise ConfigError(f"mesh.slices={wanted}: does not divide the {len(devices)} devices; choose a divisor")
    ordered = sorted(devices, key=lambda device: device.process_index)
    return [ordered[i * size : (i + 1) * size] for i in range(wanted)]


def _check_slices(config: Config, slices: int, size: int, inner: int, inside: str) -> None:
    """Raise ConfigError if the axes inside a slice do not divide its devices, or the slices do not divide data.

    Args:
      size: number of devices of a slice.
      inner: product of the axes inside a slice but for data.
      inside: these axes in words.
    """
    if slices == 1:
        return
    where = f"mesh.slices={slices}"
    if config.rollout.weights == "split" and config.mesh.tensor * config.mesh.context > 1:
        # Lookups of `cannot_index_split` would move the whole embedding for each token.
        raise ConfigError(
            f"{where}: rollout.weights=split does not go with mesh.tensor={config.mesh.tensor} x "
            f"mesh.context={config.mesh.context} within a slice; use gathered"
        )
    if size % inner:
        raise ConfigError(f"{inside}: does not divide the {size} devices of each of the {slices} slices; lower one")
    if config.mesh.data > 0 and config.mesh.data % slices:
        raise ConfigError(f"{where}: does not divide mesh.data={config.mesh.data}, which counts all slices; set -1")


def smallest_fsdp(state_bytes: float, capacity: float, devices: int, width: int) -> int:
    """The fewest devices that must share the training state so that it takes half of a device's memory at most.

    The number divides the devices and the model's width; it is the largest such number if none is enough.

    Args:
      state_bytes: bytes of weights, gradients and optimizer state together.
      capacity: bytes of a device; infinity = unknown.
      width: D.
    """
    works = [d for d in range(1, devices + 1) if devices % d == 0 and width % d == 0]
    return next((d for d in works if state_bytes / d <= capacity / 2), works[-1])


def _check_divides(c: Config, row_shards: int, shape: ModelShape) -> None:
    """Raise ConfigError if the mesh does not divide a size of the batch or of the model.

    Args:
      row_shards: number of devices that split the batch.
    """
    where = f"mesh.data x mesh.fsdp{' x mesh.context' if c.mesh.context > 1 else ''} = {row_shards}"
    minibatch = c.rollout.prompts // c.loss.minibatches
    for name, size in (
        ("rollout.prompts", c.rollout.prompts),
        ("prompts of a minibatch", minibatch),
        ("completions that replay.extra adds to a minibatch", extra_completions(c) // c.loss.minibatches),
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
    """Number of devices along several axes of a mesh; an axis that it lacks counts as one."""
    return math.prod(shape.get(axis, 1) for axis in axes)


def split_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in context that can split an array; inside `on_each_slice`, "slice" is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def num_slices() -> int:
    """Number of slices among which work can be divided; 1 inside `on_each_slice`, and without a mesh in context."""
    return split_axes().get("slice", 1)


def in_slice() -> bool:
    """Whether this is traced inside `on_each_slice`."""
    return "slice" in jax.sharding.get_abstract_mesh().manual_axes


def cannot_index_split() -> bool:
    """Whether no array may be indexed along a dimension that the mesh in context splits.

    Inside `on_each_slice`, XLA's partitioner aborts the process at a gather or scatter along such a dimension where
    another axis splits, or copies, the array too: a check fails in `ExpandDeviceGroupsWithIota` of
    `spmd_partitioner_util.cc`, in jaxlib 0.10.2 and 0.12.0.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return "slice" in mesh.manual_axes and size_along(mesh.shape, ("context", "tensor")) > 1


def whole_to_index(x: Array) -> Array:
    """The array as it is, or whole on every device of a slice if `cannot_index_split`."""
    return constrain(x, *[None] * x.ndim) if cannot_index_split() else x


def on_each_slice(
    function: Callable[..., Results], in_specs: tuple[PartitionSpec, ...], out_specs: PyTree[PartitionSpec]
) -> Callable[..., Results]:
    """The function, run by each slice on its own part of the arrays; within a slice the mesh splits them as ever.

    The function may use collectives along "slice". It must return results that are WHOLE equal on all slices.

    Args:
      in_specs: BY_SLICE or WHOLE for each argument.
      out_specs: the same for each result.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"slice"}, check_vma=False)


def sum_over_slices(tree: PyTree, axes: PyTree | None) -> PyTree:
    """The sum over slices of gradients, inside `on_each_slice`; only one copy of them leaves a slice.

    Devices along data hold the same sum of their slice. Each of them sends a part of it, where data divides it, and the
    parts come together again inside the slice.

    Args:
      axes: see `Model.axes`.
    """
    mesh = split_axes()
    if axes is None:
        return jax.lax.psum(tree, "slice")

    def one(names: tuple[str | None, ...], x: Array) -> Array:
        wider = tuple(
            "embed_and_data" if name == "embed" and _divides(mesh, names, x.shape) else name for name in names
        )
        # Without the second of these constraints the compiler would bring the parts together before the sum.
        return constrain(constrain(jax.lax.psum(constrain(x, *wider), "slice"), *wider), *names)

    return jax.tree.map(one, axes, tree, is_leaf=lambda x: isinstance(x, tuple))


def _divides(mesh: Mapping[str, int], names: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether data, beside the axes that split weights, divides the dimension "embed" of a weight."""
    sizes = [size for name, size in zip(names, shape, strict=True) if name == "embed"]
    return bool(sizes) and sizes[0] % size_along(mesh, (*WEIGHTS, "data")) == 0


def microbatch_size(rows: int, at_most: int, axes: Sequence[str] = UPDATE_ROWS) -> int:
    """Rows of a microbatch: the largest divisor of `rows` that the mesh in context divides evenly.

    Args:
      rows: number of rows that are computed together.
      at_most: upper bound; 0 = none. Where it is less than the number of devices that split rows, it is that number.
      axes: mesh axes that split the rows.
    Raises:
      ConfigError: the mesh does not divide the rows.
    """
    shards = size_along(split_axes(), axes)
    if rows % shards:
        raise ConfigError(
            f"{' x '.join(f'mesh.{axis}' for axis in axes)} = {shards}: does not divide the {rows} completions that "
            "are computed together; make rollout.prompts x rollout.group_size a multiple of it, or choose another mesh"
        )
    limit = max(at_most or rows, shards)
    return max(d for d in range(1, rows + 1) if rows % d == 0 and d % shards == 0 and d <= limit)


def constrain(x: Array, *axes: str | None) -> Array:
    """The array with its layout pinned, inside jit; without a mesh in context, the array as it is.

    Args:
      axes: logical axis of each dimension, None = it is not split.
    """
    mesh = split_axes()
    return jax.lax.with_sharding_constraint(x, spec(axes, mesh)) if mesh else x


def gather_for_decode(w: Array, axes: tuple[str | None, ...], split: bool) -> Array:
    """A weight in the layout for decoding: gathered along fsdp and context, still split along tensor.

    Args:
      axes: logical axis of each dimension.
      split: whether MLPs and vocabulary stay split along fsdp too; see rollout.weights.
    """
    wide = {"mlp": "split_mlp", "vocab": "split_vocab"} if split else {}
    return constrain(w, *(None if name == "embed" else wide.get(name or "", name) for name in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def params_shardings(mesh: Mesh, params: PyTree, axes: PyTree | None) -> PyTree[NamedSharding]:
    """A NamedSharding for each weight.

    Args:
      axes: see `Model.axes`.
    """
    if axes is None:
        return jax.tree.map(lambda _: replicated(mesh), params)
    return jax.tree.map(
        lambda names, _: NamedSharding(mesh, spec(names, mesh.shape)),
        axes,
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def prompts_shardings(mesh: Mesh, tree: PyTree, num_prompts: int) -> PyTree[NamedSharding]:
    """A NamedSharding for each array of per-prompt state, such as a selector's.

    Arrays with a row for each prompt are split over the batch axes in whole blocks; others are replicated. If the mesh
    does not divide the blocks, all are replicated; unless the mesh is odd, this happens to 16,384 prompts at most.
    """
    shards = size_along(mesh.shape, ROWS)
    rows = padded_rows(num_prompts)

    def one(x: Array) -> NamedSharding:
        split = x.ndim > 0 and x.shape[0] == rows and rows // FANOUT % shards == 0
        return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)) if split else PartitionSpec())

    return jax.tree.map(one, tree)


def groups_shardings(mesh: Mesh, tree: PyTree) -> PyTree[NamedSharding]:
    """A NamedSharding for each array of stored groups, split over the batch axes if these divide the groups."""
    shards = size_along(mesh.shape, ROWS)

    def one(x: Array) -> NamedSharding:
        split = x.ndim > 0 and x.shape[0] % shards == 0
        return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)) if split else PartitionSpec())

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(_on(mesh.shape, ROWS)))


def check_model(config: Config, shape: ModelShape, rows: int, where: str) -> None:
    """Raise ConfigError if the mesh does not divide a model beside the one that trains.

    Args:
      rows: rows of its embedding.
      where: field and value that name the model, for messages.
    """
    m = config.mesh
    for name, size, shards, axis in (
        ("heads", shape.heads, m.tensor, "mesh.tensor"),
        ("key/value heads", shape.kv_heads, m.tensor, "mesh.tensor"),
        ("MLP width", shape.mlp_width, m.tensor, "mesh.tensor"),
        ("vocabulary", rows, m.tensor, "mesh.tensor"),
        ("width", shape.width, (m.fsdp or 1) * m.context, "mesh.fsdp x mesh.context"),
    ):
        if size % shards:
            raise ConfigError(f"{axis}={shards}: does not divide the {name} {size} of {where}; choose a divisor")


def check_tower(config: Config, tower: TowerShape | None) -> None:
    """Raise ConfigError if the mesh does not divide a size of the vision tower; None = the model has no tower."""
    if tower is None:
        return
    m = config.mesh
    for name, size, shards, axes in (
        ("width", tower.width, (m.fsdp or 1) * m.context, "mesh.fsdp x mesh.context"),
        ("heads", tower.heads, m.tensor, "mesh.tensor"),
        ("mlp_width", tower.mlp_width, m.tensor, "mesh.tensor"),
    ):
        if size % shards:
            works = max(d for d in range(1, shards + 1) if size % d == 0)
            raise ConfigError(f"{axes}={shards}: does not divide {name}={size} of the vision tower; {works} would")


def check_vocabulary(config: Config, rows: int) -> None:
    """Raise ConfigError if the mesh does not divide the embedding, which has `rows` rows."""
    m = config.mesh
    if rows % m.tensor:
        raise ConfigError(f"mesh.tensor={m.tensor}: does not divide the vocabulary of {rows}; choose a divisor")
    split = (m.fsdp or 1) * m.tensor if config.rollout.weights == "split" else 1
    if rows % split:
        raise ConfigError(
            f"rollout.weights=split: mesh.fsdp x mesh.tensor = {split} does not divide the vocabulary of {rows}; use "
            "gathered, or a smaller mesh.fsdp"
        )
