"""From a batch of completions to requests for the verifiers, and from their replies to rewards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pspo_jax.config import Config
from pspo_jax.mixture import mixture
from pspo_jax.rewards.math import final_answer
from pspo_jax.rewards.pool import Batch, Pool, Reply, Request
from pspo_jax.rewards.terms import TERMS, Shape, functions, parse_terms, shaped, weighted_sum
from pspo_jax.tasks.base import Completions, Judge, Scores
from pspo_jax.tasks.tokenizer import TextTokenizer

GRADED = ("python_function", "reasoning_gym")
"""Kinds whose partial scores count in evaluation as they are; elsewhere only 1 is right."""


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
    return Pool(config.verifier, judge_functions(config), ("reasoning_gym",) if gym else (), log)


def judge_functions(config: Config) -> tuple[str, ...]:
    """User functions that the workers import."""
    tasks = [part.task for part, _ in mixture(config)] or [config.task]
    verifiers = tuple(t.function for t in tasks if t.name == "python_function" and t.function)
    return tuple(dict.fromkeys((*verifiers, *functions(config.reward))))


def text_judge(pool: Pool | None, tokenizer: TextTokenizer, config: Config) -> Judge:
    """Judges completions of text tasks: `accuracy` by each row's verifier, then the terms of config.reward."""
    weights = parse_terms(config.reward)
    prefix = tokenizer.begun(config.prompt)

    def judge(batch: Completions) -> Callable[[], Scores]:
        if pool is None:
            raise RuntimeError("this task was made without verifiers")
        kinds = [_of(batch.prompts.kinds, int(row)) for row in batch.rows]
        texts = [
            [prefix + tokenizer.answer(batch.tokens[i, j, :n].tolist()) for j, n in enumerate(row)]
            for i, row in enumerate(batch.lengths)
        ]
        asks = _verdict_asks(batch, kinds, texts, config, pool)
        verdicts = pool.submit([ask.request for ask in asks])
        extra = {
            name: (found := _function_asks(name, batch, texts, pool), pool.submit([a.request for a in found]))
            for name in weights
            if name not in TERMS
        }

        def result() -> Scores:
            return _scores(batch, kinds, texts, asks, verdicts, extra, weights, config)

        return result

    return judge


def _of(column: Any, row: int) -> Any:
    return None if column is None else column[row]


def _verdict_asks(
    batch: Completions, kinds: list[str], texts: list[list[str]], config: Config, pool: Pool
) -> list[_Ask]:
    """Requests for the completions that are not wrong for certain."""
    out: list[_Ask] = []
    for i, row in enumerate(batch.rows):
        kind, gold = kinds[i], batch.prompts.answers[int(row)]
        extra = json.loads(_of(batch.prompts.extras, int(row)))
        if kind == "python_function":
            out += _function_row(extra["function"], i, batch, texts[i], pool)
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


def _function_asks(name: str, batch: Completions, texts: list[list[str]], pool: Pool) -> list[_Ask]:
    return [ask for i in range(len(batch.rows)) for ask in _function_row(name, i, batch, texts[i], pool)]


def _function_row(name: str, i: int, batch: Completions, texts: list[str], pool: Pool) -> list[_Ask]:
    """One request a completion, so that each has its own deadline; one a group if the function takes lists."""
    row, prompts = int(batch.rows[i]), batch.prompts
    prompt = _of(prompts.texts, row)
    columns = prompts.columns(row) if prompts.columns else {}
    parts = [tuple(range(len(texts)))] if name in pool.grouped else [(j,) for j in range(len(texts))]
    return [
        _Ask(
            Request(
                "function",
                {
                    "function": name,
                    "prompt": prompt,
                    "completions": [texts[j] for j in part],
                    "token_ids": [batch.tokens[i, j, : batch.lengths[i, j]].tolist() for j in part],
                    "answer": prompts.answers[row],
                    "step": batch.step,
                    "columns": columns,
                },
            ),
            i,
            part,
        )
        for part in parts
    ]


def _scores(
    batch: Completions,
    kinds: list[str],
    texts: list[list[str]],
    asks: list[_Ask],
    verdicts: Batch,
    extra: dict[str, tuple[list[_Ask], Batch]],
    weights: dict[str, float],
    config: Config,
) -> Scores:
    shape = batch.lengths.shape
    reasons: Counter[str] = Counter()
    errors: dict[str, None] = {}
    answers: list[list[str | None]] = [[None] * shape[1] for _ in range(shape[0])]
    value = np.zeros(shape, np.float32)
    _fill(value, asks, verdicts.result(), reasons, errors, answers)
    graded = np.array([[kind in GRADED] for kind in kinds])
    right = np.where(graded | np.isnan(value), np.clip(value, 0, 1), value >= 1).astype(np.float32)
    terms: dict[str, Float[np.ndarray, "B G"]] = {}
    what = Shape(right, batch.lengths, texts, config.rollout.max_new_tokens)
    for name in weights:
        if name == "accuracy":
            terms[name] = value
        elif name in TERMS:
            terms[name] = shaped(name, config.reward, what)
        else:
            found, replies = extra[name]
            terms[name] = np.full(shape, np.nan, np.float32)
            _fill(terms[name], found, replies.result(), Counter(), errors, None)
    reward = weighted_sum(terms, weights, right)
    # The verdict is reported whether or not it is paid for.
    return Scores(reward, {"accuracy": value} | terms, right, answers, reasons, tuple(errors))


def _fill(
    value: Float[np.ndarray, "B G"],
    asks: list[_Ask],
    replies: list[Reply],
    reasons: Counter[str],
    errors: dict[str, None],
    answers: list[list[str | None]] | None,
) -> None:
    """Write replies where they belong."""
    for ask, reply in zip(asks, replies, strict=True):
        scores = reply.score if isinstance(reply.score, list) else [reply.score] * len(ask.columns)
        for j, score in zip(ask.columns, scores, strict=True):
            value[ask.row, j] = np.nan if score is None else score
            if score is None:
                reasons[reply.reason or "the function returned None"] += 1
            if answers is not None:
                answers[ask.row][j] = reply.answer
        if reply.error:
            errors[reply.error] = None
