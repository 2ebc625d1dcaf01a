"""A language model as judge: scores of completions from a service with OpenAI's interface for chat completions.

All requests run in one event loop, in a thread of its own, beside the devices' work. A score that was given is
remembered by what was asked, in memory and in a file of the run folder, so that a run which repeats a step after it was
killed gets the same scores. A completion without a score has no verdict; it is never a guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import JudgeConfig
from pspo_jax.config.text_fields import interval
from pspo_jax.system.storage import StorageError, append_whole, unread
from pspo_jax.verifiers.workers.functions import escaped
from pspo_jax.verifiers.workers.requests import Batch, Reply

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_FIRST_WAIT = 0.5
"""Seconds before the second try; each further wait is twice as long."""
_LONGEST_WAIT = 30.0
"""Seconds of the longest wait that the service has not asked for."""
_MAY_PASS = (408, 409, 425, 429)
"""Status codes below 500 that a later try may not meet again."""
_PROBE_SECONDS = 20.0
"""Seconds that the first request, before the run, may take."""
_KEPT = 1000
"""Characters of a reply that are kept with a completion."""
_LONGEST_REPLY = 2**20
"""Bytes of a reply beyond which it is not read."""
_PLACES = re.compile(r"\{(prompt|answer|completion)\}")
_Result = TypeVar("_Result")


class _Attempt(NamedTuple):
    """The result of one request."""

    text: str | None
    """The judge's words; None = the request failed."""
    reason: str = ""
    """Why it failed, in one line."""
    may_pass: bool = False
    """Whether a later try may succeed."""
    answered: bool = True
    """Whether the service gave any reply."""
    wait: float | None = None
    """Seconds that the service asks to wait before the next try; None = it does not say."""


class Judge:
    """A client of the service that a config names. It is a context manager, which asks one question at its beginning.

    Args:
      config: a validated config.
      memory: JSONL file of the scores that were given; None = they are remembered in memory alone.
    Raises:
      ConfigError: the key is not in the environment, or the service cannot be reached or refuses.
      StorageError: the file cannot be read.
    """

    def __init__(self, config: JudgeConfig, memory: Path | None = None):
        self._config = config
        self._key = _key(config)
        self._memory = memory
        self._scores = {} if memory is None else _read(memory)
        self._pending: dict[str, list[tuple[Batch, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: ClientSession | None = None
        self._slots = asyncio.Semaphore(config.concurrency)

    def __enter__(self) -> Judge:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()
        refused = self._wait(self._open())
        if refused is not None:
            self.close()
            raise ConfigError(f"judge.url={self._config.url}: {refused}; start the service, or correct judge.*")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all requests; completions that still wait get no verdict."""
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, questions: Sequence[str]) -> Batch:
        """Has the questions answered. It returns at once, with the batch of replies to come."""
        batch = Batch(len(questions))
        self._loop.call_soon_threadsafe(self._begin, list(questions), batch)
        return batch

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of work in the loop's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> str | None:
        """Open a session and ask one question; returns why the service cannot serve, None if it can.

        A service that is slow or overloaded now may still serve.
        """
        import aiohttp

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # Deadlines bound the time of requests, and slots their number.
        unbounded = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(headers=headers, timeout=unbounded, connector=connector)
        try:
            async with asyncio.timeout(min(_PROBE_SECONDS, self._config.deadline)):
                found = await self._attempt(question_of(self._config.prompt, "What is 1 + 1?", "2", "It is 2."))
        except TimeoutError:
            return None
        return None if found.text is not None or (found.may_pass and found.answered) else found.reason

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _begin(self, questions: list[str], batch: Batch) -> None:
        """Answer what is known, and ask the rest. Replies are set in the loop's thread alone."""
        for place, question in enumerate(questions):
            key = _identity(self._config, question)
            if key in self._scores:
                batch.set(place, _reply(self._scores[key], tries=0))
            elif key in self._pending:
                self._pending[key].append((batch, place))
            else:
                self._pending[key] = [(batch, place)]
                task = self._loop.create_task(self._ask(key, question))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _ask(self, key: str, question: str) -> None:
        """Set the reply to a question in all places that wait for it."""
        reply = Reply(None, None, "closed")
        try:
            async with self._slots:
                reply = await self._scored(question)
            if isinstance(reply.score, float):
                self._remember(key, reply.score)
        except Exception as error:  # noqa: BLE001 - whatever is wrong, the places must not wait for ever
            reply = Reply(None, None, f"judge: {self._line_of(error)}")
        finally:
            for batch, place in self._pending.pop(key):
                batch.set(place, reply)

    async def _scored(self, question: str) -> Reply:
        """The reply to a question, after as many tries as it needs and may have."""
        c, ends = self._config, time.monotonic() + self._config.deadline
        found, tries = _Attempt(None, "there was no reply"), 0
        try:
            async with asyncio.timeout(c.deadline):
                for tries in range(1, c.retries + 2):
                    found = await self._attempt(question)
                    if not found.may_pass or tries > c.retries:
                        break
                    wait = min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT) * random.uniform(0.75, 1.25)
                    wait = wait if found.wait is None else found.wait
                    if time.monotonic() + wait >= ends:
                        raise TimeoutError
                    await asyncio.sleep(wait)
        except TimeoutError:
            last = f"after {tries} tries, the last: {found.reason}"
            return Reply(None, None, f"deadline: no score in {c.deadline:g} s (judge.deadline) {last}")
        if found.text is None:
            return Reply(None, None, found.reason)
        score = score_in(found.text, c)
        if score is None:
            return Reply(None, None, f"no score: the judge's reply is {escaped(found.text, 120)!r}")
        return _reply(score, tries, found.text)

    async def _attempt(self, question: str) -> _Attempt:
        """One request."""
        import aiohttp

        assert self._session is not None
        url = f"{(self._config.url or '').rstrip('/')}/chat/completions"
        try:
            async with self._session.post(url, json=body_of(self._config, question)) as response:
                return await self._understood(response)
        except aiohttp.InvalidURL as error:
            return _Attempt(None, f"no URL: {self._line_of(error)}")
        except aiohttp.ClientError as error:
            return _Attempt(None, f"unreachable: {self._line_of(error)}", may_pass=True, answered=False)

    async def _understood(self, response: ClientResponse) -> _Attempt:
        """A response as the judge's words, or as a failure."""
        content = await response.content.read(_LONGEST_REPLY)
        while not response.content.at_eof() and len(content) < _LONGEST_REPLY:
            content += await response.content.read(_LONGEST_REPLY)
        text = content.decode("utf-8", "replace")
        if response.status == 200:
            words = words_in(text)
            shown = escaped(self._without_key(text), 120)
            return _Attempt(words, "" if words is not None else f"malformed: the service's reply is {shown!r}")
        reason = f"HTTP {response.status}: {escaped(self._without_key(' '.join(text.split())), 200)}"
        may_pass = response.status in _MAY_PASS or response.status >= 500
        return _Attempt(None, reason, may_pass, wait=_seconds(response.headers.get("Retry-After")))

    def _remember(self, key: str, score: float) -> None:
        """Keep a score. Where the file cannot be written, that is said once, and scores stay in memory alone."""
        self._scores[key] = score
        if self._memory is None:
            return
        try:
            append_whole(self._memory, f"{json.dumps({'key': key, 'score': score})}\n".encode())
        except StorageError as error:
            self._memory = None
            print(f"judge: {error}; scores are remembered in memory alone", file=sys.stderr)

    def _line_of(self, error: BaseException) -> str:
        """An error in one line, without the key."""
        return escaped(self._without_key(" ".join(f"{type(error).__name__} {error}".split())), 200)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def question_of(template: str, prompt: str, answer: str, completion: str) -> str:
    """judge.prompt with its places filled; what is filled in is not searched for places again."""
    values = {"prompt": prompt, "answer": answer, "completion": completion}
    return _PLACES.sub(lambda place: values[place[1]], template)


def body_of(config: JudgeConfig, question: str) -> dict[str, object]:
    """The JSON of a request."""
    body: dict[str, object] = {
        "model": config.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": config.temperature,
    }
    return body | ({"max_tokens": config.max_tokens} if config.max_tokens else {})


def words_in(text: str) -> str | None:
    """The judge's words in the JSON of a response; None = it is no response of a chat completion."""
    try:
        words = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return words if isinstance(words, str) else None


def score_in(text: str, config: JudgeConfig) -> float | None:
    """The reward that the judge's words give, in [0, 1]; None = they hold no score, or one outside the scale."""
    found = re.findall(config.pattern, text)
    low, high = interval(config.scale, "judge.scale")
    try:
        score = float(found[-1])
    except (IndexError, ValueError):
        return None
    return (score - low) / (high - low) if low <= score <= high else None


def _reply(score: float, tries: int, text: str | None = None) -> Reply:
    """A score, and what is logged with it."""
    metrics = {"judge_tries": [float(tries)]}
    return Reply(
        score, None, None, metrics=metrics, columns={"judge": [None if text is None else escaped(text, _KEPT)]}
    )


def _key(config: JudgeConfig) -> str | None:
    """The service's key; None = it needs none."""
    name = config.api_key_variable
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"judge.api_key_variable={name}: the environment has no such variable; export it, or drop this"
        )
    return key


def _identity(config: JudgeConfig, question: str) -> str:
    """Hash of everything that a score depends on but the service's own chance."""
    words = json.dumps([body_of(config, question), config.pattern, config.scale], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


def _read(path: Path) -> dict[str, float]:
    """The scores of a file, without lines that are damaged or half written; none if it is not there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unread(path, error) from error
    found: dict[str, float] = {}
    for line in data.split(b"\n"):
        try:
            record: Mapping[str, object] = json.loads(line)
            score = record["score"]
            if isinstance(score, float) and 0 <= score <= 1:
                found[str(record["key"])] = score
        except (ValueError, LookupError, TypeError):
            continue
    return found


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header; None = there is none, or it names a date."""
    try:
        return max(float(header or ""), 0.0)
    except ValueError:
        return None
