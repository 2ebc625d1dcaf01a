"""The one use of JAX's private modules, and the client of its coordination service.

`jax.distributed.initialize()` finds out by itself which cluster it is in, and no public function of JAX says
beforehand whether it would: a run of one process must not wait for others. That question alone reads `jax._src`, and
tests/distributed/test_private.py fails where a new release of JAX has moved it.

The client comes from Orbax's public `multihost` module. The package calls it directly because the public barrier,
`multihost_utils.sync_global_devices`, waits for ever and runs a program on the devices, and because JAX has no public
key-value store, through which a process that fails tells the others why.
"""

from __future__ import annotations

from typing import Protocol


class CoordinationClient(Protocol):
    """The part of JAX's coordination service that the package uses; all times are in milliseconds."""

    def wait_at_barrier(self, name: str, timeout: int, /) -> None: ...

    def key_value_set(self, key: str, value: str, /, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, prefix: str, /) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout: int, /) -> str: ...


def cluster_processes() -> int:
    """Processes of the cluster that `jax.distributed.initialize()` would join by itself; 1 = it knows none."""
    from jax._src.clusters import ClusterEnv

    known = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present())
    found = next(known, None)
    return 1 if found is None else int(found.get_process_count())


def coordination_client() -> CoordinationClient:
    """The client of the coordination service.

    Raises:
      ValueError: `jax.distributed.initialize()` has not been called.
    """
    # Imported here: it takes a second, and one process does without it.
    from orbax.checkpoint import multihost

    client: CoordinationClient = multihost.get_jax_distributed_client()
    return client
