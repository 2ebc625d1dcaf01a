"""A pool of killable worker processes with a deadline per request.

One thread of the main process deals requests to workers, one each, and watches the clock. A worker that overruns is
killed and its request gets no verdict; one that dies on its own has its request tried once more by another. While a
worker is slow and others wait, extra workers are forked, so that a few hanging answers do not hold up the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from pspo_jax.config import ConfigError, VerifierConfig
from pspo_jax.rewards.worker import KILL, SPAWN

_PID = struct.Struct("<q")
_SLOW = 0.25
"""Seconds after which a worker counts as slow."""
_EXTRA = 4
"""At most this many workers per configured one while some are slow."""
_LATE_NICE = 5
"""Priority of a slow worker. At 19 it would starve on a busy machine and easy answers would miss the deadline."""
_START_LIMIT = 120.0
_TRIES = 2
_STILLBORN = 3
"""Workers per configured one that may end in a row before they are ready; then starting them is given up."""
_CACHE = 100_000


class Request(NamedTuple):
    kind: str
    """A key of worker.VERIFIERS."""
    arguments: dict[str, Any]
    key: Hashable | None = None
    """Requests with equal keys have equal verdicts, which are remembered; None = never."""


class Reply(NamedTuple):
    score: Any
    """A number, a list of them, or None = no verdict."""
    answer: str | None
    reason: str | None
    """Why there is no verdict: "deadline", "died", or the last line of an error."""
    error: str | None = None
    """The whole traceback, if there is one."""


class Batch:
    """Replies to come, in the order of the requests."""

    def __init__(self, size: int):
        self._replies: list[Reply | None] = [None] * size
        self._missing = size
        self._done = threading.Event()
        if not size:
            self._done.set()

    def set(self, place: int, reply: Reply) -> None:
        """Called by the pool's thread alone."""
        self._replies[place] = reply
        self._missing -= 1
        if not self._missing:
            self._done.set()

    def result(self) -> list[Reply]:
        """All replies; waits for them, at most about as long as the deadlines allow."""
        self._done.wait()
        return [reply for reply in self._replies if reply is not None]


class _Job:
    def __init__(self, request: Request):
        self.request = request
        self.targets: list[tuple[Batch, int]] = []
        self.tries = 0

    def finish(self, reply: Reply) -> None:
        for batch, place in self.targets:
            batch.set(place, reply)
        self.targets = []  # one that was dropped may still be answered


class _Worker:
    def __init__(self, channel: Connection, pid: int):
        self.channel = channel
        self.pid = pid
        self.ready = False
        self.late = False
        self.job: _Job | None = None
        self.since = time.monotonic()


class Pool:
    """Use as a context manager, and enter it before JAX touches a device.

    Args:
      config: deadline and limits.
      functions: user functions that every worker imports before its first request.
      log: file for what verifiers print; None = nowhere.
      imports: slow modules of verifiers, imported once for all workers; they must start no thread.
    Raises:
      ConfigError: a user function cannot be imported.
    """

    def __init__(
        self,
        config: VerifierConfig,
        functions: Sequence[str] = (),
        imports: Sequence[str] = (),
        log: Path | None = None,
    ):
        self._config = config
        self._size = config.workers or max(2, min(8, os.cpu_count() or 2))
        self._functions = tuple(dict.fromkeys(functions))
        self._imports = list(imports)
        self._log = None if log is None else str(log.absolute())
        self._inbox: deque[_Job] = deque()
        self._queue: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._pending: dict[Hashable, _Job] = {}
        self._cache: OrderedDict[Hashable, Reply] = OrderedDict()
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._stillborn = 0
        self._closing = False
        self._over: str | None = None
        """Why nothing is answered any more."""
        self.grouped: frozenset[str] = frozenset()
        """User functions that take a list of completions; known once the pool is entered."""
        self.replaced = 0
        """Workers that were killed or died."""

    def __enter__(self) -> Pool:
        self._start_nursery()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        for _ in range(self._size):
            self._spawn()
        self._thread = threading.Thread(target=self._run, name="verifier pool", daemon=True)
        self._thread.start()
        if self._functions:
            self.submit([Request("math", {"gold": "1", "answer": "1"})]).result()
        if self._failure:
            self.close()
            raise ConfigError(self._failure)
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; requests without a reply get none."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        self._control.close()
        self._nursery.wait()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def pids(self) -> list[int]:
        """Processes of the workers that are alive now."""
        return [worker.pid for worker in list(self._workers)]

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Have the requests answered; returns at once."""
        batch = Batch(len(requests))
        known: list[tuple[int, Reply]] = []
        with self._lock:
            if self._over:
                known = [(place, Reply(None, None, self._over)) for place in range(len(requests))]
                requests = ()
            for place, request in enumerate(requests):
                if request.key is not None and (reply := self._cache.get(request.key)) is not None:
                    self._cache.move_to_end(request.key)
                    known.append((place, reply))
                    continue
                job = self._pending.get(request.key) if request.key is not None else None
                if job is None:
                    job = _Job(request)
                    self._inbox.append(job)
                    if request.key is not None:
                        self._pending[request.key] = job
                job.targets.append((batch, place))
            # Under the lock, as the pool's thread may be setting other replies of this batch.
            for place, reply in known:
                batch.set(place, reply)
            if not self._over:
                self._wake()
        return batch

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b".")

    def _start_nursery(self) -> None:
        self._control, theirs = socket.socketpair()
        limits = {
            "deadline": self._config.deadline,
            "memory_mib": self._config.memory_mib,
            "network": self._config.network,
            "functions": self._functions,
            "imports": self._imports,
            "log": self._log,
        }
        # No accelerator, and one thread: a fork is safe only from a process without others.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TPU_VISIBLE_CHIPS": "",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pspo_jax.rewards.worker", str(theirs.fileno()), json.dumps(limits)]
        self._nursery = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._control.settimeout(_START_LIMIT)
        if not self._control.recv(_PID.size):
            raise RuntimeError(f"the verifiers' process ended with code {self._nursery.wait()} before it was ready")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        # A worker that stops in the middle of a message must not hold up the pool.
        limit = struct.pack("ll", max(1, int(self._config.deadline)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        socket.send_fds(self._control, [SPAWN + _PID.pack(0)], [theirs.fileno()])
        theirs.close()
        (pid,) = _PID.unpack(self._control.recv(_PID.size))
        self._workers.append(_Worker(Connection(ours.detach()), pid))

    def _end(self, worker: _Worker) -> None:
        """Kill and reap a worker."""
        worker.channel.close()
        self._control.sendall(KILL + _PID.pack(worker.pid))
        self._control.recv(_PID.size)
        self._workers.remove(worker)

    def _run(self) -> None:
        reason = "died: the pool of verifiers failed"
        try:
            self._serve()
            reason = "closed"
        except (OSError, struct.error):
            reason = "died: the process that starts verifiers ended"
            for worker in self._workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        finally:
            self._drop(reason, over=True)

    def _serve(self) -> None:
        while not self._closing:
            if self._failure and not self._workers:
                self._drop(self._failure)
            self._deal()
            channels = {worker.channel: worker for worker in self._workers}
            for ready in wait([*channels, self._wake_read], self._patience()):
                if ready == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._receive(channels[ready])  # type: ignore[index]
            self._watch()
        self._drop("closed", over=True)  # first, as a worker that ended takes its request along
        for worker in list(self._workers):
            self._end(worker)

    def _drop(self, reason: str, over: bool = False) -> None:
        """No verdict for every request that waits; if it is over, for all to come."""
        with self._lock:
            self._over = reason if over else None
            jobs = [*self._queue, *self._inbox, *(w.job for w in self._workers if w.job)]
            self._queue.clear()
            self._inbox.clear()
            for job in jobs:
                self._settle(job, Reply(None, None, reason))

    def _deal(self) -> None:
        """Give waiting requests to idle workers."""
        with self._lock:
            self._queue.extend(self._inbox)
            self._inbox.clear()
        for worker in [w for w in self._workers if w.ready and w.job is None]:
            if not self._queue:
                if len(self._workers) > self._size:
                    self._end(worker)  # forked while others were slow; no longer needed
                continue
            worker.job = self._queue.popleft()
            worker.since = time.monotonic()
            worker.job.tries += 1
            try:
                worker.channel.send((worker.job.request.kind, worker.job.request.arguments))
            except OSError:
                self._lost(worker)
            except (TypeError, AttributeError, pickle.PicklingError) as error:
                job, worker.job = worker.job, None
                with self._lock:
                    self._settle(job, Reply(None, None, f"cannot be sent to a worker ({error})"))

    def _receive(self, worker: _Worker) -> None:
        try:
            message = json.loads(worker.channel.recv_bytes())
        except (EOFError, OSError):
            self._lost(worker)
            return
        if "failed" in message:
            what = " ".join(message["error"].split())[:300]
            self._failure = f"task.function, reward.terms: {message['failed']} cannot be imported ({what})"
            self._end(worker)
            self._drop(self._failure)
        elif "ready" in message:
            worker.ready, worker.since = True, time.monotonic()
            self._stillborn = 0
            self.grouped = frozenset(message["grouped"])
        else:
            job, worker.job = worker.job, None
            error = message["error"]
            reason = error.strip().rpartition("\n")[2][:300] if error else None
            if message["score"] is None and not error:
                reason = "the verifier gave no verdict"
            with self._lock:
                assert job is not None
                self._settle(job, Reply(message["score"], message["answer"], reason, error))
            if worker.late:
                self._end(worker)  # its priority cannot be raised again
                if len(self._workers) < self._size:
                    self._spawn()

    def _settle(self, job: _Job, reply: Reply) -> None:
        """Hand out a reply; called with the lock held."""
        key = job.request.key
        if key is not None:
            self._pending.pop(key, None)
            if reply.score is not None:
                self._cache[key] = reply
                if len(self._cache) > _CACHE:
                    self._cache.popitem(last=False)
        job.finish(reply)

    def _lost(self, worker: _Worker) -> None:
        """A worker is gone: replace it, and try its request once more."""
        job = worker.job
        self._end(worker)
        self.replaced += 1
        if job is not None and job.tries < _TRIES:
            self._queue.appendleft(job)
        elif job is not None:
            with self._lock:
                self._settle(job, Reply(None, None, "died: the worker processes of this request ended"))
        self._renew(worker)

    def _renew(self, worker: _Worker) -> None:
        """Fork a worker in the place of one that ended."""
        self._stillborn += not worker.ready
        if self._stillborn >= _STILLBORN * self._size and self._failure is None:
            names = ",".join(self._functions)
            self._failure = f"task.function, reward.terms: verifiers end before they are ready ({names or '-'})"
        if self._failure is None:
            self._spawn()

    def _watch(self) -> None:
        """Kill what is overdue; fork extra workers while some are slow and requests wait."""
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self._config.deadline if worker.ready else _START_LIMIT
            if (worker.job or not worker.ready) and now - worker.since > limit:
                job = worker.job
                self._end(worker)
                self.replaced += 1
                if job is not None:
                    with self._lock:
                        self._settle(job, Reply(None, None, f"deadline of {self._config.deadline:g} s"))
                self._renew(worker)
        slow = [w for w in self._workers if w.job and now - w.since > _SLOW]
        for worker in slow:
            if not worker.late:
                worker.late = True
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.setpriority(os.PRIO_PROCESS, worker.pid, _LATE_NICE)  # the others come first
        if self._queue and slow:
            working = len(self._workers) - len(slow)
            room = self._size * _EXTRA - len(self._workers)
            for _ in range(min(self._size - working, room)):
                self._spawn()

    def _patience(self) -> float | None:
        """Seconds until something may have to be done without a message."""
        now = time.monotonic()
        times = []
        for worker in self._workers:
            if not worker.ready:
                times.append(worker.since + _START_LIMIT - now)
            elif worker.job:
                age = now - worker.since
                times.append((_SLOW if age <= _SLOW else self._config.deadline) - age + 0.01)
        return max(0.0, min(times)) if times else None
