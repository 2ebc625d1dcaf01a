"""The worker's side of verification: limits, then one request at a time. Never imports JAX.

`python -m pspo_jax.rewards.worker FD LIMITS` is the nursery: one clean process with a single thread that has imported
the verifiers and forks a worker for each socket it is handed. A fork takes milliseconds where a fresh interpreter takes
half a second, so a stuck worker is replaced at once.
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
from typing import Any

from pspo_jax.verifiers import countdown, math_answer, multiple_choice
from pspo_jax.verifiers.workers import functions

SPAWN, KILL = b"S", b"K"
PID = struct.Struct("<qi")
"""A process, and how it ended."""
_CPU_MARGIN = 2
_MAX_LOG = 16 * 2**20
_MAX_TRACEBACK = 4000
Verdict = tuple[float | None, str | None]
"""(score, canonical answer)."""


def verify_math(gold: str, answer: str | None) -> Verdict:
    """Score of what `math.final_answer` found."""
    return (0.0, None) if answer is None else math_answer.score(gold, answer)


def verify_countdown(numbers: list[int], target: int, completion: str, tagged: bool) -> Verdict:
    """Score of an expression; `tagged` completions hold it in <answer> or \\boxed{}, others are it."""
    expression = countdown.answer_of(completion) if tagged else completion
    return countdown.score(expression, numbers, target), None if expression is None else expression.strip()[:200]


def verify_choice(gold: str, completion: str, options: int, texts: Sequence[str] = ()) -> Verdict:
    letter = multiple_choice.chosen(completion, options, texts)
    return float(letter == gold), letter


def verify_gold(gold: str) -> Verdict:
    """1 if a gold answer, given as a completion would give it, is accepted; 0 if not, or if it cannot be read."""
    value, name = math_answer.score(gold, "\\boxed{" + gold.partition(math_answer.ALTERNATIVES)[0] + "}")
    return value or 0.0, name


def verify_gym(dataset: str, options: dict[str, Any], index: int, completion: str) -> Verdict:
    """Score by the reasoning-gym dataset that made the question, from the same settings."""
    answer = countdown.answer_of(completion)
    if answer is None:
        answer = completion.rpartition("</think>")[2].strip()
    maker = _gym(dataset, json.dumps(options))
    return float(maker.score_answer(answer, maker[index])), answer[:200]


@lru_cache(64)
def _gym(dataset: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **json.loads(options))


def verify_function(
    function: str,
    prompt: str,
    completions: list[str],
    token_ids: list[list[int]],
    answer: Any,
    step: int,
    columns: dict[str, Any],
    messages: list[dict[str, Any]] | None = None,
    steps: int = 0,
) -> functions.Graded:
    """Scores of a user's `module:function`, one per completion; `functions` says what it is given.

    Args:
      answer: the row's own value, of any type.
      columns: the row's record.
      messages: the prompt as its conversation, for conversational data.
      steps: of the whole run.
    """
    asked = functions.Asked(prompt, messages, completions, token_ids, answer, step, steps, columns)
    return functions.grade(function, asked)


VERIFIERS: dict[str, Callable[..., Verdict | functions.Graded]] = {
    "math": verify_math,
    "gold": verify_gold,
    "countdown": verify_countdown,
    "choice": verify_choice,
    "reasoning_gym": verify_gym,
    "function": verify_function,
}


def serve(channel: Connection, limits: dict[str, Any]) -> None:
    """Answer requests until the channel closes: (number, kind, arguments) in, a reply with the same number out."""
    _confine(limits)
    home, me = os.getcwd(), os.getpid()
    grouped, needs = [], {}
    for name in limits["functions"]:
        try:
            call = functions.load_function(name)
            needs[name] = functions.needs(call)
            if functions.takes_lists(call) or functions.is_async(call):
                grouped.append(name)
        except BaseException as error:  # noqa: BLE001 - the user's module may raise anything; it is reported
            channel.send_bytes(json.dumps({"failed_import": name, "error": functions.line_of(error)}).encode())
            return
    channel.send_bytes(json.dumps({"ready": True, "grouped": grouped, "needs": needs}).encode())
    while True:
        try:
            number, kind, arguments = channel.recv()
        except EOFError:
            return
        _undo(limits["log"], home)
        _allow_cpu(limits["deadline"])
        reply = _answered(kind, arguments, limits["memory_mib"])
        if os.getpid() != me:
            os._exit(0)  # the function forked, and this is its child, which has come back too
        channel.send_bytes(json.dumps({"number": number, **reply}).encode())
        if reply["reason"] and reply["reason"].startswith("out of memory"):
            return  # a fresh worker has its memory in order


def _answered(kind: str, arguments: dict[str, Any], memory_mib: int) -> dict[str, Any]:
    """A reply: the verdict, or why there is none in a line (`reason`) and in full (`error`)."""
    reply: dict[str, Any] = dict.fromkeys(("score", "answer", "reason", "error", "failed", "metrics", "columns"))
    try:
        verdict = VERIFIERS[kind](**arguments)
        reply["score"], reply["answer"] = verdict[:2]
        if isinstance(verdict, functions.Graded):
            reply |= {"failed": verdict.failed, "metrics": verdict.metrics, "columns": verdict.columns}
    except MemoryError:
        reply["reason"] = f"out of memory (verifier.memory_mib={memory_mib})"
    except BaseException as error:  # noqa: BLE001 - whatever a verifier raises means no verdict, and is reported in full
        reply["reason"] = functions.line_of(error)
        reply["error"] = functions.escaped(traceback.format_exc(), _MAX_TRACEBACK)
    return reply


def _undo(log: str | None, home: str) -> None:
    """Undo what the function before may have left: an alarm that is due, another folder, outputs that are closed."""
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


def _confine(limits: dict[str, Any]) -> None:
    """Memory, CPU time and network of this process; Ctrl-C is for the main process alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        size = limits["memory_mib"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if not limits["network"]:
        sys.addaudithook(_no_network)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _print_to(limits["log"])
    sys.setrecursionlimit(2000)


def _print_to(path: str | None) -> None:
    """Where this process's output goes; None = nowhere."""
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


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(f"{event}: verifiers have no network; set verifier.network true to allow it")


def _allow_cpu(seconds: float) -> None:
    """End this process if one request burns more than `seconds` of CPU, even if nobody is left to kill it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + _CPU_MARGIN
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def fork_server(control: socket.socket, limits: dict[str, Any]) -> None:
    """Fork a worker for each socket that arrives, kill those named, until the control socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload(limits["imports"])
    alive: dict[int, int | None] = {}
    control.sendall(PID.pack(os.getpid(), 0))
    try:
        _serve_forks(control, limits, alive)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the main process was killed
    finally:
        for pid in list(alive):
            _end(pid, alive)


def _serve_forks(control: socket.socket, limits: dict[str, Any], alive: dict[int, int | None]) -> None:
    """Serve the main process; `alive` holds each worker's status, None while it runs."""
    while True:
        message, handles, _, _ = socket.recv_fds(control, 1 + PID.size, 1)
        if not message:
            return
        if message[:1] == SPAWN:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)  # what a user's function starts ends with its worker
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


_WARMING = (
    ("\\frac{1}{2}", "\\boxed{0.5}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("y=2x+1", "\\boxed{x=5}"),
    ("(-\\infty,3)\\cup[5,\\infty)", "\\boxed{x>3}"),
    ("\\{1,2\\}", "\\boxed{1, 2, 3}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\3\\end{pmatrix}}"),
    ("\\frac{\\sqrt{3}\\pi}{2}", "\\boxed{\\sin 60^\\circ}"),
    ("\\text{Evelyn}", "It is $18 in all, 50\\% more."),
)
"""Answers of all kinds: sympy imports and remembers much when it first meets one."""


def _preload(modules: list[str]) -> None:
    """What every worker needs, imported and used once, and shared by all forks."""
    import logging

    import sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for gold, answer in _WARMING:
        math_answer.score(gold, answer)
    sympy.simplify(sympy.Symbol("x") - sympy.Symbol("x"))
    for module in modules:
        importlib.import_module(module)


def _end(pid: int, alive: dict[int, int | None]) -> int:
    """Kill a worker and what it started; how it ended, as os.waitstatus_to_exitcode says it."""
    status = alive.pop(pid, 0)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have come to its group yet
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status


def _reap(alive: dict[int, int | None]) -> None:
    for pid, status in list(alive.items()):
        if status is None:
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                alive[pid] = os.waitstatus_to_exitcode(code)


if __name__ == "__main__":
    fork_server(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
