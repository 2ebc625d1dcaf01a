"""What this package takes from JAX's private modules, all of it in one place.

JAX has no public name for two things: which cluster `jax.distributed.initialize()` would join, and the barriers with a
time limit and the key-value store of its coordination service (`multihost_utils.sync_global_devices` waits for ever,
and runs a program on the devices). tests/distributed/test_private.py says which of them a new release of JAX has moved.
"""

from __future__ import annotations

from typing import Any


def cluster_processes() -> int:
    """Processes of the cluster that `jax.distributed.initialize()` would join by itself; 1 = it knows none."""
    from jax._src.clusters import ClusterEnv

    known = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present())
    found = next(known, None)
    return 1 if found is None else found.get_process_count()


def coordination_client() -> Any:
    """The client of the coordination service, after `jax.distributed.initialize()`; None before it.

    It has wait_at_barrier(name, milliseconds), key_value_set(key, text, allow_overwrite), key_value_dir_get(prefix) and
    blocking_key_value_get(key, milliseconds).
    """
    from jax._src.distributed import global_state

    return global_state.client
