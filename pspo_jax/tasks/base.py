"""What the loop needs of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int


class Tokenizer(Protocol):
    """Text to ids and back; transformers' tokenizers fit."""

    eos_token_id: int
    pad_token_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class PromptSet(NamedTuple):
    """Prompts addressed by row."""

    tokens: Int[np.ndarray, "N P"]
    """Padded on the right with the pad id."""
    lengths: Int[np.ndarray, "N"]
    answers: tuple[str, ...]
    """Gold answers."""
    left_out: int = 0
    """Rows of the source that were too long."""

    def fingerprint(self) -> str:
        """Hash of everything that a run depends on; a checkpoint belongs to one."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for part in (self.tokens.astype("<i4"), self.lengths.astype("<i4")):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update("\x00".join(self.answers).encode())
        return digest.hexdigest()[:16]


Verifier = Callable[
    [PromptSet, Int[np.ndarray, "B"], Int[np.ndarray, "B G T"], Int[np.ndarray, "B G"]],
    dict[str, Float[np.ndarray, "B G"]],
]
"""(prompt set, rows, completions, their lengths) -> rewards by name; the first one is the verdict that evaluation
counts, the training reward is their sum, NaN = no verdict."""


class Demonstrations(NamedTuple):
    """Supervised examples, padded on the right."""

    prompts: Int[np.ndarray, "n P"]
    prompt_lengths: Int[np.ndarray, "n"]
    completions: Int[np.ndarray, "n T"]
    completion_lengths: Int[np.ndarray, "n"]


class Task(NamedTuple):
    """Prompts, a tokenizer, a verifier, and demonstrations for the cold start."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding: the tokenizer's entries and its padding."""
    forbidden: tuple[int, ...]
    """Ids that a policy must never draw."""
    stop_ids: tuple[int, ...]
    train: PromptSet
    heldout: PromptSet
    verify: Verifier
    demonstrations: Callable[[int, int], Iterator[Demonstrations]]
    """(seed, count) -> blocks of fresh examples, `count` in all."""
    encode_prompt: Callable[[str], list[int]]
    """A question as the policy sees it: in its template, if it has one."""


def json_lines(text: str) -> list[str]:
    """Lines of a JSONL file. str.splitlines() would also cut at U+2028 and its like, which JSON strings may hold."""
    return [line for line in text.split("\n") if line.strip()]


def pad_rows(rows: list[list[int]], width: int, pad: int) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, "n"]]:
    """Right-padded array of token lists, and their lengths. A list longer than `width` is an error of the caller."""
    out = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)
