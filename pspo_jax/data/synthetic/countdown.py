"""Countdown: an expression that reaches a target and uses each of three or four numbers once.

For a language model the question is a text, and the answer stands in `<answer>` tags. Without a checkpoint the task has
one token per character, like the embedded default: a prompt is `3,25,7=46:`, a response `3*7+25$`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, TaskConfig
from pspo_jax.config.text_fields import Stratum, parse_strata
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.files import Record
from pspo_jax.data.loading import Question, Source, quiet_datasets
from pspo_jax.data.strata import chosen_rows, counts_of, labels_of, stratum_of, written, wrong_label_draws, wrong_rows
from pspo_jax.data.task import (
    CompletionBatch,
    Demonstrations,
    PromptDataset,
    RewardFn,
    RewardResult,
    Task,
    digest,
    pad_rows,
)
from pspo_jax.verifiers import countdown

CHARACTERS = "0123456789+-*/()=,:$_"
VOCAB = 24

MAX_VALUE = 9999
"""Bound on every value on the way to a target."""
MAX_SIZE = 8
"""The largest count of numbers in a problem, whose solution stays well under the verifier's MAX_CHARS."""
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_ATOM = 3
_BLOCK = 1024
_TRIES_PER_SIZE = 1000
"""Tries in a row without a new problem after which the next size is tried."""
_MOST_TRIES = 50_000
"""Tries in a row without a new problem after which no more are expected."""
_MOST_EXAMPLES = 20_000
"""The largest number of different demonstrations; more would take too long to generate."""


class Problem(NamedTuple):
    """A countdown problem."""

    numbers: tuple[int, ...]
    """Their order says nothing about the solution."""
    target: int
    solution: str
    """One of possibly many expressions that solve it."""


class _Node(NamedTuple):
    """An expression."""

    value: int
    text: str
    precedence: int
    """How tightly its outermost operator binds."""
    peak: int
    """The largest value of its parts, in any order of evaluation."""


def generate(
    seed: int,
    count: int,
    sizes: Sequence[int] = (3, 4),
    low: int = 1,
    high: int = 99,
    max_target: int = 99,
    enough: bool = True,
) -> list[Problem]:
    """`count` problems, no two with the same numbers and target; those of a smaller count come first.

    Numbers are drawn from low..high; how many, `sizes` says in turn. Every problem is solvable, because its target is
    the value of a random expression tree over its numbers, in which all values are whole numbers in 1..MAX_VALUE. A
    target is in 1..max_target and is none of the numbers.

    Args:
      enough: whether fewer than `count` problems are an error; if not, as many as are found are returned.
    Raises:
      ValueError: an argument is out of its range, or there are fewer than `count` problems.
    """
    _check(count, sizes, low, high, max_target)
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    misses = 0
    draws = _draws(seed, 4 * max(sizes))
    while len(problems) < count:
        if misses == _MOST_TRIES and not enough:
            break
        if misses == _MOST_TRIES:
            raise ValueError(
                f"count={count}: only {len(problems)} distinct problems found with sizes={tuple(sizes)}, low={low}, "
                f"high={high}, max_target={max_target}; lower count, raise max_target, or widen low..high"
            )
        row = next(draws)
        # The sizes take turns: by chance alone, larger ones would be rarer, as they fail more often.
        size = sizes[(len(problems) + misses // _TRIES_PER_SIZE) % len(sizes)]
        numbers = tuple(low + int(u * (high - low + 1)) for u in row[:size])
        # The tree has another order than the prompt, which would otherwise reveal the solution's.
        order = sorted(range(size), key=row[size : 2 * size].__getitem__)
        root = _tree([numbers[i] for i in order], iter(row[2 * size :]))
        misses += 1
        if root is None or root.value > max_target or root.value in numbers:
            continue
        key = tuple(sorted(numbers)), root.value
        if key not in problems:
            problems[key] = Problem(numbers, root.value, root.text)
            misses = 0
    return list(problems.values())


def _check(count: int, sizes: Sequence[int], low: int, high: int, max_target: int) -> None:
    if count < 0:
        raise ValueError(f"count={count}: must be 0 or more")
    if not sizes or min(sizes) < 2 or max(sizes) > MAX_SIZE:
        raise ValueError(f"sizes={tuple(sizes)}: a problem has 2..{MAX_SIZE} numbers; change sizes")
    if low < 1:
        raise ValueError(f"low={low}: numbers must be positive; raise low to 1")
    if not low <= high <= MAX_VALUE:
        raise ValueError(f"high={high}: must be in low={low}..{MAX_VALUE}")
    if max_target < 1:
        raise ValueError(f"max_target={max_target}: targets are positive; raise max_target")


def _draws(seed: int, width: int) -> Iterator[list[float]]:
    """Rows of uniform numbers in [0, 1), drawn in blocks because single draws would take most of the time."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.random((_BLOCK, width)).tolist()


def _tree(numbers: list[int], uniforms: Iterator[float]) -> _Node | None:
    """A random expression with these numbers from left to right; None if every operator leaves 1..MAX_VALUE."""
    if len(numbers) == 1:
        return _Node(numbers[0], str(numbers[0]), _ATOM, numbers[0])
    cut = 1 + int(next(uniforms) * (len(numbers) - 1))
    left, right = _tree(numbers[:cut], uniforms), _tree(numbers[cut:], uniforms)
    if left is None or right is None:
        return None
    choices = [node for op in "+-*/" if (node := _join(left, op, right)) is not None]
    return choices[int(next(uniforms) * len(choices))] if choices else None


def _join(left: _Node, op: str, right: _Node) -> _Node | None:
    """`left op right` with the parentheses that it needs; None if a value in it is not whole or not in 1..MAX_VALUE."""
    a, b = left.value, right.value
    if (op == "-" and a <= b) or (op == "/" and a % b):
        return None
    rank = _PRECEDENCE[op]
    before = left.text if left.precedence >= rank else f"({left.text})"
    # a+(b-c) and a*(b/c) need no parentheses, but read without them a meets b first.
    regrouped = right.precedence == rank and op in "+*"
    after = right.text if right.precedence > rank or regrouped else f"({right.text})"
    last = right.peak if regrouped else b
    value, reached = {"+": (a + b, a + last), "-": (a - b, 0), "*": (a * b, a * last), "/": (a // b, 0)}[op]
    peak = max(left.peak, right.peak, reached)
    return _Node(value, f"{before}{op}{after}", rank, peak) if peak <= MAX_VALUE else None


def question(problem_numbers: Sequence[int], target: int) -> str:
    """The question of a problem. Its example has a target beyond the default `max_target`, so it is no problem's."""
    given = ", ".join(map(str, problem_numbers))
    return (
        f"You are given the numbers {given}. Write an arithmetic expression that equals {target}. It must use each of "
        "the given numbers exactly once and no other number; the only symbols allowed are +, -, *, / and "
        "parentheses.\n"
        "Put your reasoning in <think> </think> and then only the final expression in <answer> </answer>. For "
        "example, with the numbers 2, 50, 7 and the target 114:\n"
        "<think> 50 + 7 is 57, and twice 57 is 114. </think>\n"
        "<answer>(50 + 7) * 2</answer>"
    )


def source(config: Config, seed: int, count: int, strata: Sequence[Stratum] = ()) -> Source:
    """`count` problems as questions for a language model; with strata, further ones follow (see `Generator`)."""
    problems = _problems(config.task, seed, count)
    problems += _further(config.task, strata, seed, count - config.task.heldout_prompts, problems)
    columns = {"numbers": [list(p.numbers) for p in problems], "target": [p.target for p in problems]}
    if strata:
        columns["difficulty"] = [len(p.numbers) for p in problems]
    records = quiet_datasets().Dataset.from_dict(columns)

    def convert(record: Record, exact: Record | None = None) -> Question:
        numbers, target = cast(list[int], record["numbers"]), cast(int, record["target"])
        return Question(question(numbers, target), str(target), {"numbers": numbers, "target": target})

    return Source("countdown", "countdown", records, convert, "1")


def _problems(t: TaskConfig, seed: int, count: int) -> list[Problem]:
    """The problems of a config."""
    sizes = [int(n) for n in t.numbers.split(",")]
    try:
        return generate(seed, count, sizes, max_target=t.max_target)
    except ValueError as error:
        raise ConfigError(f"task.train_prompts={t.train_prompts}: {error}") from error


def _further(
    t: TaskConfig, strata: Sequence[Stratum], seed: int, total: int, known: Sequence[Problem]
) -> list[Problem]:
    """Problems that are not in `known`: for each stratum, its share of `total`, or all that are found.

    Raises:
      ConfigError: a stratum holds none of the counts in task.numbers.
    """
    out: list[Problem] = []
    taken = {_key(p) for p in known}
    for stratum, wanted in zip(strata, counts_of(total, strata) if strata else (), strict=True):
        sizes = [n for n in map(int, t.numbers.split(",")) if stratum.low <= n <= stratum.high]
        if not sizes:
            raise ConfigError(
                f"task.strata={written(strata)!r}: no problem of task.numbers={t.numbers} has difficulty "
                f"{stratum.name}, which is its count of numbers; change one of them"
            )
        found = generate(seed, wanted + len(known), sizes, max_target=t.max_target, enough=False)
        out += [p for p in found if _key(p) not in taken][:wanted]
    return out


def countdown_task(config: TaskConfig, prompt_bucket: int, max_new_tokens: int) -> Task:
    """The task with one token per character; prompts are padded to a multiple of `prompt_bucket`.

    Demonstrations are expressions of the right numbers: the solution in a third of them, else a random one, so that the
    cold start learns the form and only part of the skill.
    """
    tokenizer = CharTokenizer(CHARACTERS, VOCAB)
    problems = _problems(config, config.seed, config.train_prompts + config.heldout_prompts)
    heldout, train = problems[: config.heldout_prompts], problems[config.heldout_prompts :]
    strata = parse_strata(config.strata)
    if strata:
        train += _further(config, strata, config.seed, config.train_prompts, problems)
        difficulty = np.array([len(p.numbers) for p in train])
        train = [train[i] for i in chosen_rows(difficulty, strata, config.train_prompts)]
    longest = max(len(write_prompt(p)) for p in [*problems, *train])
    width = -(-longest // prompt_bucket) * prompt_bucket
    banned = {(tuple(sorted(p.numbers)), p.target) for p in heldout}

    def demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
        """Fresh problems; those held out are left out."""
        rng = np.random.default_rng([seed, 4])
        made = _examples(config, rng, count, banned)
        texts = [p.solution if rng.random() < 1 / 3 else _guess(p, rng) for p in made]
        rows = [tokenizer.encode(text + "$")[:max_new_tokens] for text in texts]
        prompts = pad_rows([tokenizer.encode(write_prompt(p)) for p in made], width, tokenizer.pad_token_id)
        yield Demonstrations(*prompts, *pad_rows(rows, max_new_tokens, tokenizer.pad_token_id))

    return Task(
        name="countdown",
        tokenizer=tokenizer,
        vocab_size=VOCAB,
        forbidden=tokenizer.forbidden,
        stop_ids=(tokenizer.eos_token_id,),
        train=_prompt_dataset(train, tokenizer, width, strata, _wrong_targets(config, strata, train)),
        heldout=_prompt_dataset(heldout, tokenizer, width, strata, {}),
        reward_fn=_reward_fn(tokenizer),
        demonstrations=demonstrations,
        encode_prompt=tokenizer.encode_prompt,
    )


def write_prompt(problem: Problem) -> str:
    """The prompt of a problem, such as `3,25,7=46:`."""
    return f"{','.join(map(str, problem.numbers))}={problem.target}:"


_Key = tuple[tuple[int, ...], int]


def _key(problem: Problem) -> _Key:
    """Numbers and target, which tell problems apart."""
    return tuple(sorted(problem.numbers)), problem.target


def _examples(config: TaskConfig, rng: np.random.Generator, count: int, banned: set[_Key]) -> list[Problem]:
    """`count` problems for demonstrations, none of them in `banned`; they repeat if there are fewer different ones."""
    sizes = [int(n) for n in config.numbers.split(",")]
    wanted = min(count + len(banned), _MOST_EXAMPLES)
    found = generate(int(rng.integers(2**31)), wanted, sizes, max_target=config.max_target, enough=False)
    found = [p for p in found if _key(p) not in banned]
    return [found[i % len(found)] for i in range(count)]


def _guess(problem: Problem, rng: np.random.Generator) -> str:
    """A random expression of the right numbers."""
    numbers = [problem.numbers[i] for i in rng.permutation(len(problem.numbers))]
    return "".join(f"{n}{rng.choice(list('+-*/'))}" for n in numbers[:-1]) + str(numbers[-1])


def _wrong_targets(t: TaskConfig, strata: Sequence[Stratum], problems: list[Problem]) -> dict[int, int]:
    """Row -> wrong target, for task.wrong_labels of the problems; the prompt still asks for the right one."""
    if not t.wrong_labels:
        return {}
    stratum = stratum_of(np.array([len(p.numbers) for p in problems]), strata) if strata else None
    shift = wrong_label_draws(t.seed).integers(1, t.max_target, len(problems))
    wrong = np.flatnonzero(wrong_rows(t.wrong_labels, t.seed, len(problems), stratum))
    return {int(i): 1 + (problems[i].target - 1 + int(shift[i])) % t.max_target for i in wrong}


def _prompt_dataset(
    problems: list[Problem], tokenizer: CharTokenizer, width: int, strata: Sequence[Stratum], wrong: dict[int, int]
) -> PromptDataset:
    """The problems as prompts.

    Args:
      strata: label the prompts, if there are any.
      wrong: row -> wrong target, which the verifier then asks for.
    """
    texts = [write_prompt(p) for p in problems]
    tokens, lengths = pad_rows([tokenizer.encode(text) for text in texts], width, tokenizer.pad_token_id)
    difficulty = np.array([len(p.numbers) for p in problems], np.float32)
    targets = [wrong.get(i, p.target) for i, p in enumerate(problems)]
    answers = [str(wrong[i]) if i in wrong else "" for i in range(len(problems))]
    return PromptDataset(
        tokens,
        lengths,
        answers=tuple(map(str, targets)),
        texts=texts,
        extras=[json.dumps({"numbers": p.numbers, "target": t}) for p, t in zip(problems, targets, strict=True)],
        digests=np.array([digest(t.encode(), answer) for t, answer in zip(texts, answers, strict=True)], np.uint64),
        difficulty=difficulty,
        labels=labels_of(difficulty, strata) if strata else None,
    )


def _reward_fn(tokenizer: CharTokenizer) -> RewardFn:
    """The reward function, which needs no worker: expressions are short here, and checking one takes bounded time."""

    def reward_fn(batch: CompletionBatch) -> Callable[[], RewardResult]:
        value = np.zeros(batch.lengths.shape, np.float32)
        answers: list[list[str | None]] = []
        assert batch.prompts.extras is not None
        for i, row in enumerate(batch.rows):
            extra = json.loads(batch.prompts.extras[int(row)])
            answers.append([])
            for j, length in enumerate(batch.lengths[i]):
                text = tokenizer.decode(batch.tokens[i, j, :length].tolist()).removesuffix("$")
                answers[-1].append(text or None)
                if batch.ended[i, j] and countdown.evaluated(text)[0] is not None:
                    value[i, j] = countdown.score(text, extra["numbers"], extra["target"])
        verdicts = (value == 1).astype(np.float32)
        return lambda: RewardResult(value, {"accuracy": value}, verdicts, answers, Counter())

    return reward_fn
