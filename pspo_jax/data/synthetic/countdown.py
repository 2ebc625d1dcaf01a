"""Countdown: reach a target with each of three or four numbers used once.

Under a language model the question is text and the answer stands in `<answer>` tags. Without one the task has an
alphabet of its own, as the embedded default has: the prompt `3,25,7=46:`, the response `3*7+25$`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, TaskConfig
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.loading import Question, Source, quiet
from pspo_jax.data.task import CompletionBatch, Demonstrations, PromptDataset, RewardResult, Task, digest, pad_rows
from pspo_jax.verifiers import countdown

CHARACTERS = "0123456789+-*/()=,:$_"
VOCAB = 24

MAX_VALUE = 9999
"""Bound on every value on the way to a target."""
MAX_SIZE = 8
"""Most numbers of a problem; its solution stays well under the reward's MAX_CHARS."""
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_ATOM = 3
_BLOCK = 1024
_TURN = 1000
"""Tries in a row without a new problem after which the next size has its turn."""
_PATIENCE = 50_000
"""Tries in a row without a new problem after which there are taken to be no more."""
_MOST_EXAMPLES = 20_000
"""Different demonstrations; more take too long to make."""


class Problem(NamedTuple):
    """`numbers` are in an order that says nothing about the solution; `solution` is one of possibly many."""

    numbers: tuple[int, ...]
    target: int
    solution: str


class _Node(NamedTuple):
    """An expression: its value, its text, how tightly it binds, and the largest value on the way to its own."""

    value: int
    text: str
    precedence: int
    peak: int


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

    Numbers are drawn from low..high, as many as `sizes` say in turn. Solvable by construction: a random tree over them
    has positive integers up to MAX_VALUE everywhere, and at its root a target in 1..max_target that is not among them.
    With `enough` false, as many as are found where there are fewer than `count`.
    """
    _check(count, sizes, low, high, max_target)
    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    misses = 0
    draws = _draws(seed, 4 * max(sizes))
    while len(problems) < count:
        if misses == _PATIENCE and not enough:
            break
        if misses == _PATIENCE:
            raise ValueError(
                f"count={count}: only {len(problems)} distinct problems found with sizes={tuple(sizes)}, low={low}, "
                f"high={high}, max_target={max_target}; lower count, raise max_target, or widen low..high"
            )
        row = next(draws)
        # Sizes in turn, not at random: larger ones fail more often and would be rarer. One that is used up is left.
        size = sizes[(len(problems) + misses // _TURN) % len(sizes)]
        numbers = tuple(low + int(u * (high - low + 1)) for u in row[:size])
        # The tree has an order of its own, or the prompt would give the solution's away.
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
    """Rows of uniform numbers in [0, 1), drawn in blocks: single draws would take most of the time."""
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
    """`left op right` with the parentheses it needs; None if a value on the way is not in 1..MAX_VALUE or not whole."""
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
    """The prompt of a problem. Its example has a target beyond the default `max_target`: no problem's answer."""
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


def source(config: Config, seed: int, count: int) -> Source:
    """`count` problems as questions for a language model."""
    problems = _problems(config.task, seed, count)
    records = quiet().Dataset.from_dict(
        {"numbers": [list(p.numbers) for p in problems], "target": [p.target for p in problems]}
    )

    def convert(record: dict[str, Any]) -> Question:
        numbers, target = record["numbers"], record["target"]
        return Question(question(numbers, target), str(target), {"numbers": numbers, "target": target})

    return Source("countdown", "countdown", records, convert, "1")


def _problems(t: TaskConfig, seed: int, count: int) -> list[Problem]:
    sizes = [int(n) for n in t.numbers.split(",")]
    try:
        return generate(seed, count, sizes, max_target=t.max_target)
    except ValueError as error:
        raise ConfigError(f"task.train_prompts={t.train_prompts}: {error}") from error


def countdown_task(config: TaskConfig, prompt_bucket: int, max_new_tokens: int) -> Task:
    """The task in its own alphabet; prompts are padded to a multiple of `prompt_bucket`.

    Demonstrations are expressions of the right numbers: the solution in a third of them, else a random one, so that the
    cold start learns the form and only part of the skill.
    """
    tokenizer = CharTokenizer(CHARACTERS, VOCAB)
    problems = _problems(config, config.seed, config.train_prompts + config.heldout_prompts)
    heldout, train = problems[: config.heldout_prompts], problems[config.heldout_prompts :]
    longest = max(len(write_prompt(p)) for p in problems)
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
        train=_prompt_set(train, tokenizer, width),
        heldout=_prompt_set(heldout, tokenizer, width),
        reward_fn=_judge(tokenizer),
        demonstrations=demonstrations,
        encode_prompt=tokenizer.encode,
    )


def write_prompt(problem: Problem) -> str:
    """`3,25,7=46:`."""
    return f"{','.join(map(str, problem.numbers))}={problem.target}:"


def _key(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.numbers)), problem.target


def _examples(config: TaskConfig, rng: np.random.Generator, count: int, banned: set[Any]) -> list[Problem]:
    """Problems of another seed than the prompts'; there may be fewer different ones than wanted, which then repeat."""
    sizes = [int(n) for n in config.numbers.split(",")]
    wanted = min(count + len(banned), _MOST_EXAMPLES)
    found = generate(int(rng.integers(2**31)), wanted, sizes, max_target=config.max_target, enough=False)
    found = [p for p in found if _key(p) not in banned]
    return [found[i % len(found)] for i in range(count)]


def _guess(problem: Problem, rng: np.random.Generator) -> str:
    numbers = [problem.numbers[i] for i in rng.permutation(len(problem.numbers))]
    return "".join(f"{n}{rng.choice(list('+-*/'))}" for n in numbers[:-1]) + str(numbers[-1])


def _prompt_set(problems: list[Problem], tokenizer: CharTokenizer, width: int) -> PromptDataset:
    texts = [write_prompt(p) for p in problems]
    tokens, lengths = pad_rows([tokenizer.encode(text) for text in texts], width, tokenizer.pad_token_id)
    return PromptDataset(
        tokens,
        lengths,
        answers=tuple(str(p.target) for p in problems),
        texts=texts,
        extras=[json.dumps({"numbers": p.numbers, "target": p.target}) for p in problems],
        digests=np.array([digest(text.encode(), "") for text in texts], np.uint64),
        difficulty=np.array([len(p.numbers) for p in problems], np.float32),
    )


def _judge(tokenizer: CharTokenizer) -> Callable[[CompletionBatch], Callable[[], RewardResult]]:
    """Expressions are short here and the check is bounded, so no worker is needed."""

    def judge(batch: CompletionBatch) -> Callable[[], RewardResult]:
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

    return judge
