"""What the loop needs of a task."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

ANSWER_COLUMN = "answer_column"
"""Key of a row's extras: the column of its source in which its answer stands, for users' functions."""


class Tokenizer(Protocol):
    """Text to ids and back; transformers' tokenizers fit."""

    eos_token_id: int
    pad_token_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class LeftOut(NamedTuple):
    """A row of the source that is no prompt."""

    data: str
    """Where it came from."""
    row: int
    reason: str
    text: str
    """Its beginning."""


class PromptDataset(NamedTuple):
    """Prompts addressed by row. The columns may be lazy: indexing reads from disk."""

    tokens: Int[np.ndarray, "N P"]
    """Padded on the right with the pad id; indexed by rows, or an object that does this."""
    lengths: Int[np.ndarray, "N"]
    answers: Sequence[str]
    """Gold answers."""
    texts: Sequence[str] | None = None
    """Questions as their source has them; None = the decoded tokens are all there is."""
    kinds: Sequence[str] | None = None
    """Name of the task of each row, which says how it is verified."""
    extras: Sequence[str] | None = None
    """JSON: what else a row's verifier needs."""
    columns: Callable[[int], dict[str, Any]] | None = None
    """A row's record in its source."""
    column: Callable[[str], list[Any]] | None = None
    """All rows' values of a column of their source; None where a source has none of that name."""
    difficulty: Float[np.ndarray, "N"] | None = None
    """Of a task that makes its prompts: a number that grows with it."""
    digests: UInt64[np.ndarray, "N"] | None = None
    """Hash of each row's content; None = of its tokens and answer."""
    identity: str = ""
    """Hash of the tokenizer and template behind `tokens`; "" = the tokens themselves are hashed."""
    left_out: tuple[LeftOut, ...] = ()
    labels: Sequence[str] | None = None
    """What tells the tasks of a mixture apart, for each row: its kind, or another text where two are of one kind."""

    def content(self) -> UInt64[np.ndarray, "N"]:
        """A hash per row that does not depend on the other rows or their order."""
        if self.digests is not None:
            return self.digests
        rows = zip(self.tokens, self.lengths, self.answers, strict=True)
        return np.array([digest(row[:n].astype("<i4").tobytes(), answer) for row, n, answer in rows], np.uint64)

    def fingerprint(self) -> str:
        """Hash of everything that a run depends on; a checkpoint belongs to one."""
        found = hashlib.sha256(str(self.tokens.shape).encode())
        if self.digests is not None:
            for part in (self.digests.astype("<u8"), self.lengths.astype("<i4")):
                found.update(np.ascontiguousarray(part).tobytes())
            found.update(self.identity.encode())
            return found.hexdigest()[:16]
        for part in (self.tokens.astype("<i4"), self.lengths.astype("<i4")):
            found.update(np.ascontiguousarray(part).tobytes())
        found.update("\x00".join(self.answers).encode())
        return found.hexdigest()[:16]


def digest(content: bytes, answer: str) -> int:
    """64-bit hash of a prompt and its gold answer."""
    return int.from_bytes(hashlib.blake2b(content + b"\x00" + answer.encode(), digest_size=8).digest(), "little")


class CompletionBatch(NamedTuple):
    """Completions to be judged, on the host."""

    prompts: PromptDataset
    rows: Int[np.ndarray, "B"]
    tokens: Int[np.ndarray, "B G T"]
    lengths: Int[np.ndarray, "B G"]
    ended: Bool[np.ndarray, "B G"]
    """False = cut off at the length limit."""
    step: int
    paid: bool = True
    """Whether rewards are wanted; False = the verdict alone, as in evaluation."""


class RewardResult(NamedTuple):
    """What completions are worth."""

    reward: Float[np.ndarray, "B G"]
    """For training; NaN = none."""
    terms: dict[str, Float[np.ndarray, "B G"]]
    """Unweighted rewards by name."""
    verdicts: Float[np.ndarray, "B G"]
    """The verdict that evaluation counts, in [0, 1]; NaN = no verdict."""
    answers: list[list[str | None]]
    """The answers found, in a canonical form; None = none found."""
    reasons: Counter[str]
    """Why completions have no verdict."""
    errors: tuple[str, ...] = ()
    """Tracebacks of rewards that raised, each once."""
    failed: Mapping[str, Bool[np.ndarray, "B G"]] = MappingProxyType({})
    """By term: where a verifier or a user's function gave no verdict by an error, its deadline or its death."""
    missing: Mapping[str, Counter[str]] = MappingProxyType({})
    """By term: why values are missing, and how many."""
    logged: Mapping[str, list[float]] = MappingProxyType({})
    """What users' functions gave to `log_metric`."""
    columns: Mapping[str, list[list[Any]]] = MappingProxyType({})
    """What users' functions gave to `log_extra`: a value for each completion [B][G], or None."""


RewardFn = Callable[[CompletionBatch], Callable[[], RewardResult]]
"""Starts verification and returns at once; calling what it returned waits for the scores."""


class Demonstrations(NamedTuple):
    """Supervised examples, padded on the right."""

    prompts: Int[np.ndarray, "n P"]
    prompt_lengths: Int[np.ndarray, "n"]
    completions: Int[np.ndarray, "n T"]
    completion_lengths: Int[np.ndarray, "n"]


class Task(NamedTuple):
    """Prompts, a tokenizer, a judge, and demonstrations for the cold start."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding: the tokenizer's entries and its padding."""
    forbidden: tuple[int, ...]
    """Ids that a policy must never draw."""
    stop_ids: tuple[int, ...]
    train: PromptDataset
    heldout: PromptDataset
    reward_fn: RewardFn
    demonstrations: Callable[[int, int], Iterator[Demonstrations]]
    """(seed, count) -> blocks of fresh examples, `count` in all."""
    encode_prompt: Callable[[Any], list[int]]
    """A question, or a conversation in a task of text, as the policy sees it: in its template, if it has one.

    TypeError or ValueError: it is neither, or the template refuses it."""


def json_lines(text: str) -> list[str]:
    """Lines of a JSONL file. str.splitlines() would also cut at U+2028 and its like, which JSON strings may hold."""
    return [line for line in text.split("\n") if line.strip()]


def pad_rows(rows: list[list[int]], width: int, pad: int) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, "n"]]:
    """Right-padded array of token lists, and their lengths. A list longer than `width` is an error of the caller."""
    out = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)
