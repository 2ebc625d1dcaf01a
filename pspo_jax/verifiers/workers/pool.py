"""A pool of killable worker processes with a deadline per request.

One thread of the main process gives each worker one request at a time and reads the workers' clocks. A worker that
exceeds its deadline is killed, and its request gets no verdict. The request of a worker that dies on its own is tried
once more, by a worker that was forked after the death. While a worker is slow and other requests wait, extra workers
are forked, so that a few hanging answers do not hold up the rest. A verdict does not depend on how busy the machine is:
the deadline counts the time that a worker was on a processor, and a larger limit counts the time that it slept;
waiting for a processor counts for nothing.
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

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.verifiers.workers.clock import TimeSpent, time_spent, usage
from pspo_jax.verifiers.workers.process import KILL, PID, SPAWN
from pspo_jax.verifiers.workers.requests import Batch, JudgeService, Reply, Request, WorkerLimits

__all__ = ["Batch", "Pool", "Reply", "Request"]

_SLOW_SECONDS = 0.25
"""Seconds, without those of other processes, after which a worker counts as slow."""
_CHECK_SECONDS = 0.1
"""Seconds between two checks of a worker that other processes may have kept from a processor."""
_WALL_DEADLINES = 6.0
"""The limit on a request's whole time, in deadlines, where verifier.wall_limit is 0."""
_MOST_WORKERS = 4
"""Most workers per configured one while some are slow."""
_SLOW_NICE = 5
"""The nice value of a slow worker. At 19 it would starve on a busy machine, and easy answers would miss deadlines."""
_START_SECONDS = 120.0
"""Seconds that a worker, or the fork server, may take to become ready."""
_TRIES = 2
"""Tries of a request whose workers die on their own."""
_TRIES_IF_KILLED = 5
"""Tries of a request whose workers are killed or stopped from outside, which says nothing about the request."""
_OUTSIDE_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Exit codes of a worker that was killed from outside."""
_CLOSE_SECONDS = 10.0
"""Seconds after which the fork server is killed, if it has not ended by itself."""
_MAX_FAILED_STARTS = 3
"""Workers per configured one that may end in a row before they are ready; beyond it no more are started."""
_MOST_REMEMBERED = 100_000
"""Verdicts that are remembered by key."""


class _Job:
    """A request, and the places in batches that wait for its reply."""

    def __init__(self, request: Request):
        self.request = request
        self.targets: list[tuple[Batch, int]] = []
        self.deaths = 0
        """Workers that ended while they had it."""
        self.kills = 0
        """Those of them that were killed from outside."""
        self.first_worker = 0
        """Number of the first worker that may have it: older ones may share the fate of the one that died."""

    def finish(self, reply: Reply) -> None:
        """Enters the reply in every place that waits for it."""
        for batch, place in self.targets:
            batch.set(place, reply)
        self.targets = []  # a job that was given up may still be answered


class _Worker:
    """A worker process, its job, and the clock of that job (or of its start)."""

    def __init__(self, channel: Connection, pid: int, number: int):
        self.channel = channel
        self.pid = pid
        self.number = number
        self.ready = False
        self.slow = False
        self.job: _Job | None = None
        self.sent = 0
        """Requests that it was given."""
        self.start_clock()

    def start_clock(self) -> None:
        """Starts its clock anew."""
        self.since = time.monotonic()
        self.begun = usage(self.pid)

    def time_spent(self) -> TimeSpent:
        """The time that it has spent on its job, or on its start."""
        return time_spent(self.pid, self.begun, time.monotonic() - self.since)


class Pool:
    """A pool of workers that verify requests. It is a context manager, entered before JAX touches a device.

    Args:
      config: deadline and limits.
      functions: users' functions that every worker imports before its first request, as `module:function`.
      imports: slow modules of verifiers, imported once for all workers; they must start no thread.
      log: file for what verifiers print; None = nowhere.
      judge: a judge that is not entered yet, which the pool enters and closes; None = there is none.
    Raises:
      ConfigError: a user function cannot be imported, or the judge does not answer.
    """

    def __init__(
        self,
        config: VerifierConfig,
        functions: Sequence[str] = (),
        imports: Sequence[str] = (),
        log: Path | None = None,
        judge: JudgeService | None = None,
    ):
        self._config = config
        self._wall_limit = config.wall_limit or _WALL_DEADLINES * config.deadline
        self._unchecked_seconds = min(_SLOW_SECONDS, config.deadline, self._wall_limit)
        """Seconds in which a worker is left alone."""
        self._forks = 0
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
        self._failed_starts = 0
        self._closing = False
        self._closed_reason: str | None = None
        """Why nothing is answered any more."""
        self.group_functions: frozenset[str] = frozenset()
        """Users' functions that are given all completions of a prompt at once; known once the pool is entered."""
        self.required_columns: dict[str, list[str]] = {}
        """Columns that each user's function cannot do without; known once the pool is entered."""
        self.judge = judge
        self.replaced = 0
        """Workers that were killed or died."""

    def __enter__(self) -> Pool:
        if self.judge is not None:
            self.judge.__enter__()
        self._start_fork_server()
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers; requests that still wait get no verdict."""
        if self._closing:
            return
        self._closing = True
        if self.judge is not None:
            self.judge.close()
        self._wake()
        self._thread.join()
        self._control.close()
        try:
            self._fork_server.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # somebody has stopped it, and it would never come to its end
            for pid in (*self.pids(), self._fork_server.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._fork_server.wait()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def pids(self) -> list[int]:
        """Process ids of the workers that are alive now."""
        return [worker.pid for worker in list(self._workers)]

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Has the requests answered. It returns at once, with the batch of replies to come."""
        batch = Batch(len(requests))
        known: list[tuple[int, Reply]] = []
        with self._lock:
            if self._closed_reason:
                known = [(place, Reply(None, None, self._closed_reason)) for place in range(len(requests))]
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
            if not self._closed_reason:
                self._wake()
        return batch

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b".")

    def _start_fork_server(self) -> None:
        self._control, theirs = socket.socketpair()
        config = self._config
        limits = WorkerLimits(
            config.deadline, config.memory_mib, config.network, self._functions, self._imports, self._log
        )
        # No accelerator, and one thread: a fork is safe only from a process without others.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TPU_VISIBLE_CHIPS": "",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        arguments = [str(theirs.fileno()), json.dumps(limits._asdict())]
        command = [sys.executable, "-m", "pspo_jax.verifiers.workers.process", *arguments]
        self._fork_server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._control.settimeout(_START_SECONDS)
        if not self._control.recv(PID.size):
            raise RuntimeError(f"the verifiers' process ended with code {self._fork_server.wait()} before it was ready")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        # A worker that stops in the middle of a message must not hold up the pool.
        limit = struct.pack("ll", max(1, int(self._config.deadline)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        socket.send_fds(self._control, [SPAWN + PID.pack(0, 0)], [theirs.fileno()])
        theirs.close()
        pid, _ = PID.unpack(self._control.recv(PID.size))
        self._forks += 1
        self._workers.append(_Worker(Connection(ours.detach()), pid, self._forks))

    def _end(self, worker: _Worker) -> int:
        """Kills and reaps a worker; gives its exit code, or minus the signal that ended it."""
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
            self._refuse_all(reason, over=True)

    def _serve(self) -> None:
        while not self._closing:
            if self._failure and not self._workers:
                self._refuse_all(self._failure)
            self._assign_jobs()
            channels = {worker.channel: worker for worker in self._workers}
            for ready in wait([*channels, self._wake_read], self._next_check()):
                if ready == self._wake_read:
                    os.read(self._wake_read, 4096)
                else:
                    self._receive(channels[ready])  # type: ignore[index]
            self._check_workers()
        self._refuse_all("closed", over=True)  # first, as a worker that ended takes its request along
        for worker in list(self._workers):
            self._end(worker)

    def _refuse_all(self, reason: str, over: bool = False) -> None:
        """Gives no verdict to every request that waits; if the pool is over, also to all requests to come."""
        with self._lock:
            self._closed_reason = reason if over else None
            jobs = [*self._queue, *self._inbox, *(w.job for w in self._workers if w.job)]
            self._queue.clear()
            self._inbox.clear()
            for job in jobs:
                self._finish(job, Reply(None, None, reason))

    def _assign_jobs(self) -> None:
        """Gives waiting requests to idle workers."""
        with self._lock:
            self._queue.extend(self._inbox)
            self._inbox.clear()
        for worker in [w for w in self._workers if w.ready and w.job is None]:
            if not self._queue:
                if len(self._workers) > self._size:
                    self._end(worker)  # forked while others were slow; no longer needed
                continue
            if (job := self._take_job(worker)) is not None:
                self._send(worker, job)

    def _take_job(self, worker: _Worker) -> _Job | None:
        """Takes the first request that this worker may have from the queue; None if there is none."""
        for place, job in enumerate(self._queue):
            if worker.number >= job.first_worker or self._failure is not None:
                del self._queue[place]
                return job
        return None

    def _send(self, worker: _Worker, job: _Job) -> None:
        worker.job = job
        worker.sent += 1
        worker.start_clock()
        try:
            worker.channel.send((worker.sent, job.request.kind, job.request.arguments))
        except OSError:
            self._worker_ended(worker)
        except (TypeError, AttributeError, RecursionError, pickle.PicklingError) as error:
            worker.job = None
            with self._lock:
                self._finish(job, Reply(None, None, f"cannot be sent to a worker ({error})"))

    def _receive(self, worker: _Worker) -> None:
        try:
            message = json.loads(worker.channel.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._worker_ended(worker)
            return
        if "failed_import" in message:
            what = " ".join(message["error"].split())[:300]
            self._failure = f"task.function, reward.terms: {message['failed_import']} cannot be imported ({what})"
            self._end(worker)
            self._refuse_all(self._failure)
        elif "ready" in message:
            worker.ready = True
            worker.start_clock()
            self._failed_starts = 0
            self.group_functions = frozenset(message["group_functions"])
            self.required_columns = message["required_columns"]
        elif worker.job is None or message.pop("number", None) != worker.sent:
            self._worker_ended(worker)  # something else has written to its channel
        else:
            job, worker.job = worker.job, None
            if message["score"] is None and not message["reason"]:
                message["reason"] = "the verifier gave no verdict"
            with self._lock:
                self._finish(job, Reply(**message))
            if worker.slow:
                self._end(worker)  # its priority cannot be raised again
                if len(self._workers) < self._size:
                    self._spawn()

    def _finish(self, job: _Job, reply: Reply) -> None:
        """Hands out a reply and remembers it; called with the lock held."""
        key = job.request.key
        if key is not None:
            self._pending.pop(key, None)
            if reply.score is not None:
                self._cache[key] = reply
                if len(self._cache) > _MOST_REMEMBERED:
                    self._cache.popitem(last=False)
        job.finish(reply)

    def _worker_ended(self, worker: _Worker, stopped: bool = False) -> None:
        """Replaces a worker that has ended or was stopped, and tries its request once more."""
        job = worker.job
        status = self._end(worker)
        self.replaced += 1
        outside = stopped or status in _OUTSIDE_SIGNALS
        if job is not None:
            job.deaths += 1
            job.kills += outside
            job.first_worker = self._forks + 1
        if job is None:
            pass
        elif status == -signal.SIGXCPU:
            self._refuse(job, f"deadline of {self._config.deadline:g} s")
        elif job.deaths - job.kills < _TRIES and job.kills < _TRIES_IF_KILLED:
            self._queue.appendleft(job)
        else:
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            self._refuse(job, f"died: the worker processes of this request ended ({how})")
        self._replace(worker)

    def _refuse(self, job: _Job, reason: str) -> None:
        """Gives no verdict to a request."""
        with self._lock:
            self._finish(job, Reply(None, None, reason))

    def _replace(self, worker: _Worker) -> None:
        """Forks a worker in the place of one that ended, unless too many in a row ended before they were ready."""
        self._failed_starts += not worker.ready
        if self._failed_starts >= _MAX_FAILED_STARTS * self._size and self._failure is None:
            names = ",".join(self._functions)
            self._failure = f"task.function, reward.terms: verifiers end before they are ready ({names or '-'})"
        if self._failure is None:
            self._spawn()

    def _check_workers(self) -> None:
        """Kills workers that are overdue, and forks extra ones while some are slow and requests wait."""
        slow = 0
        for worker in list(self._workers):
            if (worker.ready and worker.job is None) or time.monotonic() - worker.since <= self._unchecked_seconds:
                continue
            if worker.channel.poll():
                continue  # it has answered, and this thread has not come to read that
            now = worker.time_spent()
            if reason := self._overdue_reason(worker, now):
                job = worker.job
                self._end(worker)
                self.replaced += 1
                if job is not None:
                    self._refuse(job, reason)
                self._replace(worker)
            elif now.state in ("T", "t", "Z", "X"):
                self._worker_ended(worker, stopped=True)
            elif worker.job is not None and now.waited > _SLOW_SECONDS:
                slow += 1
                self._lower_priority(worker)
        if self._queue and slow:
            room = self._size * _MOST_WORKERS - len(self._workers)
            for _ in range(min(self._size - (len(self._workers) - slow), room)):
                self._spawn()

    def _overdue_reason(self, worker: _Worker, now: TimeSpent) -> str | None:
        """Why a worker's time is up; None if it is not."""
        if not worker.ready:
            return "start" if now.waited > _START_SECONDS else None
        if now.cpu > self._config.deadline:
            return f"deadline of {self._config.deadline:g} s"
        if now.waited > self._wall_limit:
            return f"deadline: no answer after {self._wall_limit:g} s (verifier.wall_limit)"
        return None

    @staticmethod
    def _lower_priority(worker: _Worker) -> None:
        """Lowers a slow worker's priority, so that the others come first."""
        if not worker.slow:
            worker.slow = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, worker.pid, _SLOW_NICE)

    def _next_check(self) -> float | None:
        """Seconds until a worker has to be checked even if no message comes; None = no worker is busy."""
        times = []
        for worker in self._workers:
            if worker.ready and worker.job is None:
                continue
            age = time.monotonic() - worker.since
            if age <= self._unchecked_seconds:
                times.append(self._unchecked_seconds - age + 0.01)
            elif not worker.slow:
                times.append(_CHECK_SECONDS)
            else:
                now = worker.time_spent()
                left = min(self._config.deadline - now.cpu, self._wall_limit - now.waited)
                times.append(min(max(_CHECK_SECONDS, left), 1.0))
        return min(times) if times else None
