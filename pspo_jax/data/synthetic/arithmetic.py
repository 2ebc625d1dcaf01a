"""The embedded default task: running sums that a cold-started model gets wrong where there is a carry or a borrow.

A prompt is `27-4+8-3=`, and its right response is `-4=23+8=31-3=28$`: each operation with its new total, then EOS. The
start is in 10..99 and every total stays there; there are three to six operations, with digits 1..9 and P(d) ~ 2^-(d-1).
The reward is 1 if and only if EOS came and the last number is right. An operation is hard if it carries or borrows;
prompts are stratified by their number of hard operations, because these remain to be learnt after the cold start. This
number is a prompt's difficulty, by which task.strata gives training prompts other shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pspo_jax.config.schema import TaskConfig
from pspo_jax.config.text_fields import Stratum, parse_strata
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.strata import counts_of, labels_of, stratum_of, too_few, wrong_label_draws, wrong_rows
from pspo_jax.data.synthetic.last_number import last_number
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
_IDLE_BLOCKS = 50
"""Blocks in a row without a new problem of a stratum after which no more are expected."""
_STRATA_STREAM = 6
"""Number of the stream of random numbers that draws the training prompts of task.strata."""
_TOTALS = 90
"""Number of totals in 10..99."""
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
    return last_number(batch, TOKENIZER)


_Item = tuple[bytes, str, int]
"""Tokens, answer and hard operations of a prompt."""


def _split(config: TaskConfig, width: int) -> tuple[PromptDataset, PromptDataset]:
    """Training and held-out prompts: distinct, both stratified by hard operations.

    task.strata and task.wrong_labels change training prompts alone.
    """
    rng = np.random.default_rng([config.seed, 1])
    sizes = [_shares(config.train_prompts), _shares(config.heldout_prompts)]
    wanted = [a + b for a, b in zip(*sizes, strict=True)]
    found: list[list[_Item]] = [[] for _ in STRATA]
    seen: set[bytes] = set()
    while any(len(f) < w for f, w in zip(found, wanted, strict=True)):
        for row, answer, steps in _block(rng, width):
            s = min(steps, len(STRATA) - 1)
            if len(found[s]) < wanted[s] and row not in seen:
                seen.add(row)
                found[s].append((row, answer, steps))
    train = [item for f, size in zip(found, sizes[0], strict=True) for item in f[:size]]
    heldout = [item for f, size in zip(found, sizes[0], strict=True) for item in f[size:]]
    train = _shuffled(train, rng)
    heldout = _shuffled(heldout, rng)
    strata = parse_strata(config.strata)
    if strata:
        train = _in_strata(config, strata, width, {row for row, _, _ in heldout})
    if config.wrong_labels:
        train = _mislabelled(config, strata, train)
    return _prompt_dataset(train, strata), _prompt_dataset(heldout, strata)


def _block(rng: np.random.Generator, width: int) -> Iterator[_Item]:
    """Random problems, which may repeat."""
    problems = generate(rng, _BLOCK)
    tokens, _ = write_prompts(problems, width)
    last = totals(problems)[np.arange(_BLOCK), problems.length - 1]
    for row, answer, steps in zip(tokens.astype(np.uint8), last, hard_steps(problems), strict=True):
        yield bytes(row), str(answer), int(steps)


def _shares(n: int) -> list[int]:
    """n split by STRATA; the remainder goes to the last stratum."""
    parts = [int(n * share) for share in STRATA[:-1]]
    return [*parts, n - sum(parts)]


def _in_strata(config: TaskConfig, strata: Sequence[Stratum], width: int, banned: set[bytes]) -> list[_Item]:
    """Training prompts with the shares of task.strata, shuffled; none of them is in `banned`.

    Raises:
      ConfigError: many random problems in a row hold no further one of a stratum.
    """
    rng = np.random.default_rng([config.seed, _STRATA_STREAM])
    wanted = counts_of(config.train_prompts, strata)
    found: list[list[_Item]] = [[] for _ in strata]
    seen = set(banned)
    idle = 0
    while any(len(f) < w for f, w in zip(found, wanted, strict=True)):
        before = len(seen)
        block = list(_block(rng, width))
        for item, s in zip(block, stratum_of(np.array([steps for _, _, steps in block]), strata), strict=True):
            if s >= 0 and len(found[s]) < wanted[s] and item[0] not in seen:
                seen.add(item[0])
                found[s].append(item)
        idle = idle + 1 if len(seen) == before else 0
        if idle == _IDLE_BLOCKS:
            short = next(i for i, (f, w) in enumerate(zip(found, wanted, strict=True)) if len(f) < w)
            raise too_few(strata, strata[short], wanted[short], len(found[short]))
    return _shuffled([item for f in found for item in f], rng)


def _mislabelled(config: TaskConfig, strata: Sequence[Stratum], items: list[_Item]) -> list[_Item]:
    """The prompts with task.wrong_labels of their answers replaced by another total in 10..99."""
    steps = np.array([steps for _, _, steps in items])
    wrong = wrong_rows(config.wrong_labels, config.seed, len(items), stratum_of(steps, strata) if strata else None)
    shift = wrong_label_draws(config.seed).integers(1, _TOTALS, len(items))
    return [
        (row, str(10 + (int(answer) - 10 + int(by)) % _TOTALS) if is_wrong else answer, n)
        for (row, answer, n), is_wrong, by in zip(items, wrong, shift, strict=True)
    ]


def _shuffled(items: list[_Item], rng: np.random.Generator) -> list[_Item]:
    return [items[i] for i in rng.permutation(len(items))]


def _prompt_dataset(items: list[_Item], strata: Sequence[Stratum]) -> PromptDataset:
    """The prompts, labelled by stratum if there are strata."""
    tokens = np.array([np.frombuffer(row, np.uint8) for row, _, _ in items]).astype(np.int32)
    difficulty = np.array([steps for _, _, steps in items], np.float32)
    return PromptDataset(
        tokens,
        (tokens != PAD).sum(axis=1).astype(np.int32),
        tuple(answer for _, answer, _ in items),
        difficulty=difficulty,
        labels=labels_of(difficulty, strata) if strata else None,
    )
