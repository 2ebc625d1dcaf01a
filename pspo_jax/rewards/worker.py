"""The worker's side of verification: limits, then one request at a time. Never imports JAX.

`python -m pspo_jax.rewards.worker FD LIMITS` is the nursery: one clean process with a single thread that has imported
the verifiers and forks a worker for each socket it is handed. A fork takes milliseconds where a fresh interpreter takes
half a second, so a stuck worker is replaced at once.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
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

from pspo_jax.rewards import choice, countdown
from pspo_jax.rewards import math as mathematics

SPAWN, KILL = b"S", b"K"
_PID = struct.Struct("<q")
_CPU_MARGIN = 2
_MAX_REWARD = 1e6
_MAX_LOG = 16 * 2**20
Verdict = tuple[float | list[float | None] | None, str | None]
"""(score, canonical answer)."""


def verify_math(gold: str, answer: str | None) -> Verdict:
    """Score of what `math.final_answer` found."""
    return (0.0, None) if answer is None else mathematics.score(gold, answer)


def verify_countdown(numbers: list[int], target: int, completion: str, tagged: bool) -> Verdict:
    """Score of an expression; `tagged` completions hold it in <answer> or \\boxed{}, others are it."""
    expression = countdown.answer_of(completion) if tagged else completion
    return countdown.score(expression, numbers, target), None if expression is None else expression.strip()[:200]


def verify_choice(gold: str, completion: str, options: int, texts: Sequence[str] = ()) -> Verdict:
    letter = choice.chosen(completion, options, texts)
    return float(letter == gold), letter


def verify_gold(gold: str) -> Verdict:
    """1 if a gold answer, given as a completion would give it, is accepted; 0 if not, or if it cannot be read."""
    value, name = mathematics.score(gold, "\\boxed{" + gold.partition(mathematics.ALTERNATIVES)[0] + "}")
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
    answer: str,
    step: int,
    columns: dict[str, Any],
) -> Verdict:
    """Scores of a user's `module:function`, one per completion.

    A function with a parameter `completions` is called once, with lists, as TRL's reward functions are; any other once
    per completion. Either gets those of prompt(s), completion(s), token_ids / completion_ids, answer, step and the
    row's columns that it names, or all of them if it takes **kwargs.
    """
    call = load_function(function)
    n = len(completions)
    if _takes_lists(call):
        lists = {name: [value] * n for name, value in {**columns, "answer": answer}.items()}
        lists |= {"prompts": [prompt] * n, "completions": completions, "completion_ids": token_ids}
        scores = _call(call, {**lists, "step": step})
        if not isinstance(scores, list | tuple) and not hasattr(scores, "tolist"):
            raise TypeError(f"{function} must return a list of {n} numbers, got {type(scores).__name__}")
        scores = list(scores)
        if len(scores) != n:
            raise ValueError(f"{function} returned {len(scores)} rewards for {n} completions")
    else:
        one = {**columns, "prompt": prompt, "answer": answer, "step": step}
        scores = [
            _call(call, {**one, "completion": c, "token_ids": ids})
            for c, ids in zip(completions, token_ids, strict=True)
        ]
    return [_number(function, s) for s in scores], None


def _takes_lists(call: Callable[..., Any]) -> bool:
    return "completions" in inspect.signature(call).parameters


def _call(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    parameters = inspect.signature(call).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return call(**arguments)
    return call(**{p.name: arguments[p.name] for p in parameters if p.name in arguments or p.default is p.empty})


def _number(function: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | list | tuple | dict) or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{function} must return one number or None for a completion, got {str(value)[:60]!r}")
    number = float(value)
    if not abs(number) <= _MAX_REWARD:
        raise ValueError(f"{function} returned {number}, allowed is up to 1e6; return None where there is no verdict")
    return number


def load_function(name: str) -> Callable[..., Any]:
    """The object that `module:function` names; the current folder is searched first."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    if not callable(value):
        raise TypeError(f"{name} is no function")
    return value


VERIFIERS: dict[str, Callable[..., Verdict]] = {
    "math": verify_math,
    "gold": verify_gold,
    "countdown": verify_countdown,
    "choice": verify_choice,
    "reasoning_gym": verify_gym,
    "function": verify_function,
}


def serve(channel: Connection, limits: dict[str, Any]) -> None:
    """Answer requests until the channel closes: {"kind", "arguments"} in, {"score", "answer", "error"} out."""
    _confine(limits)
    grouped = []
    for function in limits["functions"]:
        try:
            if _takes_lists(load_function(function)):
                grouped.append(function)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's module may raise anything; it is reported
            reason = f"{type(error).__name__}: {error}"
            channel.send_bytes(json.dumps({"failed": function, "error": reason}).encode())
            return
    channel.send_bytes(json.dumps({"ready": True, "grouped": grouped}).encode())
    while True:
        try:
            kind, arguments = channel.recv()
        except EOFError:
            return
        _allow_cpu(limits["deadline"])
        if os.fstat(1).st_size > _MAX_LOG:
            _print_to(None)
        reply: dict[str, Any] = {"score": None, "answer": None, "error": None}
        try:
            reply["score"], reply["answer"] = VERIFIERS[kind](**arguments)
        except MemoryError:
            reply["error"] = f"out of memory (verifier.memory_mib={limits['memory_mib']})"
        except Exception:  # noqa: BLE001 - whatever a verifier raises means no verdict, and is reported in full
            reply["error"] = traceback.format_exc()[-4000:]
        channel.send_bytes(json.dumps(reply).encode())
        if reply["error"] and "out of memory" in reply["error"]:
            return  # a fresh worker has its memory in order


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
    with open(path or os.devnull, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(f"{event}: verifiers have no network; set verifier.network true to allow it")


def _allow_cpu(seconds: float) -> None:
    """End this process if one request burns more than `seconds` of CPU, even if nobody is left to kill it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + _CPU_MARGIN
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def nursery(control: socket.socket, limits: dict[str, Any]) -> None:
    """Fork a worker for each socket that arrives, kill those named, until the control socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload(limits["imports"])
    alive: set[int] = set()
    control.sendall(_PID.pack(os.getpid()))
    try:
        _tend(control, limits, alive)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the main process was killed
    finally:
        for pid in list(alive):
            _end(pid, alive)


def _tend(control: socket.socket, limits: dict[str, Any], alive: set[int]) -> None:
    while True:
        message, handles, _, _ = socket.recv_fds(control, 1 + _PID.size, 1)
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
            alive.add(pid)
            control.sendall(_PID.pack(pid))
        else:
            (pid,) = _PID.unpack(message[1:])
            _end(pid, alive)
            control.sendall(_PID.pack(pid))
        _reap(alive)


def _preload(modules: list[str]) -> None:
    """What every worker needs, imported once and shared by all forks."""
    import logging

    import sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    mathematics.score("\\frac{1}{2}", "\\boxed{0.5}")
    sympy.simplify(sympy.Symbol("x") - sympy.Symbol("x"))
    for module in modules:
        importlib.import_module(module)


def _end(pid: int, alive: set[int]) -> None:
    if pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have come to its group yet
        os.waitpid(pid, 0)
        alive.discard(pid)


def _reap(alive: set[int]) -> None:
    for pid in list(alive):
        if os.waitpid(pid, os.WNOHANG)[0]:
            alive.discard(pid)


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
