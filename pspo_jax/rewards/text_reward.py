"""From a batch of completions to requests for the verifiers, and from their replies to rewards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pspo_jax.config.json_fields import mixture
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import TERMS, parse_terms
from pspo_jax.data.conversations import read_prompt
from pspo_jax.data.files import value_at
from pspo_jax.data.loading import PROMPT_COLUMNS
from pspo_jax.data.task import ANSWER_COLUMN, CompletionBatch, RewardFn, RewardResult
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.rewards.terms import Shape, shaped, user_functions, weighted_sum
from pspo_jax.verifiers.math_answer import final_answer
from pspo_jax.verifiers.workers.pool import Batch, Pool, Reply, Request

GRADED = ("python_function", "reasoning_gym")
"""Kinds whose partial scores count in evaluation as they are; elsewhere only 1 is right."""


NO_OPINION = "the function returned None"


class _Ask(NamedTuple):
    """A request, and which completions of a prompt its reply is about."""

    request: Request
    row: int
    columns: tuple[int, ...]


def make_pool(config: Config, log: Path | None = None) -> Pool:
    """The workers that a config's tasks and rewards need; what these print goes to `log`."""
    tasks = [part.task for part, _ in mixture(config)] or [config.task]
    # A package that is not installed is reported where the task is made.
    gym = any(t.name == "reasoning_gym" for t in tasks) and find_spec("reasoning_gym") is not None
    return Pool(config.verifier, reward_functions(config), ("reasoning_gym",) if gym else (), log)


def reward_functions(config: Config) -> tuple[str, ...]:
    """User functions that the workers import."""
    tasks = [part.task for part, _ in mixture(config)] or [config.task]
    verifiers = tuple(t.function for t in tasks if t.name == "python_function" and t.function)
    return tuple(dict.fromkeys((*verifiers, *user_functions(config.reward))))


def text_reward(pool: Pool | None, tokenizer: TextTokenizer, config: Config) -> RewardFn:
    """Judges completions of text tasks: `accuracy` by each row's verifier, then the terms of config.reward."""
    terms = parse_terms(config.reward)
    prefix = tokenizer.begun(config.prompt)

    def judge(batch: CompletionBatch) -> Callable[[], RewardResult]:
        if pool is None:
            raise RuntimeError("this task was made without verifiers")
        weights = terms if batch.paid else {"accuracy": 1.0}
        kinds = [_of(batch.prompts.kinds, int(row)) for row in batch.rows]
        texts = [
            [prefix + tokenizer.answer(batch.tokens[i, j, :n].tolist()) for j, n in enumerate(row)]
            for i, row in enumerate(batch.lengths)
        ]
        asks = _verdict_asks(batch, kinds, texts, config, pool)
        verified = pool.submit([ask.request for ask in asks])
        extra = {
            name: (found := _function_asks(name, batch, texts, pool, config), pool.submit([a.request for a in found]))
            for name in weights
            if name not in TERMS
        }

        def result() -> RewardResult:
            return _scores(batch, kinds, texts, asks, verified, extra, weights, config)

        return result

    return judge


def _of(column: Any, row: int) -> Any:
    return None if column is None else column[row]


def _verdict_asks(
    batch: CompletionBatch, kinds: list[str], texts: list[list[str]], config: Config, pool: Pool
) -> list[_Ask]:
    """Requests for the completions that are not wrong for certain."""
    out: list[_Ask] = []
    for i, row in enumerate(batch.rows):
        kind, gold = kinds[i], batch.prompts.answers[int(row)]
        extra = json.loads(_of(batch.prompts.extras, int(row)))
        if kind == "python_function":
            out += _function_row(extra["function"], i, batch, texts[i], pool, config)
            continue
        for j, text in enumerate(texts[i]):
            if config.reward.require_end and not batch.ended[i, j]:
                continue
            if (request := _request(kind, gold, extra, text)) is not None:
                out.append(_Ask(request, i, (j,)))
    return out


def _request(kind: str, gold: str, extra: dict[str, Any], text: str) -> Request | None:
    """What to ask a worker; None = wrong without asking."""
    match kind:
        case "math" | "gsm8k":
            answer = final_answer(text)
            key = (kind, gold, answer)
            return None if answer is None else Request("math", {"gold": gold, "answer": answer}, key)
        case "countdown":
            return Request("countdown", {**extra, "completion": text, "tagged": True})
        case "multiple_choice":
            return Request("choice", {"gold": gold, "completion": text, **extra})
        case "reasoning_gym":
            return Request("reasoning_gym", {**extra, "completion": text})
    raise ValueError(f"no verifier for {kind}")


def _function_asks(name: str, batch: CompletionBatch, texts: list[list[str]], pool: Pool, config: Config) -> list[_Ask]:
    return [ask for i in range(len(batch.rows)) for ask in _function_row(name, i, batch, texts[i], pool, config)]


def _function_row(
    name: str, i: int, batch: CompletionBatch, texts: list[str], pool: Pool, config: Config
) -> list[_Ask]:
    """One request a completion, so that each has its own deadline; one a group if the function takes lists."""
    row, prompts = int(batch.rows[i]), batch.prompts
    columns = prompts.columns(row) if prompts.columns else {}
    extra = json.loads(_of(prompts.extras, row) or "{}")
    row_arguments = {
        "function": name,
        "prompt": _of(prompts.texts, row),
        "messages": _conversation(columns, config.task.prompt_column),
        # The row's own value, where the config does not ask for another form of it.
        "answer": value_at(columns, extra[ANSWER_COLUMN]) if ANSWER_COLUMN in extra else prompts.answers[row],
        "step": batch.step,
        "steps": config.run.steps,
        "columns": columns,
    }
    parts = [tuple(range(len(texts)))] if name in pool.grouped else [(j,) for j in range(len(texts))]
    asks = []
    for part in parts:
        own = {
            "completions": [texts[j] for j in part],
            "token_ids": [batch.tokens[i, j, : batch.lengths[i, j]].tolist() for j in part],
        }
        asks.append(_Ask(Request("function", row_arguments | own), i, part))
    return asks


def _conversation(columns: dict[str, Any], wanted: str | None) -> list[dict[str, Any]] | None:
    """The messages of a row whose prompt is a conversation; None = it is plain text."""
    for name in [wanted] if wanted else PROMPT_COLUMNS:
        value = value_at(columns, name)
        if value is not None:
            found = read_prompt(value)
            if isinstance(found, str):  # plain text, or a single turn
                return None if isinstance(value, str | int | float) else [{"role": "user", "content": found}]
            return [dict(message) for message in found]
    return None


def _scores(
    batch: CompletionBatch,
    kinds: list[str],
    texts: list[list[str]],
    asks: list[_Ask],
    verified: Batch,
    extra: dict[str, tuple[list[_Ask], Batch]],
    weights: dict[str, float],
    config: Config,
) -> RewardResult:
    shape = batch.lengths.shape
    filled = {"accuracy": _filled(shape, asks, verified.result(), unasked=0.0)}
    filled |= {name: _filled(shape, found, replies.result()) for name, (found, replies) in extra.items()}
    value = filled["accuracy"].value
    graded = np.array([[kind in GRADED] for kind in kinds])
    verdicts = np.where(graded | np.isnan(value), np.clip(value, 0, 1), value >= 1).astype(np.float32)
    terms: dict[str, Float[np.ndarray, "B G"]] = {}
    what = Shape(verdicts, batch.lengths, texts, config.rollout.max_new_tokens)
    for name in weights:
        terms[name] = filled[name].value if name in filled else shaped(name, config.reward, what)
    failed = {name: one.failed for name, one in filled.items()}
    reward = weighted_sum(terms, weights, verdicts, failed)
    # The verdict is reported whether or not it is paid for.
    return RewardResult(
        reward,
        {"accuracy": value} | terms,
        verdicts,
        filled["accuracy"].answers,
        filled["accuracy"].reasons,
        tuple(dict.fromkeys(error for one in filled.values() for error in one.errors)),
        failed,
        {name: one.reasons for name, one in filled.items()},
        _together([one.metrics for one in filled.values()]),
        {name: rows for one in filled.values() for name, rows in one.columns.items()},
    )


class _Filled(NamedTuple):
    """Replies about one term, where they belong."""

    value: Float[np.ndarray, "B G"]
    """NaN = a failure, or no opinion."""
    failed: Bool[np.ndarray, "B G"]
    """Where the verifier or function gave no verdict by an error, its deadline or its death."""
    answers: list[list[str | None]]
    reasons: Counter[str]
    """Why values are missing."""
    errors: list[str]
    metrics: dict[str, list[float]]
    columns: dict[str, list[list[Any]]]
    """What a function logged with each completion."""


def _filled(shape: tuple[int, ...], asks: list[_Ask], replies: list[Reply], unasked: float = np.nan) -> _Filled:
    """Values of a term; `unasked` where nothing was asked."""
    value, failed = np.full(shape, unasked, np.float32), np.zeros(shape, bool)
    answers: list[list[str | None]] = [[None] * shape[1] for _ in range(shape[0])]
    reasons: Counter[str] = Counter()
    columns: dict[str, list[list[Any]]] = {}
    for ask, reply in zip(asks, replies, strict=True):
        n = len(ask.columns)
        scores = reply.score if isinstance(reply.score, list) else [reply.score] * n
        whole = reply.reason if not isinstance(reply.score, list) else None
        for j, score, why in zip(ask.columns, scores, reply.failed or [whole] * n, strict=True):
            value[ask.row, j] = np.nan if score is None else score
            failed[ask.row, j] = score is None and why is not None
            answers[ask.row][j] = reply.answer
            if score is None:
                reasons[why or NO_OPINION] += 1
        for name, logged in (reply.columns or {}).items():
            rows = columns.setdefault(name, [[None] * shape[1] for _ in range(shape[0])])
            for j, item in zip(ask.columns, logged, strict=True):
                rows[ask.row][j] = item
    return _Filled(
        value,
        failed,
        answers,
        reasons,
        [reply.error for reply in replies if reply.error],
        _together([reply.metrics for reply in replies if reply.metrics]),
        columns,
    )


def _together(found: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for metrics in found:
        for name, values in metrics.items():
            out.setdefault(name, []).extend(values)
    return out
