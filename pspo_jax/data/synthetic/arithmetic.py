"""The embedded default task: running sums that a cold-started model gets wrong where there is a carry or a borrow.

A prompt is `27-4+8-3=`, and its right response is `-4=23+8=31-3=28$`: each operation with its new total, then EOS. The
start is in 10..99 and every total stays there; there are three to six operations, with digits 1..9 and P(d) ~ 2^-(d-1).
The reward is 1 if and only if EOS came and the last number is right. An operation is hard if it carries or borrows;
prompts are stratified by their number of hard operations, because these remain to be learnt after the cold start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pspo_jax.config.schema import TaskConfig
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.task import CompletionBatch, Demonstrations, PromptDataset, RewardResult, Task

CHARACTERS = "0123456789+-=$_"
EOS, PAD = CHARACTERS.index("$"), CHARACTERS.index("_")
PLUS, MINUS, EQUALS = (CHARACTERS.index(c) for c in "+-=")
VOCAB = 16
MIN_OPS, MAX_OPS = 3, 6
MAX_PROMPT, MAX_RESPONSE = 2 + 2 * MAX_OPS + 1, 5 * MAX_OPS + 1
STRATA = (0.35, 0.15, 0.10, 0.40)
"""Shares of prompts with 0, 1, 2, and 3 or more hard operations."""
EASY_SLIP = 0.002
"""Probability that the noisy demonstrator is off by one in an operation without carry or borrow."""
_BLOCK = 4096
TOKENIZER = CharTokenizer(CHARACTERS, VOCAB)


class Problems(NamedTuple):
    """n running sums."""

    start: Int[np.ndarray, "n"]
    length: Int[np.ndarray, "n"]
    """Operations used; the rest of each row is ignored."""
    delta: Int[np.ndarray, "n MAX_OPS"]
    """Signed digits."""


def arithmetic(config: TaskConfig, prompt_bucket: int) -> Task:
    """The task of `config`; prompts are padded to a multiple of `prompt_bucket`."""
    width = -(-MAX_PROMPT // prompt_bucket) * prompt_bucket
    train, heldout = _split(config, width)
    banned = {bytes(row) for row in heldout.tokens.astype(np.uint8)}

    def demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
        """Fresh examples by the noisy demonstrator; held-out problems are left out."""
        rng = np.random.default_rng([seed, 2])
        made = 0
        while made < count:
            problems = generate(rng, _BLOCK)
            prompts, prompt_lengths = write_prompts(problems, width)
            fresh = np.array([bytes(row) not in banned for row in prompts.astype(np.uint8)])
            fresh &= np.cumsum(fresh) <= count - made
            completions, lengths = write_responses(problems, noisy_totals(problems, rng))
            made += int(fresh.sum())
            yield Demonstrations(prompts[fresh], prompt_lengths[fresh], completions[fresh], lengths[fresh])

    return Task(
        name="arithmetic",
        tokenizer=TOKENIZER,
        vocab_size=VOCAB,
        forbidden=TOKENIZER.forbidden,
        stop_ids=(EOS,),
        train=train,
        heldout=heldout,
        reward_fn=grade,
        demonstrations=demonstrations,
        encode_prompt=TOKENIZER.encode_prompt,
    )


def generate(rng: np.random.Generator, n: int) -> Problems:
    """n random problems. A sign that would lead out of 10..99 is flipped."""
    start = rng.integers(10, 100, n)
    count = rng.integers(MIN_OPS, MAX_OPS + 1, n)
    weights = 0.5 ** np.arange(9)
    digit = rng.choice(np.arange(1, 10), (n, MAX_OPS), p=weights / weights.sum())
    sign = rng.choice([-1, 1], (n, MAX_OPS))
    delta = np.zeros((n, MAX_OPS), np.int64)
    total = start.copy()
    for i in range(MAX_OPS):
        step = digit[:, i] * sign[:, i]
        step = np.where((total + step < 10) | (total + step > 99), -step, step)
        delta[:, i] = step
        total = total + step
    return Problems(start, count, delta)


def totals(problems: Problems) -> Int[np.ndarray, "n MAX_OPS"]:
    """The right running totals."""
    return problems.start[:, None] + np.cumsum(problems.delta, axis=1)


def is_hard(before: Int[np.ndarray, "*n"], delta: Int[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """True where adding delta to a total carries or borrows."""
    units = before % 10 + delta
    return (units < 0) | (units > 9)


def hard_steps(problems: Problems) -> Int[np.ndarray, "n"]:
    """Number of hard operations of each problem."""
    after = totals(problems)
    hard = is_hard(after - problems.delta, problems.delta)
    return (hard & (np.arange(MAX_OPS) < problems.length[:, None])).sum(axis=1)


def noisy_totals(problems: Problems, rng: np.random.Generator) -> Int[np.ndarray, "n MAX_OPS"]:
    """Running totals of the noisy demonstrator, which makes two kinds of mistakes and carries on from wrong totals.

    It forgets a carry with probability min(0.45 + 0.07 d, 0.95), and borrows by taking the smaller digit from the
    larger (52-7=55) with probability min(0.55 + 0.06 d, 0.95). Where the right total would leave 10..99, which only
    follows an earlier mistake, it makes the mistake for certain. Other operations are off by one with probability
    EASY_SLIP.
    """
    n = len(problems.start)
    chance = rng.random((n, MAX_OPS))
    off = rng.choice([-1, 1], (n, MAX_OPS))
    out = np.zeros((n, MAX_OPS), np.int64)
    total = problems.start.copy()
    for i in range(MAX_OPS):
        d = problems.delta[:, i]
        size = np.abs(d)
        right = total + d
        tens, units = total // 10 * 10, total % 10
        bug = np.where(d > 0, tens + (units + size) % 10, tens + np.abs(units - size))
        p_bug = np.minimum(np.where(d > 0, 0.45 + 0.07 * size, 0.55 + 0.06 * size), 0.95)
        hard = is_hard(total, d)
        impossible = (right < 10) | (right > 99)
        slip = np.clip(right + off[:, i], 10, 99)
        total = np.where(
            hard,
            np.where((chance[:, i] < p_bug) | impossible, bug, right),
            np.where(chance[:, i] < EASY_SLIP, slip, right),
        )
        out[:, i] = total
    return out


def write_prompts(problems: Problems, width: int) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, "n"]]:
    """Tokens of prompts such as `27-4+8-3=`, padded to `width`, and their lengths."""
    n = len(problems.start)
    out = np.full((n, width), PAD, np.int32)
    out[:, 0], out[:, 1] = problems.start // 10, problems.start % 10
    for i in range(MAX_OPS):
        used = i < problems.length
        out[used, 2 + 2 * i] = np.where(problems.delta[used, i] > 0, PLUS, MINUS)
        out[used, 3 + 2 * i] = np.abs(problems.delta[used, i])
    lengths = 2 + 2 * problems.length
    out[np.arange(n), lengths] = EQUALS
    return out, (lengths + 1).astype(np.int32)


def write_responses(
    problems: Problems, running: Int[np.ndarray, "n MAX_OPS"]
) -> tuple[Int[np.ndarray, "n MAX_RESPONSE"], Int[np.ndarray, "n"]]:
    """Tokens of responses such as `-4=23+8=31-3=28$` for running totals in 10..99, padded, and their lengths."""
    n = len(problems.start)
    out = np.full((n, MAX_RESPONSE), PAD, np.int32)
    for i in range(MAX_OPS):
        used = i < problems.length
        out[used, 5 * i] = np.where(problems.delta[used, i] > 0, PLUS, MINUS)
        out[used, 5 * i + 1] = np.abs(problems.delta[used, i])
        out[used, 5 * i + 2] = EQUALS
        out[used, 5 * i + 3] = running[used, i] // 10
        out[used, 5 * i + 4] = running[used, i] % 10
    lengths = 5 * problems.length
    out[np.arange(n), lengths] = EOS
    return out, (lengths + 1).astype(np.int32)


def grade(batch: CompletionBatch) -> Callable[[], RewardResult]:
    """The reward function: 1 if a completion ends in EOS and the text after its last `=` is the answer, else 0."""
    b, g = batch.lengths.shape
    verdicts = np.zeros((b, g), np.float32)
    answers: list[list[str | None]] = []
    for i in range(b):
        answer = batch.prompts.answers[int(batch.rows[i])]
        answers.append([])
        for j in range(g):
            ids = batch.tokens[i, j, : batch.lengths[i, j]].tolist()
            _, equals, found = TOKENIZER.decode(ids).removesuffix("$").rpartition("=")
            answers[-1].append(found if equals else None)
            verdicts[i, j] = bool(ids) and ids[-1] == EOS and bool(equals) and found == answer
    return lambda: RewardResult(verdicts, {"accuracy": verdicts}, verdicts, answers, Counter())


def _split(config: TaskConfig, width: int) -> tuple[PromptDataset, PromptDataset]:
    """Training and held-out prompts: distinct, both stratified by hard operations."""
    rng = np.random.default_rng([config.seed, 1])
    sizes = [_shares(config.train_prompts), _shares(config.heldout_prompts)]
    wanted = [a + b for a, b in zip(*sizes, strict=True)]
    found: list[list[tuple[bytes, str, int]]] = [[] for _ in STRATA]
    seen: set[bytes] = set()
    while any(len(f) < w for f, w in zip(found, wanted, strict=True)):
        problems = generate(rng, _BLOCK)
        tokens, _ = write_prompts(problems, width)
        hard = hard_steps(problems)
        stratum = np.minimum(hard, len(STRATA) - 1)
        last = totals(problems)[np.arange(_BLOCK), problems.length - 1]
        for row, s, answer, steps in zip(tokens.astype(np.uint8), stratum, last, hard, strict=True):
            if len(found[s]) < wanted[s] and bytes(row) not in seen:
                seen.add(bytes(row))
                found[s].append((bytes(row), str(answer), int(steps)))
    train = [item for f, size in zip(found, sizes[0], strict=True) for item in f[:size]]
    heldout = [item for f, size in zip(found, sizes[0], strict=True) for item in f[size:]]
    return _prompt_dataset(train, rng), _prompt_dataset(heldout, rng)


def _shares(n: int) -> list[int]:
    """n split by STRATA; the remainder goes to the last stratum."""
    parts = [int(n * share) for share in STRATA[:-1]]
    return [*parts, n - sum(parts)]


def _prompt_dataset(items: list[tuple[bytes, str, int]], rng: np.random.Generator) -> PromptDataset:
    """Prompts from (tokens, answer, hard operations), shuffled."""
    order = rng.permutation(len(items))
    tokens = np.array([np.frombuffer(items[i][0], np.uint8) for i in order]).astype(np.int32)
    return PromptDataset(
        tokens,
        (tokens != PAD).sum(axis=1).astype(np.int32),
        tuple(items[i][1] for i in order),
        difficulty=np.array([items[i][2] for i in order], np.float32),
    )
