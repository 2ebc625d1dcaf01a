"""Several processes as one program: joining, sharing arrays, barriers, and ending together after a failure.

Every process runs the same host code on the same values. They differ in the rows of a batch that they hold: each
process grades and logs its own rows. With one process, every function here is the identity.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Bool, PyTree, UInt32

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed.jax_internals import CoordinationClient, cluster_processes, coordination_client
from pspo_jax.system.storage import StorageError

_FAILURES = "pspo_jax/failed/"
_POLL_SECONDS = 1.0
BARRIER_SECONDS = 900.0
"""Seconds that processes wait for each other around files; the slowest may be writing a checkpoint."""
_DAY_SECONDS = 86400.0
_HOST_NAME_BYTES = 64
"""Bytes of a host's name that are compared and shown."""
_MAX_TEXT_BYTES = 4096
_ERROR_GRACE_SECONDS = 5.0
"""Seconds that a failed process waits, so that the others can read the reason before its exit ends them."""


def initialize(config: Config) -> None:
    """Join the other processes of the run, if there are any. It must be called before the first array is made.

    distributed.coordinator decides if it is set; else a cluster that JAX recognises (TPU metadata, SLURM, Open MPI,
    GKE) does; else there is one process, and nothing happens.

    Raises:
      ConfigError: the other processes were not found in time.
    """
    d = config.distributed
    if d.coordinator is None and not (d.auto and in_cluster()):
        return
    explicit = d.coordinator is not None
    # JAX's pre-emption service would replace the handler of SIGTERM, and the run would not stop.
    jax.config.update("jax_enable_preemption_service", False)
    # Gloo, which joins CPU processes, mixes up the messages of two programs that are under way at once.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator_address=d.coordinator,
            num_processes=d.processes if explicit else None,
            process_id=d.process if explicit else None,
            # Without this, SLURM would give each process a single device.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=d.join_timeout,
            heartbeat_timeout_seconds=d.heartbeat_timeout,
            shutdown_timeout_seconds=d.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"distributed.coordinator={d.coordinator}: the processes did not find each other ({why}); check the "
            "address and distributed.processes, and start all of them; a single process needs distributed.auto=false"
        ) from error


def number_before_joining(config: Config) -> int | None:
    """The number of this process, 0 for the primary one; None if only a cluster that is not yet joined knows it."""
    d = config.distributed
    if d.coordinator is not None:
        return d.process
    return None if d.auto and in_cluster() else 0


def in_cluster() -> bool:
    """Whether JAX recognises a cluster of several processes from the environment or from a TPU's metadata."""
    return cluster_processes() > 1


def process_count() -> int:
    """Number of processes in the run."""
    return jax.process_count()


def process_number() -> int:
    """Number of this process, from 0."""
    return jax.process_index()


def is_primary() -> bool:
    """Whether this process is the one that writes logs, events and reports."""
    return jax.process_index() == 0


def to_global(tree: PyTree, sharding: Sharding) -> PyTree:
    """A pytree of host arrays, which are equal on every process, as global arrays with a sharding."""
    if process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree)


def owned_rows(array: jax.Array) -> np.ndarray:
    """Indices of the rows of a global array that this process owns, ascending. Every row has exactly one owner."""
    if process_count() == 1:
        return np.arange(array.shape[0])
    owner = np.full(array.shape[0], process_count(), np.int32)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        place: jax.Device = device
        owner[index[0]] = np.minimum(owner[index[0]], place.process_index)
    return np.flatnonzero(owner == jax.process_index())


def fetch_rows(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Some rows of a global array as a host array; this process must hold all of them."""
    if process_count() == 1:
        return np.asarray(array)[rows]
    value = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        value[shard.index] = np.asarray(shard.data)
    return value[rows]


def to_host(tree: PyTree) -> PyTree:
    """A pytree of global arrays as host arrays, which are equal on every process."""
    if process_count() == 1:
        return jax.device_get(tree)

    def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def share_rows(values: dict[str, np.ndarray], rows: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """The rows of all processes, joined on every process.

    Args:
      values: name -> rows [n, ...] of this process.
      rows: indices [n] of these rows.
      total: number of rows of all processes.

    Returns:
      name -> rows [total, ...].
    """
    if process_count() == 1:
        return values
    mine = np.zeros(total, bool)
    mine[rows] = True
    padded = {}
    for name, value in values.items():
        padded[name] = np.zeros((total, *value.shape[1:]), value.dtype)
        padded[name][rows] = value
    owners, every = multihost_utils.process_allgather((mine, padded))
    owner = owners.argmax(axis=0)
    return {name: value[owner, np.arange(total)] for name, value in every.items()}


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of a small host array over all processes."""
    return values if process_count() == 1 else np.asarray(multihost_utils.process_allgather(values)).sum(axis=0)


def equal_everywhere(values: UInt32[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which numbers of a small host array are equal on all processes. All processes must call it."""
    if process_count() == 1 or not len(values):
        return np.ones(len(values), bool)
    every = np.asarray(multihost_utils.process_allgather(values))
    return (every == every[0]).all(axis=0)


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process. All processes must call it."""
    return flag if process_count() == 1 else bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).any())


def text_from_primary(text: str) -> str:
    """The primary process's text of at most 4,096 bytes, on every process. All processes must call it."""
    if process_count() == 1:
        return text
    data = np.zeros(_MAX_TEXT_BYTES, np.uint8)
    encoded = text.encode()
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).rstrip(b"\0").decode()


def from_primary(name: str, value: np.ndarray | None) -> np.ndarray:
    """The int8 array of the primary process, on every process. The others wait for it for up to a day.

    Args:
      name: name of the array; equal names must have equal values.
      value: the array on the primary process; None on the others.
    """
    if process_count() == 1:
        assert value is not None
        return value
    client = coordination_client()
    key = f"pspo_jax/shared/{name}"
    if value is not None:
        text = base64.b64encode(zlib.compress(value.astype(np.int8).tobytes())).decode()
        client.key_value_set(key, text, allow_overwrite=True)
    found = client.blocking_key_value_get(key, int(1000 * _DAY_SECONDS))
    return np.frombuffer(zlib.decompress(base64.b64decode(found)), np.int8).copy()


def check_same(field: str, text: str) -> None:
    """Check that a text, such as a fingerprint of the data, is equal on all processes, all of which must call it.

    Raises:
      ConfigError: the texts differ; the message names the hosts that differ from the majority.
    """
    if process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8)
    host = np.frombuffer(socket.gethostname().encode()[:_HOST_NAME_BYTES].ljust(_HOST_NAME_BYTES, b"\0"), np.uint8)
    every, names = (np.asarray(x) for x in multihost_utils.process_allgather((mine, host)))
    digests = [row.tobytes() for row in every]
    usual = max(digests, key=digests.count)  # the first of the most frequent
    differ = [
        f"{bytes(names[i]).rstrip(bytes(1)).decode(errors='replace')} (process {i})"
        for i, digest in enumerate(digests)
        if digest != usual
    ]
    if differ:
        raise ConfigError(
            f"{field}: the data on {', '.join(differ)} differ from those of the others; "
            "give all hosts the same files and the same versions of the packages"
        )


def check_settings(values: Mapping[str, object]) -> None:
    """Check that settings, name -> value, are equal on all processes, all of which must call it.

    Raises:
      ConfigError: a setting differs; the message names it, its value here, and the processes where it differs.
    """
    if process_count() == 1:
        return
    digests = b"".join(hashlib.sha256(f"{name}={value}".encode()).digest()[:8] for name, value in values.items())
    every = np.asarray(multihost_utils.process_allgather(np.frombuffer(digests, np.uint8).reshape(-1, 8)))
    differ = (every != every[0]).any(axis=2)
    if not differ.any():
        return
    first = int(np.flatnonzero(differ.any(axis=0))[0])
    name, value = list(values.items())[first]
    others = np.flatnonzero((every[:, first] != every[jax.process_index(), first]).any(axis=1))
    numbers = ", ".join(map(str, others))
    raise ConfigError(
        f"{name}={value}: of the run's processes, {numbers} {'has' if len(others) == 1 else 'have'} another value; "
        "start all of them with the same settings"
    )


def wait_for_all(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Return when every process has called it with this name; each barrier needs a name of its own.

    Raises:
      TimeoutError: not all processes came within `seconds`.
    """
    if process_count() == 1:
        return
    client = coordination_client()
    try:
        client.wait_at_barrier(f"pspo_jax/{name}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise TimeoutError(
            f"process {jax.process_index()} waited {seconds:.0f} s for the others at {name!r}: {why}"
        ) from error


@contextmanager
def fail_together() -> Iterator[None]:
    """In this block, an exception in one process ends all processes, with its traceback in every log.

    Without it the others would wait in their next collective operation until a heartbeat is missed.
    """
    if process_count() == 1:
        yield
        return
    client = coordination_client()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, done.is_set), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        done.set()
        if not isinstance(error, SystemExit) or error.code:
            bad_input = isinstance(error, ConfigError)
            known = bad_input or isinstance(error, StorageError)
            text = f"error: {error}" if known else traceback.format_exc()
            print(f"process {jax.process_index()} failed: {text}", file=sys.stderr, flush=True)
            client.key_value_set(f"{_FAILURES}{jax.process_index()}", text, allow_overwrite=True)
            time.sleep(_ERROR_GRACE_SECONDS)
            os._exit(2 if bad_input else 1)
        raise
    finally:
        done.set()


def _watch(client: CoordinationClient, done: Callable[[], bool]) -> None:
    """End this process once another one has reported a failure."""
    while not done():
        try:
            reports = client.key_value_dir_get(_FAILURES)
        except jax.errors.JaxRuntimeError as error:
            reports = [("the coordinator", f"it cannot be reached: {error}")]
        if reports and not done():
            name, text = reports[0]
            print(f"process {name.rpartition('/')[2]} failed, so this one ends:\n{text}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(_POLL_SECONDS)
