"""Rewards of completions that are text: requests to the verifiers, and rewards from their replies."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pspo_jax.config.json_fields import mixture
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import TERMS, parse_terms
from pspo_jax.data.conversations import Conversation, Message, content_of, content_parts, read_prompt
from pspo_jax.data.files import value_at
from pspo_jax.data.loading import PROMPT_COLUMNS
from pspo_jax.data.task import ANSWER_COLUMN, CompletionBatch, RewardFn, RewardResult
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.rewards.reward_model import make_scorer
from pspo_jax.rewards.terms import ShapingInputs, shaping_term, user_functions, weighted_sum
from pspo_jax.verifiers.judge import Judge, question_of
from pspo_jax.verifiers.math_answer import final_answer
from pspo_jax.verifiers.workers.pool import Batch, Pool, Reply, Request

PARTIAL_CREDIT = ("python_function", "reasoning_gym")
"""Kinds whose scores between 0 and 1 count in evaluation; for other kinds only a score of 1 counts, as 1."""
NO_OPINION = "the function returned None"
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class _Question(NamedTuple):
    """A request, and the completions that its reply is about."""

    request: Request
    row: int
    """Row of the batch."""
    columns: tuple[int, ...]
    """Places in the row's group."""


def make_pool(config: Config, log: Path | None = None) -> Pool:
    """The pool of verifiers for a config's tasks and rewards; what the workers print goes to `log`."""
    tasks = [part.task for part, _ in mixture(config)] or [config.task]
    # A package that is not installed is reported where the task is made.
    gym = any(t.name == "reasoning_gym" for t in tasks) and find_spec("reasoning_gym") is not None
    judge = None
    if "judge" in parse_terms(config.reward):
        judge = Judge(config.judge, None if log is None else log.with_name("judge.jsonl"))
    return Pool(config.verifier, reward_functions(config), ("reasoning_gym",) if gym else (), log, judge)


def reward_functions(config: Config) -> tuple[str, ...]:
    """The users' functions that the workers import, as `module:function`."""
    tasks = [part.task for part, _ in mixture(config)] or [config.task]
    verifiers = tuple(t.function for t in tasks if t.name == "python_function" and t.function)
    return tuple(dict.fromkeys((*verifiers, *user_functions(config.reward))))


def text_reward(pool: Pool | None, tokenizer: TextTokenizer, config: Config) -> RewardFn:
    """The reward function of text tasks: `accuracy` by each row's verifier, and the terms of config.reward.

    Args:
      pool: verifies; None = the function raises RuntimeError, for plans and exports.
    """
    terms = parse_terms(config.reward)
    scorer = make_scorer(config) if pool is not None and "reward_model" in terms else None
    prefix = tokenizer.answer_beginning(config.prompt)

    def reward_fn(batch: CompletionBatch) -> Callable[[], RewardResult]:
        """Starts verification of a batch."""
        if pool is None:
            raise RuntimeError("this task was made without verifiers")
        weights = terms if batch.wants_reward else {"accuracy": 1.0}
        kinds = [_at(batch.prompts.kinds, int(row)) for row in batch.rows]
        texts = [
            [prefix + tokenizer.completion_text(batch.tokens[i, j, :n].tolist()) for j, n in enumerate(row)]
            for i, row in enumerate(batch.lengths)
        ]
        questions = _verdict_questions(batch, kinds, texts, config, pool)
        verdicts = pool.submit([question.request for question in questions])
        extra = {}
        if "judge" in weights:
            extra["judge"] = _judged(batch, texts, pool, config)
        for name in weights:
            if name not in TERMS:
                found = _function_questions(name, batch, texts, pool, config)
                extra[name] = found, pool.submit([question.request for question in found])

        scored = None
        if scorer is not None and "reward_model" in weights:
            prompts = [_turns(batch, i, config) for i in range(len(texts)) for _ in texts[i]]
            scored = scorer(prompts, [text for row in texts for text in row])

        def result() -> RewardResult:
            """Waits for the rewards."""
            more = {} if scored is None else {"reward_model": _of_model(scored().reshape(batch.lengths.shape), config)}
            return _result(batch, kinds, texts, questions, verdicts, extra, weights, config, more)

        return result

    return reward_fn


def _at(column: Sequence[str] | None, row: int) -> str:
    """The value of an optional column in a row; "" if there is no such column."""
    return "" if column is None else column[row]


def _verdict_questions(
    batch: CompletionBatch, kinds: list[str], texts: list[list[str]], config: Config, pool: Pool
) -> list[_Question]:
    """Requests for a verdict on each completion, without the completions that are wrong for certain."""
    out: list[_Question] = []
    for i, row in enumerate(batch.rows):
        kind, gold = kinds[i], batch.prompts.answers[int(row)]
        extra = json.loads(_at(batch.prompts.extras, int(row)))
        if kind == "python_function":
            out += _row_questions(extra["function"], i, batch, texts[i], pool, config)
            continue
        for j, text in enumerate(texts[i]):
            if config.reward.require_end and not batch.ended[i, j]:
                continue
            if (request := _request(kind, gold, extra, text)) is not None:
                out.append(_Question(request, i, (j,)))
    return out


def _request(kind: str, gold: str, extra: dict[str, object], text: str) -> Request | None:
    """The request for the verdict on one completion; None if the completion is wrong without asking."""
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
        case "exact":
            return Request("exact", {"gold": gold, "completion": text})
        case "text_suite":
            if not _is_one_answer(text):
                return None
            arguments = {name: value for name, value in extra.items() if name != "verifier"}
            return _request(str(extra["verifier"]), gold, arguments, text)
    raise ValueError(f"no verifier for {kind}")


def _is_one_answer(text: str) -> bool:
    """Whether a completion gives one candidate: it is one line without `;`, and after its last `=` is one number at
    most."""
    lines = text.rpartition("</think>")[2].strip().splitlines()
    return len(lines) == 1 and ";" not in lines[0] and len(_NUMBER.findall(lines[0].rpartition("=")[2])) <= 1


def _judged(
    batch: CompletionBatch, texts: list[list[str]], pool: Pool, config: Config
) -> tuple[list[_Question], Batch]:
    """A question to the judge about each completion, and the replies to come."""
    assert pool.judge is not None
    places, questions = [], []
    for i, row in enumerate(batch.rows):
        prompt, answer = _at(batch.prompts.texts, int(row)), batch.prompts.answers[int(row)]
        for j, text in enumerate(texts[i]):
            question = question_of(config.judge.prompt, prompt, answer, text)
            places.append(_Question(Request("judge", {"question": question}), i, (j,)))
            questions.append(question)
    return places, pool.judge.submit(questions)


def _function_questions(
    name: str, batch: CompletionBatch, texts: list[list[str]], pool: Pool, config: Config
) -> list[_Question]:
    """Requests for the scores of all completions by a user's function."""
    rows = range(len(batch.rows))
    return [question for i in rows for question in _row_questions(name, i, batch, texts[i], pool, config)]


def _row_questions(
    name: str, i: int, batch: CompletionBatch, texts: list[str], pool: Pool, config: Config
) -> list[_Question]:
    """Requests for the scores of one group by a user's function.

    There is one request for each completion, so that each has its own deadline; or one for the whole group, if the
    function takes lists.
    """
    row, prompts = int(batch.rows[i]), batch.prompts
    columns = prompts.columns(row) if prompts.columns is not None else {}
    extra = json.loads(_at(prompts.extras, row) or "{}")
    row_arguments: dict[str, object] = {
        "function": name,
        "prompt": _at(prompts.texts, row),
        "messages": _conversation(columns, config.task.prompt_column),
        # The row's own value, unless the config asks for another form of it.
        "answer": value_at(columns, extra[ANSWER_COLUMN]) if ANSWER_COLUMN in extra else prompts.answers[row],
        "step": batch.step,
        "steps": config.run.steps,
        "columns": columns,
    }
    parts = [tuple(range(len(texts)))] if name in pool.group_functions else [(j,) for j in range(len(texts))]
    questions = []
    for part in parts:
        of_part: dict[str, object] = {
            "completions": [texts[j] for j in part],
            "token_ids": [batch.tokens[i, j, : batch.lengths[i, j]].tolist() for j in part],
        }
        questions.append(_Question(Request("function", row_arguments | of_part), i, part))
    return questions


def _turns(batch: CompletionBatch, i: int, config: Config) -> Conversation:
    """The prompt of row i of a batch as a conversation."""
    row, prompts = int(batch.rows[i]), batch.prompts
    columns = prompts.columns(row) if prompts.columns is not None else {}
    return _conversation(columns, config.task.prompt_column) or [{"role": "user", "content": _at(prompts.texts, row)}]


def _of_model(value: Float[np.ndarray, "B G"], config: Config) -> _Term:
    """The scores of the reward model as a term; NaN = the text is too long for it."""
    failed = np.isnan(value)
    reason = f"too long: more than {config.reward.model_tokens} tokens (reward.model_tokens)"
    nothing: list[list[str | None]] = [[None] * value.shape[1] for _ in range(value.shape[0])]
    reasons = Counter({reason: int(failed.sum())}) if failed.any() else Counter()
    return _Term(value, failed, nothing, reasons, [], {}, {})


def _conversation(columns: dict[str, object], wanted: str | None) -> Conversation | None:
    """The messages of a row whose prompt is a conversation; None if it is plain text."""
    for name in [wanted] if wanted else PROMPT_COLUMNS:
        value = value_at(columns, name)
        if value is not None:
            found = read_prompt(value)
            if isinstance(found, str):  # plain text, or a single turn
                return None if isinstance(value, str | int | float) else [_turn({"role": "user", "content": found})]
            return [_turn(message) for message in found]
    return None


def _turn(message: Message) -> Message:
    """A turn as a function gets it: its content is a list of parts if it has images."""
    return {**message, "content": content_parts(content_of(message))}


def _result(
    batch: CompletionBatch,
    kinds: list[str],
    texts: list[list[str]],
    questions: list[_Question],
    replies: Batch,
    extra: dict[str, tuple[list[_Question], Batch]],
    weights: dict[str, float],
    config: Config,
    more: dict[str, _Term],
) -> RewardResult:
    """The rewards of a batch from the replies; it waits for these.

    Args:
      questions, replies: requests for verdicts, and their replies.
      extra: for the judge and each user's function, its requests and their replies.
      weights: weight of each term.
      more: terms whose values are known.
    """
    shape = batch.lengths.shape
    values = {"accuracy": _fill(shape, questions, replies.result(), unasked=0.0)}
    values |= {name: _fill(shape, found, answered.result()) for name, (found, answered) in extra.items()} | more
    value = values["accuracy"].value
    graded = np.array([kind in PARTIAL_CREDIT for kind in kinds], bool)[:, None]  # a process may have no row
    verdicts = np.where(graded | np.isnan(value), np.clip(value, 0, 1), value >= 1).astype(np.float32)
    terms: dict[str, Float[np.ndarray, "B G"]] = {}
    inputs = ShapingInputs(verdicts, batch.lengths, texts, config.rollout.max_new_tokens)
    for name in weights:
        terms[name] = values[name].value if name in values else shaping_term(name, config.reward, inputs)
    failed = {name: one.failed for name, one in values.items()}
    reward = weighted_sum(terms, weights, verdicts, failed)
    # The verdict is reported whether or not it is a term of the reward.
    return RewardResult(
        reward,
        {"accuracy": value} | terms,
        verdicts,
        values["accuracy"].answers,
        values["accuracy"].reasons,
        tuple(dict.fromkeys(error for one in values.values() for error in one.errors)),
        failed,
        {name: one.reasons for name, one in values.items()},
        _merged([one.metrics for one in values.values()]),
        {name: rows for one in values.values() for name, rows in one.columns.items()},
    )


class _Term(NamedTuple):
    """The values of one term."""

    value: Float[np.ndarray, "B G"]
    """NaN = a failure, or no opinion."""
    failed: Bool[np.ndarray, "B G"]
    """Where the verifier or function gave no verdict because of an error, its deadline or its death."""
    answers: list[list[str | None]]
    """The answers found; None = none."""
    reasons: Counter[str]
    """Why values are missing, and how many."""
    errors: list[str]
    """Tracebacks."""
    metrics: dict[str, list[float]]
    """Values that a function gave to `log_metric`."""
    columns: dict[str, list[list[object]]]
    """Values that a function gave to `log_extra`: one for each completion, or None."""


def _fill(shape: tuple[int, ...], questions: list[_Question], replies: list[Reply], unasked: float = np.nan) -> _Term:
    """The values of a term from its replies; `unasked` where nothing was asked."""
    value, failed = np.full(shape, unasked, np.float32), np.zeros(shape, bool)
    answers: list[list[str | None]] = [[None] * shape[1] for _ in range(shape[0])]
    reasons: Counter[str] = Counter()
    columns: dict[str, list[list[object]]] = {}
    for question, reply in zip(questions, replies, strict=True):
        n = len(question.columns)
        scores = reply.score if isinstance(reply.score, list) else [reply.score] * n
        whole = reply.reason if not isinstance(reply.score, list) else None
        for j, score, why in zip(question.columns, scores, reply.failed or [whole] * n, strict=True):
            value[question.row, j] = np.nan if score is None else score
            failed[question.row, j] = score is None and why is not None
            answers[question.row][j] = reply.answer
            if score is None:
                reasons[why or NO_OPINION] += 1
        for name, logged in (reply.columns or {}).items():
            rows = columns.setdefault(name, [[None] * shape[1] for _ in range(shape[0])])
            for j, item in zip(question.columns, logged, strict=True):
                rows[question.row][j] = item
    return _Term(
        value,
        failed,
        answers,
        reasons,
        [reply.error for reply in replies if reply.error],
        _merged([reply.metrics for reply in replies if reply.metrics]),
        columns,
    )


def _merged(found: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Logged values of several replies, by name."""
    out: dict[str, list[float]] = {}
    for metrics in found:
        for name, values in metrics.items():
            out.setdefault(name, []).extend(values)
    return out
