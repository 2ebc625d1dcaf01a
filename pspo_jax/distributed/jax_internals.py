"""The only uses of JAX's private modules.

JAX has no public name for two things: the cluster that `jax.distributed.initialize()` would join by itself, which a run
of one process must know so as not to wait for others; and the barriers with a time limit and the key-value store of its
coordination service. The public barrier, `multihost_utils.sync_global_devices`, waits for ever and runs a program on
the devices. tests/distributed/test_jax_internals.py fails where a new release of JAX has moved one of them.
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
    from jax._src.distributed import global_state

    client: CoordinationClient | None = global_state.client
    if client is None:
        raise ValueError("jax.distributed.initialize() has not been called")
    return client
