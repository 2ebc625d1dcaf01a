"""Users' reward functions: how one is found, which arguments it is given, and what it may return.

Two forms are known. A function of one completion gets that completion's text and the values of its row. A function of
a group is called as TRL's GRPOTrainer calls its own: once, with keyword arguments that are lists, with messages for
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
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from types import CellType, CodeType, SimpleNamespace
from typing import NamedTuple, Protocol, SupportsFloat, cast

GROUP_PARAMETERS = ("completions", "prompts", "completion_ids")
"""Parameters that make a function one of a group."""
COMPLETION_PARAMETERS = ("completion", "prompt", "token_ids")
"""Parameters that make a function one of a single completion."""
_MAX_REWARD = 1e6
_MAX_LOGGED = 1000
"""Characters that are kept of a value which a function logs with a completion."""

Message = dict[str, object]
"""A turn of a conversation: its role, its content, and what else a chat template reads."""


class UserFunction(Protocol):
    """A user's function in either form.

    It receives those arguments that its own signature names, so its parameters are known at run time only. A function
    of one completion returns a number or None (no opinion); a function of a group returns one of these for each
    completion, in any iterable. Both may return an awaitable of that instead, and a function of a group an
    asynchronous generator.
    """

    def __call__(self, *arguments: object, **named: object) -> object: ...


class FunctionScores(NamedTuple):
    """Scores of a prompt's completions by one function, one entry per completion."""

    scores: list[float | None]
    """None = no opinion, or a failure."""
    failed: list[str | None]
    """One line on why a completion has no score; None = it has one, or the function has no opinion."""
    metrics: dict[str, list[float]]
    """Values that the function gave to `log_metric`."""
    columns: dict[str, list[object]]
    """Values that the function gave to `log_extra`: one per completion."""


class FunctionRequest(NamedTuple):
    """Completions of one prompt to be scored, and the prompt's row."""

    prompt: str
    messages: list[Message] | None
    """The prompt as a conversation; None = the data are plain text."""
    completions: list[str]
    token_ids: list[list[int]]
    answer: object
    """The row's own value, of any type."""
    step: int
    steps: int
    """Steps of the whole run."""
    columns: dict[str, object]
    """The row's record in its source."""


def load_function(name: str) -> UserFunction:
    """Imports the function that `module:function` names; the current folder is searched first.

    Raises:
      TypeError: the name belongs to something that cannot be called; or whatever the user's module raises.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value: object = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    if not callable(value):
        raise TypeError(f"{name} is no function")
    return cast(UserFunction, value)


def takes_group(call: UserFunction) -> bool:
    """Whether a function is one of a group, as TRL's are.

    Its parameters decide. Where it takes `**kwargs` alone, as the result of a decorator without functools.wraps does,
    the names that its code asks for decide, and then the functions that it wraps.
    """
    parameters = inspect.signature(call).parameters
    if any(name in parameters for name in (*GROUP_PARAMETERS, *COMPLETION_PARAMETERS)):
        return any(name in parameters for name in GROUP_PARAMETERS)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    inner = _unwrapped(call)
    words = set(_constants(getattr(inner, "__code__", None)))
    if words & {*GROUP_PARAMETERS, *COMPLETION_PARAMETERS}:
        return not words.isdisjoint(GROUP_PARAMETERS)
    cells = (cell.cell_contents for cell in getattr(inner, "__closure__", None) or () if _filled(cell))
    return any(callable(value) and _has_signature(value) and takes_group(value) for value in cells)


def required_columns(call: UserFunction) -> list[str]:
    """Names of the parameters without a default that only a row's columns can fill."""
    given = {*GROUP_PARAMETERS, *COMPLETION_PARAMETERS, "answer", "step", "trainer_state", "log_extra", "log_metric"}
    return [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    ]


def is_async(call: UserFunction) -> bool:
    """Whether a function is a coroutine function."""
    return inspect.iscoroutinefunction(_unwrapped(call))


def _unwrapped(call: object) -> object:
    """The function behind partial objects and callable objects."""
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isfunction(call) or inspect.ismethod(call):
        return call
    return call if inspect.isclass(call) or inspect.isbuiltin(call) else type(call).__call__


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _has_signature(call: UserFunction) -> bool:
    try:
        inspect.signature(call)
    except (TypeError, ValueError):
        return False
    return True


def _constants(code: CodeType | None) -> Iterator[str]:
    """The strings that a function's code, and the code inside it, mentions."""
    for constant in code.co_consts if code else ():
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from (word for word in constant if isinstance(word, str))
        elif isinstance(constant, CodeType):
            yield from _constants(constant)


def score_completions(name: str, request: FunctionRequest) -> FunctionScores:
    """Scores the completions of a prompt by `module:function`.

    Raises:
      TypeError, ValueError: the function returned something other than a number or None for each completion.
      BaseException: whatever the function raises for every one of the completions.
    """
    call = load_function(name)
    logs = _Logs({}, {})
    results = _score_group(name, call, request, logs) if takes_group(call) else _score_each(name, call, request, logs)
    if all(isinstance(result, BaseException) for result in results):
        raise next(result for result in results if isinstance(result, BaseException))
    failed = [line_of(result) if isinstance(result, BaseException) else None for result in results]
    scores = [None if isinstance(result, BaseException) else result for result in results]
    columns = {k: v for k, v in logs.columns.items() if len(v) == len(scores)}
    return FunctionScores(scores, failed, logs.metrics, columns)


Result = float | None | BaseException
"""The score of one completion, no opinion, or the error in its place."""


def _score_group(name: str, call: UserFunction, request: FunctionRequest, logs: _Logs) -> list[Result]:
    """Calls once for all completions: in the form of the data or, if the function cannot read that, in the other."""
    declared = _declared_form(call)
    chat = request.messages is not None if declared is None else declared
    n = len(request.completions)
    try:
        returned = _awaited(_call(name, call, _group_arguments(request, chat, logs)))
        return _rewards(name, returned, n)
    except (TypeError, AttributeError, KeyError) as error:
        first = error
    # open-r1's functions read messages, whatever the data are.
    logs.clear()
    try:
        returned = _awaited(_call(name, call, _group_arguments(request, not chat, logs)))
        return _rewards(name, returned, n)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, AssertionError):
        raise first from None


def _declared_form(call: UserFunction) -> bool | None:
    """True if the annotation of `completions` says messages, False if it says text, None if it says neither."""
    parameter = inspect.signature(call).parameters.get("completions")
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    text = str(parameter.annotation).lower()
    return True if "dict" in text else False if "str" in text else None


def _group_arguments(request: FunctionRequest, chat: bool, logs: _Logs) -> dict[str, object]:
    """Keyword arguments of a function of a group; `chat` = prompts and completions are lists of messages."""
    n = len(request.completions)
    row = {k: v for k, v in request.columns.items() if k not in ("prompt", "completion", "completion_ids")}
    # Each completion has its own copy, which the function may change.
    lists: dict[str, object] = {
        name: [_copied(value) for _ in range(n)] for name, value in {**row, "answer": request.answer}.items()
    }
    messages = request.messages or [{"role": "user", "content": request.prompt}]
    if chat:
        prompts: list[object] = [_copied(messages) for _ in range(n)]
        completions: list[object] = [[{"role": "assistant", "content": text}] for text in request.completions]
    else:
        prompts, completions = [request.prompt for _ in range(n)], list(request.completions)
    lists |= {"prompts": prompts, "completions": completions, "completion_ids": [list(i) for i in request.token_ids]}
    return lists | _trainer_arguments(request, logs)


def _trainer_arguments(request: FunctionRequest, logs: _Logs) -> dict[str, object]:
    """The step, and the arguments that TRL's trainer passes beside the data."""
    state = SimpleNamespace(
        global_step=request.step,
        max_steps=request.steps,
        epoch=0.0,
        num_train_epochs=1,
        log_history=[],
        is_world_process_zero=True,
        is_local_process_zero=True,
    )
    return {
        "step": request.step,
        "trainer_state": state,
        "log_extra": logs.log_extra,
        "log_metric": logs.log_metric,
    }


def _score_each(name: str, call: UserFunction, request: FunctionRequest, logs: _Logs) -> list[Result]:
    """Calls once for each completion; coroutines run at the same time."""
    returned: list[object] = []
    for text, ids in zip(request.completions, request.token_ids, strict=True):
        row = {k: _copied(v) for k, v in request.columns.items()}
        given: dict[str, object] = {
            **row,
            "prompt": request.prompt,
            "answer": _copied(request.answer),
            "step": request.step,
        }
        given |= {"completion": text, "token_ids": list(ids)}
        try:
            returned.append(_call(name, call, given, _trainer_arguments(request, logs)))
        except BaseException as error:  # noqa: BLE001 - whatever it raises is reported, for this completion alone
            returned.append(error)
    if any(inspect.isawaitable(one) for one in returned):
        returned = _runner().run(_gather(returned))
    return [one if isinstance(one, BaseException) else _reward_or_error(name, one) for one in returned]


async def _gather(values: Sequence[object]) -> list[object]:
    """The values, those that are awaitable awaited together; an error stands in the place of its value."""

    async def one(value: object) -> object:
        return await value if inspect.isawaitable(value) else value

    return await asyncio.gather(*(one(value) for value in values), return_exceptions=True)


def _awaited(value: object) -> object:
    """A function's result: an awaitable is awaited, an asynchronous generator collected in a list."""
    if inspect.isasyncgen(value):
        return _runner().run(_collect(aiter(value)))
    return _runner().run(_wait(value)) if inspect.isawaitable(value) else value


async def _collect(items: AsyncIterator[object]) -> list[object]:
    return [item async for item in items]


async def _wait(value: Awaitable[object]) -> object:
    return await value


@functools.lru_cache(1)
def _runner() -> asyncio.Runner:
    """The event loop of all calls of this process, because a service's client may be bound to the loop of its birth."""
    return asyncio.Runner()


def _call(name: str, call: UserFunction, given: dict[str, object], more: Mapping[str, object] = {}) -> object:
    """Calls with the arguments that the signature names; a function with `**kwargs` gets all of `given`."""
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


def _copied(value: object) -> object:
    """A copy that the function may change."""
    return copy.deepcopy(value) if isinstance(value, dict | list) else value


def _rewards(name: str, returned: object, n: int) -> list[Result]:
    """The results of n completions in what a function of a group returned."""
    if isinstance(returned, str | bytes | Mapping | set | frozenset) or not isinstance(returned, Iterable):
        raise TypeError(f"{name} must return a list of {n} numbers, got {type(returned).__name__}")
    if (dimensions := getattr(returned, "ndim", 1)) != 1:
        raise TypeError(f"{name} must return a list of {n} numbers, got an array of {dimensions} dimensions")
    scores = list(islice(returned, n + 1))
    if len(scores) != n:
        count: object = f"more than {n}" if len(scores) > n else len(scores)
        if isinstance(returned, Sized):
            count = len(returned)
        raise ValueError(f"{name} returned {count} rewards for {n} completions")
    return [_reward_or_error(name, score) for score in scores]


def _reward_or_error(name: str, value: object) -> Result:
    try:
        return _reward(name, value)
    except (TypeError, ValueError, OverflowError) as error:
        return error


def _reward(name: str, value: object) -> float | None:
    """A reward as a finite float of at most 1e6 either way; None stays None."""
    if value is None:
        return None
    if isinstance(value, str | bytes | list | tuple | dict) or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{name} must return one number or None for a completion, got {str(value)[:60]!r}")
    try:
        number = float(cast(SupportsFloat, value))
    except OverflowError:
        number = math.inf
    if not abs(number) <= _MAX_REWARD:
        raise ValueError(f"{name} returned {number}, allowed is up to 1e6; return None where there is no verdict")
    return number + 0.0  # no negative zero


class _Logs(NamedTuple):
    """Values that a function logs during a call."""

    metrics: dict[str, list[float]]
    columns: dict[str, list[object]]

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Logs a number, as TRL's `log_metric`."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Iterable[object]) -> None:
        """Logs a value for each completion, as TRL's `log_extra`."""
        self.columns.setdefault(str(column), []).extend(_json_value(value) for value in values)

    def clear(self) -> None:
        """Forgets everything logged."""
        self.metrics.clear()
        self.columns.clear()


def _json_value(value: object) -> bool | int | float | str | None:
    """A value that JSON can hold: None, truth values and numbers unchanged, everything else as text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return escaped(str(value), _MAX_LOGGED)


def line_of(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    import traceback

    return escaped(" ".join("".join(traceback.format_exception_only(error)[-1:]).split()), 300)


def escaped(text: str, most: int) -> str:
    """A text that any file and screen can hold: unprintable characters as escapes, and at most about `most` characters,
    with the middle left out."""
    if len(text) > most:
        text = f"{text[: most // 3]} ... {text[-(most - most // 3 - 5) :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
