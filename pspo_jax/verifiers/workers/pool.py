"""A pool of killable worker processes with a deadline per request.

One thread of the main process deals requests to workers, one each, and watches their clocks. A worker that overruns is
killed and its request gets no verdict; one that dies on its own has its request tried once more, by a worker forked
since. While a worker is slow and others wait, extra workers are forked, so that a few hanging answers do not hold up
the rest. A verdict does not depend on how busy the machine is: what counts is the time that a worker was on a
processor, and a larger limit holds for the time that it slept; waiting for a processor costs nothing.
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
from typing import Any

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import VerifierConfig
from pspo_jax.verifiers.workers.clock import Spent, spent, usage
from pspo_jax.verifiers.workers.process import KILL, PID, SPAWN
from pspo_jax.verifiers.workers.requests import Batch, Reply, Request

__all__ = ["Batch", "Pool", "Reply", "Request"]

_SLOW = 0.25
"""Seconds, without those of other processes, after which a worker counts as slow."""
_LOOK = 0.1
"""Seconds between two looks at a worker that other processes may have kept from a processor."""
_WALL = 6.0
"""verifier.wall_limit, in deadlines, where it is 0."""
_EXTRA = 4
"""At most this many workers per configured one while some are slow."""
_LATE_NICE = 5
"""Priority of a slow worker. At 19 it would starve on a busy machine and easy answers would miss the deadline."""
_START_LIMIT = 120.0
_TRIES = 2
_OUTSIDE_TRIES = 5
"""Tries of a request whose workers something outside kills or stops, which says nothing about the request."""
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_CLOSE_SECONDS = 10.0
"""Seconds after which the process that forks workers is killed, if it has not ended by itself."""
_MAX_FAILED_STARTS = 3
"""Workers per configured one that may end in a row before they are ready; then starting them is given up."""
_CACHE = 100_000


class _Job:
    def __init__(self, request: Request):
        self.request = request
        self.targets: list[tuple[Batch, int]] = []
        self.deaths = 0
        """Workers that died of it, or with it."""
        self.kills = 0
        """Those of them that something outside killed."""
        self.after = 0
        """Only workers of this number or later may have it: others may be doomed like the one that died."""

    def finish(self, reply: Reply) -> None:
        for batch, place in self.targets:
            batch.set(place, reply)
        self.targets = []  # one that was dropped may still be answered


class _Worker:
    def __init__(self, channel: Connection, pid: int, number: int):
        self.channel = channel
        self.pid = pid
        self.number = number
        self.ready = False
        self.late = False
        self.job: _Job | None = None
        self.sent = 0
        """Requests that it was given."""
        self.start()

    def start(self) -> None:
        """Its clock starts anew."""
        self.since = time.monotonic()
        self.begun = usage(self.pid)

    def spent(self) -> Spent:
        """What it has spent on what it does now."""
        return spent(self.pid, self.begun, time.monotonic() - self.since)


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
        self._wall_limit = config.wall_limit or _WALL * config.deadline
        self._look = min(_SLOW, config.deadline, self._wall_limit)
        self._forked = 0
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
        """User functions that are given all completions of a prompt at once; known once the pool is entered."""
        self.needs: dict[str, list[str]] = {}
        """Columns that user functions cannot do without; known once the pool is entered."""
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
        try:
            self._nursery.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # somebody has stopped it, and it would never come to its end
            for pid in (*self.pids(), self._nursery.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
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
        command = [sys.executable, "-m", "pspo_jax.verifiers.workers.process", str(theirs.fileno()), json.dumps(limits)]
        self._nursery = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._control.settimeout(_START_LIMIT)
        if not self._control.recv(PID.size):
            raise RuntimeError(f"the verifiers' process ended with code {self._nursery.wait()} before it was ready")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        # A worker that stops in the middle of a message must not hold up the pool.
        limit = struct.pack("ll", max(1, int(self._config.deadline)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        socket.send_fds(self._control, [SPAWN + PID.pack(0, 0)], [theirs.fileno()])
        theirs.close()
        pid, _ = PID.unpack(self._control.recv(PID.size))
        self._forked += 1
        self._workers.append(_Worker(Connection(ours.detach()), pid, self._forked))

    def _end(self, worker: _Worker) -> int:
        """Kill and reap a worker; its exit code, or minus the signal that ended it."""
        worker.channel.close()
        self._control.sendall(KILL + PID.pack(worker.pid, 0))
        _, status = PID.unpack(self._control.recv(PID.size))
        self._workers.remove(worker)
        return int(status)

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
            if (job := self._next(worker)) is not None:
                self._give(worker, job)

    def _next(self, worker: _Worker) -> _Job | None:
        """Take the first request that this worker may have."""
        for place, job in enumerate(self._queue):
            if worker.number >= job.after or self._failure is not None:
                del self._queue[place]
                return job
        return None

    def _give(self, worker: _Worker, job: _Job) -> None:
        worker.job = job
        worker.sent += 1
        worker.start()
        try:
            worker.channel.send((worker.sent, job.request.kind, job.request.arguments))
        except OSError:
            self._lost(worker)
        except (TypeError, AttributeError, RecursionError, pickle.PicklingError) as error:
            worker.job = None
            with self._lock:
                self._settle(job, Reply(None, None, f"cannot be sent to a worker ({error})"))

    def _receive(self, worker: _Worker) -> None:
        try:
            message = json.loads(worker.channel.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._lost(worker)
            return
        if "failed_import" in message:
            what = " ".join(message["error"].split())[:300]
            self._failure = f"task.function, reward.terms: {message['failed_import']} cannot be imported ({what})"
            self._end(worker)
            self._drop(self._failure)
        elif "ready" in message:
            worker.ready = True
            worker.start()
            self._stillborn = 0
            self.grouped, self.needs = frozenset(message["grouped"]), message["needs"]
        elif worker.job is None or message.pop("number", None) != worker.sent:
            self._lost(worker)  # something else has written to its channel
        else:
            job, worker.job = worker.job, None
            if message["score"] is None and not message["reason"]:
                message["reason"] = "the verifier gave no verdict"
            with self._lock:
                self._settle(job, Reply(**message))
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

    def _lost(self, worker: _Worker, stopped: bool = False) -> None:
        """A worker is gone, or was stopped: replace it, and try its request once more."""
        job = worker.job
        status = self._end(worker)
        self.replaced += 1
        outside = stopped or status in _FROM_OUTSIDE
        if job is not None:
            job.deaths += 1
            job.kills += outside
            job.after = self._forked + 1
        if job is None:
            pass
        elif status == -signal.SIGXCPU:
            self._refuse(job, f"deadline of {self._config.deadline:g} s")
        elif job.deaths - job.kills < _TRIES and job.kills < _OUTSIDE_TRIES:
            self._queue.appendleft(job)
        else:
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            self._refuse(job, f"died: the worker processes of this request ended ({how})")
        self._renew(worker)

    def _refuse(self, job: _Job, reason: str) -> None:
        """No verdict for a request."""
        with self._lock:
            self._settle(job, Reply(None, None, reason))

    def _renew(self, worker: _Worker) -> None:
        """Fork a worker in the place of one that ended."""
        self._stillborn += not worker.ready
        if self._stillborn >= _MAX_FAILED_STARTS * self._size and self._failure is None:
            names = ",".join(self._functions)
            self._failure = f"task.function, reward.terms: verifiers end before they are ready ({names or '-'})"
        if self._failure is None:
            self._spawn()

    def _watch(self) -> None:
        """Kill what is overdue; fork extra workers while some are slow and requests wait."""
        slow = 0
        for worker in list(self._workers):
            if (worker.ready and worker.job is None) or time.monotonic() - worker.since <= self._look:
                continue
            if worker.channel.poll():
                continue  # it has answered, and this thread has not come to read that
            now = worker.spent()
            if reason := self._overdue(worker, now):
                job = worker.job
                self._end(worker)
                self.replaced += 1
                if job is not None:
                    self._refuse(job, reason)
                self._renew(worker)
            elif now.state in ("T", "t", "Z", "X"):
                self._lost(worker, stopped=True)
            elif worker.job is not None and now.waited > _SLOW:
                slow += 1
                self._lower(worker)
        if self._queue and slow:
            room = self._size * _EXTRA - len(self._workers)
            for _ in range(min(self._size - (len(self._workers) - slow), room)):
                self._spawn()

    def _overdue(self, worker: _Worker, now: Spent) -> str | None:
        """Why a worker has had time enough, or None."""
        if not worker.ready:
            return "start" if now.waited > _START_LIMIT else None
        if now.cpu > self._config.deadline:
            return f"deadline of {self._config.deadline:g} s"
        if now.waited > self._wall_limit:
            return f"deadline: no answer after {self._wall_limit:g} s (verifier.wall_limit)"
        return None

    @staticmethod
    def _lower(worker: _Worker) -> None:
        """Lower a slow worker's priority: the others come first."""
        if not worker.late:
            worker.late = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, worker.pid, _LATE_NICE)

    def _patience(self) -> float | None:
        """Seconds until something may have to be done without a message."""
        times = []
        for worker in self._workers:
            if worker.ready and worker.job is None:
                continue
            age = time.monotonic() - worker.since
            if age <= self._look:
                times.append(self._look - age + 0.01)
            elif not worker.late:
                times.append(_LOOK)
            else:
                now = worker.spent()
                left = min(self._config.deadline - now.cpu, self._wall_limit - now.waited)
                times.append(min(max(_LOOK, left), 1.0))
        return min(times) if times else None
