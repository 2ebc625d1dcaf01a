"""A user's reward function: how it is found, what it is given, and what it may return.

Two forms are known. A function of one completion gets that completion's text and the values of its row. A function of
lists is called as TRL's GRPOTrainer calls its own: once, with keyword arguments that are lists, with messages for
conversational data, with `trainer_state`, `log_extra` and `log_metric`. Either may be a coroutine function.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

LISTS = ("completions", "prompts", "completion_ids")
"""Parameters of a function of lists."""
SINGLE = ("completion", "prompt", "token_ids")
"""Parameters of a function of one completion."""
_MAX_REWARD = 1e6
_MAX_LOGGED = 1000
"""Characters of a value that a function logs with a completion."""


class Graded(NamedTuple):
    """What a function says of the completions of a prompt."""

    scores: list[float | None]
    """None = no opinion, or a failure."""
    answer: None
    """A function names no answer; verifiers do."""
    failed: list[str | None]
    """Why a completion has no score, in a line; None = it has one, or the function has no opinion."""
    metrics: dict[str, list[float]]
    """What it gave to `log_metric`."""
    columns: dict[str, list[Any]]
    """What it gave to `log_extra`: a value for each completion."""


class Asked(NamedTuple):
    """Completions of one prompt, and their row."""

    prompt: str
    messages: list[dict[str, Any]] | None
    """The prompt as its conversation; None = the data are plain text."""
    completions: list[str]
    token_ids: list[list[int]]
    answer: Any
    step: int
    steps: int
    """Steps of the whole run."""
    columns: dict[str, Any]


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


def takes_lists(call: Callable[..., Any]) -> bool:
    """Whether a function has TRL's form.

    Its parameters decide. One that takes `**kwargs` alone, as a decorator without functools.wraps does, is judged by
    the names that its code asks for, and by the function that it wraps.
    """
    parameters = inspect.signature(call).parameters
    if any(name in parameters for name in (*LISTS, *SINGLE)):
        return any(name in parameters for name in LISTS)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    inner = _unwrapped(call)
    words = set(_constants(getattr(inner, "__code__", None)))
    if words & {*LISTS, *SINGLE}:
        return not words.isdisjoint(LISTS)
    cells = (cell.cell_contents for cell in getattr(inner, "__closure__", None) or () if _filled(cell))
    return any(callable(value) and _has_signature(value) and takes_lists(value) for value in cells)


def needs(call: Callable[..., Any]) -> list[str]:
    """Parameters that a row's columns have to fill, as nothing else does and they have no default."""
    given = {*LISTS, *SINGLE, "answer", "step", "trainer_state", "log_extra", "log_metric"}
    return [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    ]


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling a function gives something to be awaited."""
    inner = _unwrapped(call)
    return inspect.iscoroutinefunction(inner)


def _unwrapped(call: Any) -> Any:
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isfunction(call) or inspect.ismethod(call):
        return call
    return call if inspect.isclass(call) or inspect.isbuiltin(call) else type(call).__call__


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _has_signature(call: Any) -> bool:
    try:
        inspect.signature(call)
    except (TypeError, ValueError):
        return False
    return True


def _constants(code: CodeType | None) -> Iterator[str]:
    for constant in code.co_consts if code else ():
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from (word for word in constant if isinstance(word, str))
        elif isinstance(constant, CodeType):
            yield from _constants(constant)


def grade(name: str, asked: Asked) -> Graded:
    """Have `module:function` judge the completions of a prompt.

    Raises:
      TypeError, ValueError: it returned something other than a number or None for each; or whatever it raises itself.
    """
    call = load_function(name)
    logged = _Logged({}, {})
    results = _of_lists(name, call, asked, logged) if takes_lists(call) else _one_by_one(name, call, asked, logged)
    if all(isinstance(result, BaseException) for result in results):
        raise next(result for result in results if isinstance(result, BaseException))
    failed = [line_of(result) if isinstance(result, BaseException) else None for result in results]
    scores = [None if isinstance(result, BaseException) else result for result in results]
    columns = {k: v for k, v in logged.columns.items() if len(v) == len(scores)}
    return Graded(scores, None, failed, logged.metrics, columns)


Result = float | None | BaseException


def _of_lists(name: str, call: Callable[..., Any], asked: Asked, logged: _Logged) -> list[Result]:
    """One call for all completions, in the form of the data or, if it cannot read that, in the other one."""
    chat = _declared_form(call)
    chat = asked.messages is not None if chat is None else chat
    n = len(asked.completions)
    try:
        returned = _finished(_call(name, call, _lists(asked, chat, logged)))
        return _numbers(name, returned, n)
    except (TypeError, AttributeError, KeyError) as error:
        first = error
    # open-r1's functions read messages, whatever the data are.
    logged.clear()
    try:
        returned = _finished(_call(name, call, _lists(asked, not chat, logged)))
        return _numbers(name, returned, n)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, AssertionError):
        raise first from None


def _declared_form(call: Callable[..., Any]) -> bool | None:
    """Whether the annotation of `completions` says messages; None = it says nothing."""
    parameter = inspect.signature(call).parameters.get("completions")
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    text = str(parameter.annotation).lower()
    return True if "dict" in text else False if "str" in text else None


def _lists(asked: Asked, chat: bool, logged: _Logged) -> dict[str, Any]:
    n = len(asked.completions)
    row = {k: v for k, v in asked.columns.items() if k not in ("prompt", "completion", "completion_ids")}
    # Each completion has its own copy, which the function may change.
    lists = {name: [_own(value) for _ in range(n)] for name, value in {**row, "answer": asked.answer}.items()}
    messages = asked.messages or [{"role": "user", "content": asked.prompt}]
    if chat:
        prompts: list[Any] = [_own(messages) for _ in range(n)]
        completions: list[Any] = [[{"role": "assistant", "content": text}] for text in asked.completions]
    else:
        prompts, completions = [asked.prompt] * n, list(asked.completions)
    lists |= {"prompts": prompts, "completions": completions, "completion_ids": [list(i) for i in asked.token_ids]}
    return lists | _around(asked, logged)


def _around(asked: Asked, logged: _Logged) -> dict[str, Any]:
    """What TRL's trainer passes beside the data, and the step."""
    state = SimpleNamespace(
        global_step=asked.step,
        max_steps=asked.steps,
        epoch=0.0,
        num_train_epochs=1,
        log_history=[],
        is_world_process_zero=True,
        is_local_process_zero=True,
    )
    return {
        "step": asked.step,
        "trainer_state": state,
        "log_extra": logged.log_extra,
        "log_metric": logged.log_metric,
    }


def _one_by_one(name: str, call: Callable[..., Any], asked: Asked, logged: _Logged) -> list[Result]:
    """A call for each completion; coroutines run at the same time."""
    returned: list[Any] = []
    for text, ids in zip(asked.completions, asked.token_ids, strict=True):
        row = {k: _own(v) for k, v in asked.columns.items()}
        given = {**row, "prompt": asked.prompt, "answer": _own(asked.answer), "step": asked.step}
        given |= {"completion": text, "token_ids": list(ids)}
        try:
            returned.append(_call(name, call, given, _around(asked, logged)))
        except BaseException as error:  # noqa: BLE001 - whatever it raises is reported, for this completion alone
            returned.append(error)
    if any(inspect.isawaitable(one) for one in returned):
        returned = _finished(_gathered(returned))
    return [one if isinstance(one, BaseException) else _number_or_error(name, one) for one in returned]


async def _gathered(values: list[Any]) -> list[Any]:
    async def one(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    return await asyncio.gather(*(one(value) for value in values), return_exceptions=True)


def _finished(value: Any) -> Any:
    """The value, awaited and collected if it is to be."""
    if not (inspect.isawaitable(value) or inspect.isasyncgen(value)):
        return value

    async def collect() -> Any:
        return [item async for item in value] if inspect.isasyncgen(value) else await value

    return _runner().run(collect())


@functools.lru_cache(1)
def _runner() -> asyncio.Runner:
    """One event loop for all calls of this process, as a client of a service may belong to the loop that made it."""
    return asyncio.Runner()


def _call(name: str, call: Callable[..., Any], given: dict[str, Any], more: Mapping[str, Any] = {}) -> Any:
    """Call with the arguments that the signature names, or all of `given` for `**kwargs`."""
    parameters = inspect.signature(call).parameters.values()
    known = {**more, **given}
    missing = [
        p.name
        for p in parameters
        if p.name not in known and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise TypeError(
            f"{name} needs {', '.join(missing)}, which is no column of the row; there are {', '.join(sorted(known))}"
        )
    by_place = [known[p.name] for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in known]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names |= set(given) - {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
    return call(*by_place, **{key: value for key, value in known.items() if key in names})


def _own(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, dict | list) else value


def _numbers(name: str, returned: Any, n: int) -> list[Result]:
    """A result for each of n completions from what a function of lists returned."""
    if isinstance(returned, str | bytes | Mapping | set | frozenset) or not isinstance(returned, Iterable):
        raise TypeError(f"{name} must return a list of {n} numbers, got {type(returned).__name__}")
    if getattr(returned, "ndim", 1) != 1:
        raise TypeError(f"{name} must return a list of {n} numbers, got an array of {returned.ndim} dimensions")  # type: ignore[attr-defined]
    scores = list(islice(returned, n + 1))
    if len(scores) != n:
        count = f"more than {n}" if len(scores) > n and not hasattr(returned, "__len__") else _length(returned, scores)
        raise ValueError(f"{name} returned {count} rewards for {n} completions")
    return [_number_or_error(name, score) for score in scores]


def _length(returned: Any, scores: list[Any]) -> int:
    return len(returned) if hasattr(returned, "__len__") else len(scores)


def _number_or_error(name: str, value: Any) -> Result:
    try:
        return _number(name, value)
    except (TypeError, ValueError, OverflowError) as error:
        return error


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes | list | tuple | dict) or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{name} must return one number or None for a completion, got {str(value)[:60]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _MAX_REWARD:
        raise ValueError(f"{name} returned {number}, allowed is up to 1e6; return None where there is no verdict")
    return number + 0.0  # no negative zero


class _Logged(NamedTuple):
    """What a function logs during a call."""

    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]

    def log_metric(self, name: str, value: Any) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.columns.setdefault(str(column), []).extend(_plain(value) for value in values)

    def clear(self) -> None:
        self.metrics.clear()
        self.columns.clear()


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers and short texts as they are, all else as text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return escaped(str(value), _MAX_LOGGED)


def line_of(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    import traceback

    return escaped(" ".join("".join(traceback.format_exception_only(error)[-1:]).split()), 300)


def escaped(text: str, most: int) -> str:
    """A text that any file and screen can hold: odd characters as escapes, its middle left out beyond `most`."""
    if len(text) > most:
        text = f"{text[: most // 3]} ... {text[-(most - most // 3 - 5) :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
