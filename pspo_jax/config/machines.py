"""The stages of the configuration that say on which machines a run takes place: devices, processes, compiler flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pspo_jax.config.fields import Range


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. data x fsdp x tensor x context is the number of devices."""

    slices: Annotated[int | None, Range(1)] = None
    """Number of groups of devices that a slow network joins, such as TPU slices; they split data, and gradients cross
    from one to another once per update. The other axes stay within a slice. None = the slices that a TPU reports, 1
    elsewhere."""
    data: Annotated[int, Range(-1)] = -1
    """Number of devices, over all slices, that split the batch and hold copies of the weights; -1 = all that the other
    axes leave."""
    fsdp: Annotated[int | None, Range(1)] = None
    """Number of devices that split the batch, the weights and the optimizer state. None = the fewest that leave half of
    a device's memory free; 1 where that memory is unknown, as on CPUs."""
    tensor: Annotated[int, Range(1)] = 1
    """Number of devices that share one row by splitting its heads, MLP width and vocabulary."""
    context: Annotated[int, Range(1)] = 1
    """Number of devices that share one row of an update by splitting its tokens, for long sequences; only attention's
    keys and values are gathered. In rollouts these devices split the batch, and weights are split along fsdp x
    context."""


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes, one for each host or GPU, join. TPU pods, SLURM, Open MPI and GKE need no settings."""

    auto: bool = True
    """Whether to join the processes of a cluster that JAX recognises from its environment."""
    coordinator: str | None = None
    """Address host:port of process 0; None = the address that the cluster supplies, or a single process."""
    processes: Annotated[int, Range(1)] = 1
    """Number of processes in the run; read with distributed.coordinator."""
    process: Annotated[int, Range(0)] = 0
    """Number of this process, from 0; read with distributed.coordinator."""
    join_timeout: Annotated[int, Range(1)] = 300
    """Seconds to wait for the other processes at the start."""
    heartbeat_timeout: Annotated[int, Range(5)] = 30
    """Seconds without a heartbeat after which a process counts as dead and the others end."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Compiler flags that are set before JAX starts; docs/distributed.md lists them."""

    flags: bool = True
    """Whether to set the recommended compiler flags for GPUs and TPUs, except those that the environment sets."""
    xla_flags: str = ""
    """Additional flags for XLA_FLAGS, as --name=value, separated by spaces."""
    libtpu_flags: str = ""
    """Additional flags for LIBTPU_INIT_ARGS, in the same form."""
