"""Several processes as one program: how they find each other, what each one holds, and how all hear of a failure.

Every process runs the same host code on the same values. What differs is which rows of a batch it holds: it judges and
logs those. On one process all of this is the identity.
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
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed.private import CoordinationClient, cluster_processes, coordination_client
from pspo_jax.system.storage import StorageError

_FAILURES = "pspo_jax/failed/"
_POLL_SECONDS = 1.0
BARRIER_SECONDS = 900.0
"""How long processes wait for each other where files change hands; the slowest may be writing a checkpoint."""
_DAY = 86400.0
_HOST = 64
"""Bytes of a host's name that are compared and shown."""
_ERROR_GRACE_SECONDS = 5.0
"""How long a process that failed waits for the others to read why, before its end ends them."""


def initialize(config: Config) -> None:
    """Join the other processes of the run, if there are any; before the first array.

    An explicit distributed.coordinator wins; else a cluster that JAX knows (TPU metadata, SLURM, Open MPI, GKE) does;
    else there is one process, and nothing happens.

    Raises:
      ConfigError: the others were not found in time.
    """
    d = config.distributed
    if d.coordinator is None and not (d.auto and in_cluster()):
        return
    explicit: dict[str, Any] = {}
    if d.coordinator is not None:
        explicit = {
            "coordinator_address": d.coordinator,
            "num_processes": d.processes,
            "process_id": d.process,
            # Else SLURM would give each process a single device.
            "cluster_detection_method": "deactivate",
        }
    # JAX's own notice of a pre-emption would take the place of the handler of SIGTERM, and the run would not stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=d.join_timeout,
            heartbeat_timeout_seconds=d.heartbeat_timeout,
            shutdown_timeout_seconds=d.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"distributed.coordinator={d.coordinator}: the processes did not find each other ({why}); check the "
            "address, distributed.processes, and that all were started; distributed.auto=false is for one alone"
        ) from error


def number_before_joining(config: Config) -> int | None:
    """This process's number, 0 = it leads; None if only a cluster that has not been joined knows."""
    d = config.distributed
    if d.coordinator is not None:
        return d.process
    return None if d.auto and in_cluster() else 0


def in_cluster() -> bool:
    """Whether JAX knows a cluster of several processes here, by the environment or by a TPU's metadata."""
    return cluster_processes() > 1


def process_count() -> int:
    return jax.process_count()


def is_primary() -> bool:
    """Whether this process writes logs, events and reports."""
    return jax.process_index() == 0


def to_global(tree: Any, sharding: Sharding) -> Any:
    """Host arrays, the same on every process, as global arrays."""
    if process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree)


def owned_rows(array: jax.Array) -> np.ndarray:
    """Rows of a global array that this process answers for, ascending; each row has one owner."""
    if process_count() == 1:
        return np.arange(array.shape[0])
    owner = np.full(array.shape[0], process_count(), np.int32)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        place: Any = device
        owner[index[0]] = np.minimum(owner[index[0]], place.process_index)
    return np.flatnonzero(owner == jax.process_index())


def fetch_rows(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Some rows of a global array, all of which this process holds."""
    if process_count() == 1:
        return np.asarray(array)[rows]
    value = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        value[shard.index] = np.asarray(shard.data)
    return value[rows]


def to_host(tree: Any) -> Any:
    """Global arrays as host arrays, the same on every process."""
    if process_count() == 1:
        return jax.device_get(tree)

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)


def share_rows(values: dict[str, np.ndarray], rows: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """Each process's rows [n, ...] of several host arrays, as the arrays of all `total` rows on every process."""
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
    """Sum of small host arrays over processes."""
    return values if process_count() == 1 else np.asarray(multihost_utils.process_allgather(values)).sum(axis=0)


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    return flag if process_count() == 1 else bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).any())


def text_from_primary(text: str) -> str:
    """The leading process's text, of at most 4,096 bytes, on every process; all must ask."""
    if process_count() == 1:
        return text
    data = np.zeros(4096, np.uint8)
    words = text.encode()
    data[: len(words)] = np.frombuffer(words, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).rstrip(b"\0").decode()


def from_primary(name: str, value: np.ndarray | None) -> np.ndarray:
    """The int8 array of the leading process, on all of them; the others wait for it, for as long as it needs.

    Args:
      name: of the array; equal names have equal values.
      value: the leader's; None elsewhere.
    """
    if process_count() == 1:
        assert value is not None
        return value
    client = coordination_client()
    key = f"pspo_jax/shared/{name}"
    if value is not None:
        text = base64.b64encode(zlib.compress(value.astype(np.int8).tobytes())).decode()
        client.key_value_set(key, text, allow_overwrite=True)
    found = client.blocking_key_value_get(key, int(1000 * _DAY))
    return np.frombuffer(zlib.decompress(base64.b64decode(found)), np.int8).copy()


def check_same(field: str, text: str) -> None:
    """Make sure that a text, such as a fingerprint of the data, is the same on all processes; all must ask.

    Raises:
      ConfigError: it is not; the line names the hosts that differ from most of the others.
    """
    if process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint8)
    host = np.frombuffer(socket.gethostname().encode()[:_HOST].ljust(_HOST, b"\0"), np.uint8)
    every, names = (np.asarray(x) for x in multihost_utils.process_allgather((mine, host)))
    kinds = [row.tobytes() for row in every]
    usual = max(kinds, key=kinds.count)  # the first of the most frequent
    differ = [
        f"{bytes(names[i]).rstrip(bytes(1)).decode(errors='replace')} (process {i})"
        for i, kind in enumerate(kinds)
        if kind != usual
    ]
    if differ:
        raise ConfigError(
            f"{field}: the data on {', '.join(differ)} differ from those of the others; "
            "give all hosts the same files and the same versions of the packages"
        )


def check_settings(values: Mapping[str, Any]) -> None:
    """Make sure that settings, name -> value, are the same on all processes; all must ask.

    Raises:
      ConfigError: one is not; the line names it, its value here, and the processes where it is another.
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
    """Return when every process is here; each place has a name of its own.

    Raises:
      TimeoutError: not all came in time.
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
    """An exception in one process ends all of them, with its traceback in every log.

    Without this the others would wait in their next collective until a heartbeat is missed.
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
    """End this process once another one has said that it failed."""
    while not done():
        try:
            said = client.key_value_dir_get(_FAILURES)
        except jax.errors.JaxRuntimeError as error:
            said = [("the coordinator", f"it cannot be reached: {error}")]
        if said and not done():
            name, text = said[0]
            print(f"process {name.rpartition('/')[2]} failed, so this one ends:\n{text}", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(_POLL_SECONDS)
