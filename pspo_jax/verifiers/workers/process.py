"""The processes of the pool: a fork server, and workers that answer one request at a time. Neither imports JAX.

`python -m pspo_jax.verifiers.workers.process FD LIMITS` is the fork server: a clean process with a single thread that
has imported the verifiers, and that forks a worker for each socket it is handed. A fork takes milliseconds where a new
interpreter takes half a second, so a stuck worker is replaced at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from pspo_jax.verifiers import countdown, math_answer, multiple_choice
from pspo_jax.verifiers.workers import functions
from pspo_jax.verifiers.workers.requests import Reply, WorkerLimits

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

SPAWN, KILL = b"S", b"K"
"""The fork server's two commands."""
PID = struct.Struct("<qi")
"""A process id, and how that process ended."""
_CPU_MARGIN = 2
"""Seconds of processor time beyond the deadline, after which a worker ends even if the pool does not kill it."""
_MAX_LOG = 16 * 2**20
"""Bytes that a worker may print before its output goes nowhere."""
_MAX_TRACEBACK = 4000
"""Characters."""


class Verdict(NamedTuple):
    """A verifier's verdict on one completion."""

    score: float | None
    """None = no verdict."""
    answer: str | None
    """The answer that was found, in a canonical form; None = none was found."""


def verify_math(gold: str, answer: str | None) -> Verdict:
    """Scores the answer that `math_answer.final_answer` found."""
    return Verdict(0.0, None) if answer is None else Verdict(*math_answer.score(gold, answer))


def verify_countdown(numbers: list[int], target: int, completion: str, tagged: bool) -> Verdict:
    """Scores an expression: a `tagged` completion holds it in <answer> or \\boxed{}, any other consists of it."""
    expression = countdown.answer_of(completion) if tagged else completion
    shown = None if expression is None else expression.strip()[:200]
    return Verdict(countdown.score(expression, numbers, target), shown)


def verify_choice(gold: str, completion: str, options: int, texts: Sequence[str] = ()) -> Verdict:
    """Scores the option that a completion settles on against the gold letter."""
    letter = multiple_choice.chosen(completion, options, texts)
    return Verdict(float(letter == gold), letter)


def verify_exact(gold: str, completion: str) -> Verdict:
    """Scores a completion that is to be the gold answer itself, but for its reasoning and space around it."""
    text = completion.rpartition("</think>")[2].strip()
    return Verdict(float(text == gold), text[:200])


def verify_gold(gold: str) -> Verdict:
    """Scores a gold answer against itself: 1 if it is accepted from a completion, 0 if it is not or cannot be read."""
    value, name = math_answer.score(gold, "\\boxed{" + gold.partition(math_answer.ALTERNATIVES)[0] + "}")
    return Verdict(value or 0.0, name)


def verify_gym(dataset: str, options: dict[str, object], index: int, completion: str) -> Verdict:
    """Scores by the reasoning-gym dataset that made the question, which is made again from the same settings."""
    answer = countdown.answer_of(completion)
    if answer is None:
        answer = completion.rpartition("</think>")[2].strip()
    maker = _gym(dataset, json.dumps(options))
    return Verdict(float(maker.score_answer(answer, maker[index])), answer[:200])


@lru_cache(64)
def _gym(dataset: str, options: str) -> ProceduralDataset:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **json.loads(options))


def verify_function(
    function: str,
    prompt: str,
    completions: list[str],
    token_ids: list[list[int]],
    answer: object,
    step: int,
    columns: dict[str, object],
    messages: list[functions.Message] | None = None,
    steps: int = 0,
) -> functions.FunctionScores:
    """Scores completions of one prompt by a user's `module:function`; the module `functions` describes its arguments.

    Args:
      answer: the row's own value, of any type.
      columns: the row's record.
      messages: the prompt as its conversation, for conversational data.
      steps: steps of the whole run.
    """
    request = functions.FunctionRequest(prompt, messages, completions, token_ids, answer, step, steps, columns)
    return functions.score_completions(function, request)


VERIFIERS: dict[str, Callable[..., Verdict | functions.FunctionScores]] = {
    "math": verify_math,
    "gold": verify_gold,
    "countdown": verify_countdown,
    "choice": verify_choice,
    "exact": verify_exact,
    "reasoning_gym": verify_gym,
    "function": verify_function,
}
"""The verifier of each kind of request; it takes the request's arguments by name, so each has its own signature."""


def serve(channel: Connection, limits: WorkerLimits) -> None:
    """Answers requests until the channel closes: (number, kind, arguments) in, a reply with the same number out."""
    _confine(limits)
    home, me = os.getcwd(), os.getpid()
    group_functions, required_columns = [], {}
    for name in limits.functions:
        try:
            call = functions.load_function(name)
            required_columns[name] = functions.required_columns(call)
            if functions.takes_group(call) or functions.is_async(call):
                group_functions.append(name)
        except BaseException as error:  # noqa: BLE001 - the user's module may raise anything; it is reported
            channel.send_bytes(json.dumps({"failed_import": name, "error": functions.line_of(error)}).encode())
            return
    ready = {"ready": True, "group_functions": group_functions, "required_columns": required_columns}
    channel.send_bytes(json.dumps(ready).encode())
    while True:
        try:
            number, kind, arguments = channel.recv()
        except EOFError:
            return
        _reset(limits.log, home)
        _allow_cpu(limits.deadline)
        reply = _reply_to(kind, arguments, limits.memory_mib)
        if os.getpid() != me:
            os._exit(0)  # the function forked, and this is its child, which has come back too
        channel.send_bytes(json.dumps({"number": number, **reply._asdict()}).encode())
        if reply.reason and reply.reason.startswith("out of memory"):
            return  # a fresh worker has its memory in order


def _reply_to(kind: str, arguments: dict[str, object], memory_mib: int) -> Reply:
    """The verdict, or why there is none in one line (`reason`) and in full (`error`)."""
    try:
        verdict = VERIFIERS[kind](**arguments)
    except MemoryError:
        return Reply(None, None, f"out of memory (verifier.memory_mib={memory_mib})")
    except BaseException as error:  # noqa: BLE001 - whatever a verifier raises means no verdict, and is reported in full
        return Reply(None, None, functions.line_of(error), functions.escaped(traceback.format_exc(), _MAX_TRACEBACK))
    if isinstance(verdict, functions.FunctionScores):
        return Reply(verdict.scores, None, None, None, verdict.failed, verdict.metrics, verdict.columns)
    return Reply(verdict.score, verdict.answer, None)


def _reset(log: str | None, home: str) -> None:
    """Removes traces of the request before: an alarm that is due, another current folder, closed outputs."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(OSError):
        os.chdir(home)
    try:
        sizes = [os.fstat(stream).st_size for stream in (1, 2)]
        closed = sys.stdout.closed or sys.stderr.closed
    except (OSError, AttributeError):
        sizes, closed = [0, 0], True
    if closed or max(sizes) > _MAX_LOG:
        _print_to(log if closed else None)


def _confine(limits: WorkerLimits) -> None:
    """Limits this process's memory and network, and leaves Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        size = limits.memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if not limits.network:
        sys.addaudithook(_no_network)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _print_to(limits.log)
    sys.setrecursionlimit(2000)


def _print_to(path: str | None) -> None:
    """Sends what this process prints to a file; None = nowhere."""
    target = os.open(path or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(target, stream)
    if target > 2:
        os.close(target)
    # A line of odd characters is no reason to lose a verdict, whatever the encoding of the terminal is.
    sys.stdout, sys.stderr = (
        open(stream, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115 - open for good
        for stream in (1, 2)
    )


def _no_network(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook that refuses Python's network calls."""
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(f"{event}: verifiers have no network; set verifier.network true to allow it")


def _allow_cpu(seconds: float) -> None:
    """Ends this process once one request has used more than `seconds` of processor time, even if nobody kills it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + _CPU_MARGIN
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def fork_server(control: socket.socket, limits: WorkerLimits) -> None:
    """Forks a worker for each socket that arrives and kills the workers that are named, until `control` closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload(limits.imports)
    alive: dict[int, int | None] = {}
    control.sendall(PID.pack(os.getpid(), 0))
    try:
        _serve_forks(control, limits, alive)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the main process was killed
    finally:
        for pid in list(alive):
            _end(pid, alive)


def _serve_forks(control: socket.socket, limits: WorkerLimits, alive: dict[int, int | None]) -> None:
    """Obeys the main process's commands; `alive` holds each worker's exit status, None while it runs."""
    while True:
        message, handles, _, _ = socket.recv_fds(control, 1 + PID.size, 1)
        if not message:
            return
        if message[:1] == SPAWN:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)  # processes that a user's function starts end with the worker
                control.close()
                status = 1
                try:
                    with Connection(handles[0]) as channel, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        serve(channel, limits)
                    status = 0
                finally:
                    os._exit(status)
            os.close(handles[0])
            alive[pid] = None
            control.sendall(PID.pack(pid, 0))
        else:
            pid, _ = PID.unpack(message[1:])
            control.sendall(PID.pack(pid, _end(pid, alive)))
        _reap(alive)


_WARM_UP = (
    ("\\frac{1}{2}", "\\boxed{0.5}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("y=2x+1", "\\boxed{x=5}"),
    ("(-\\infty,3)\\cup[5,\\infty)", "\\boxed{x>3}"),
    ("\\{1,2\\}", "\\boxed{1, 2, 3}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\3\\end{pmatrix}}"),
    ("\\frac{\\sqrt{3}\\pi}{2}", "\\boxed{\\sin 60^\\circ}"),
    ("\\text{Evelyn}", "It is $18 in all, 50\\% more."),
)
"""(gold, answer) pairs of all kinds: sympy imports modules and fills caches when it first meets each kind."""


def _preload(modules: Sequence[str]) -> None:
    """Imports what every worker needs and uses it once, so that all forks share the warm memory."""
    import logging

    import sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for gold, answer in _WARM_UP:
        math_answer.score(gold, answer)
    sympy.simplify(sympy.Symbol("x") - sympy.Symbol("x"))
    for module in modules:
        importlib.import_module(module)


def _end(pid: int, alive: dict[int, int | None]) -> int:
    """Kills a worker and the processes that it started; gives its exit code as os.waitstatus_to_exitcode does."""
    status = alive.pop(pid, 0)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have come to its group yet
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status


def _reap(alive: dict[int, int | None]) -> None:
    """Notes the exit codes of the workers that have ended."""
    for pid, status in list(alive.items()):
        if status is None:
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                alive[pid] = os.waitstatus_to_exitcode(code)


if __name__ == "__main__":
    fork_server(socket.socket(fileno=int(sys.argv[1])), WorkerLimits(**json.loads(sys.argv[2])))
