"""A task as the training loop sees it: prompts, completions, rewards and demonstrations, with their shapes."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from pspo_jax.data.images.processor import png
from pspo_jax.data.images.prompt_images import PromptImages

ANSWER_COLUMN = "answer_column"
"""Key of a row's extras: the name of the column that holds its answer, for users' functions."""


class Tokenizer(Protocol):
    """Text to ids and back, as TextTokenizer and CharTokenizer do it."""

    eos_token_id: int
    pad_token_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, with their special tokens."""
        ...


class LeftOut(NamedTuple):
    """A row of the source that is no prompt."""

    data: str
    """The name of its source."""
    row: int
    reason: str
    """Why it is no prompt."""
    text: str
    """The beginning of its question."""


class PromptDataset(NamedTuple):
    """N prompts addressed by row. The columns may be lazy, so that indexing reads from disk."""

    tokens: Int[np.ndarray, "N P"]
    """Token ids, padded on the right with the pad id: an array, or an object that is indexed like one."""
    lengths: Int[np.ndarray, "N"]
    """Tokens of each prompt."""
    answers: Sequence[str]
    """Gold answers."""
    texts: Sequence[str] | None = None
    """Questions in the words of their source; None = there are only the tokens."""
    kinds: Sequence[str] | None = None
    """Name of each row's task, which decides how it is verified."""
    extras: Sequence[str] | None = None
    """Further arguments of each row's verifier, as JSON."""
    columns: Callable[[int], dict[str, object]] | None = None
    """A function from a row to its record in its source."""
    column: Callable[[str], list[object]] | None = None
    """A function from a column's name to its values in all rows; None where a row's source has no such column."""
    difficulty: Float[np.ndarray, "N"] | None = None
    """A number that grows with a prompt's difficulty, for tasks that generate their prompts, or if task.strata is
    set; NaN = the prompt has none."""
    digests: UInt64[np.ndarray, "N"] | None = None
    """Hash of each row's content; None = the hash of its tokens and answer."""
    identity: str = ""
    """Hash of the tokenizer and template behind `tokens`; "" = the tokens themselves are hashed."""
    left_out: tuple[LeftOut, ...] = ()
    """Rows of the source that are no prompts."""
    labels: Sequence[str] | None = None
    """Label of each row: its task in a mixture, its kind in the text suite, or its stratum in task.strata."""
    images: PromptImages | None = None
    """Images of the prompts; None = they are text alone. `digests` and `identity` then cover the images too."""

    def content(self) -> UInt64[np.ndarray, "N"]:
        """A hash of each row that depends on neither the other rows nor their order."""
        if self.digests is not None:
            return self.digests
        rows = zip(self.tokens, self.lengths, self.answers, strict=True)
        return np.array([digest(row[:n].astype("<i4").tobytes(), answer) for row, n, answer in rows], np.uint64)

    def fingerprint(self) -> str:
        """Hash of all prompts that a run depends on; a checkpoint belongs to one fingerprint."""
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


def prompt_text(prompts: PromptDataset, row: int, tokenizer: Tokenizer) -> str:
    """The text of a prompt as the model sees it, with a short text in place of each image's tokens."""
    ids = prompts.tokens[row][: prompts.lengths[row]].tolist()
    if prompts.images is None:
        return tokenizer.decode(ids)
    return prompts.images.text(row, ids, tokenizer.decode)


def prompt_pictures(prompts: PromptDataset, row: int) -> list[str]:
    """Data URLs of PNG files with a prompt's images, as the model sees them; none where it has none."""
    if prompts.images is None:
        return []
    found = prompts.images.of(row, prompts.tokens[row][: prompts.lengths[row]].tolist())
    files = [png(image.patches, (image.rows, image.columns), prompts.images.processor) for image in found]
    return [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]


def digest(content: bytes, answer: str) -> int:
    """64-bit hash of a prompt and its gold answer."""
    return int.from_bytes(hashlib.blake2b(content + b"\x00" + answer.encode(), digest_size=8).digest(), "little")


class CompletionBatch(NamedTuple):
    """Completions to be rewarded, on the host: G completions of T tokens at most for each of B prompts."""

    prompts: PromptDataset
    rows: Int[np.ndarray, "B"]
    """Rows of `prompts`."""
    tokens: Int[np.ndarray, "B G T"]
    lengths: Int[np.ndarray, "B G"]
    """Tokens of each completion."""
    ended: Bool[np.ndarray, "B G"]
    """False = cut off at the length limit."""
    step: int
    wants_reward: bool = True
    """Whether rewards are computed; False = the verdict alone, as in evaluation."""


class RewardResult(NamedTuple):
    """Rewards and verdicts of a batch of completions."""

    reward: Float[np.ndarray, "B G"]
    """The reward for training; NaN = none."""
    terms: dict[str, Float[np.ndarray, "B G"]]
    """Unweighted rewards by the name of their term."""
    verdicts: Float[np.ndarray, "B G"]
    """The verdict that evaluation counts, in [0, 1]; NaN = no verdict."""
    answers: list[list[str | None]]
    """The answers found, in a canonical form; None = none found."""
    reasons: Counter[str]
    """Why completions have no verdict."""
    errors: tuple[str, ...] = ()
    """Tracebacks of reward functions that raised, each once."""
    failed: Mapping[str, Bool[np.ndarray, "B G"]] = MappingProxyType({})
    """For each term: where a verifier or a user's function failed, by an error, its deadline or its death."""
    missing: Mapping[str, Counter[str]] = MappingProxyType({})
    """For each term: why values are missing, and how many."""
    logged: Mapping[str, list[float]] = MappingProxyType({})
    """Values that users' functions gave to `log_metric`."""
    columns: Mapping[str, list[list[object]]] = MappingProxyType({})
    """Values that users' functions gave to `log_extra`: B lists with one value, or None, for each of G completions."""


class RewardFn(Protocol):
    """Rewards of completions. The call starts verification and returns at once; calling its result waits for the
    rewards."""

    def __call__(self, completions: CompletionBatch, /) -> Callable[[], RewardResult]: ...


class PromptEncoder(Protocol):
    """Ids of a prompt as the model sees it: in its template, if it has one.

    A prompt is a question or, in tasks of text, also a conversation in any form that `read_prompt` knows.

    Raises:
      TypeError, ValueError: the prompt is neither, or the template refuses it.
    """

    def __call__(self, prompt: object, /) -> list[int]: ...


class Demonstrations(NamedTuple):
    """n supervised examples, padded on the right."""

    prompts: Int[np.ndarray, "n P"]
    prompt_lengths: Int[np.ndarray, "n"]
    completions: Int[np.ndarray, "n T"]
    completion_lengths: Int[np.ndarray, "n"]
    images: PromptImages | None = None
    """Images of the prompts; None = they are text alone."""


class Demonstrator(Protocol):
    """Blocks of fresh supervised examples, `count` in all.

    Raises:
      ConfigError: the task has no demonstrations.
    """

    def __call__(self, seed: int, count: int, /) -> Iterator[Demonstrations]: ...


class Task(NamedTuple):
    """Prompts, a tokenizer, a reward function, and demonstrations for the cold start."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding: the tokenizer's entries and its padding."""
    forbidden: tuple[int, ...]
    """Ids that must never be drawn."""
    stop_ids: tuple[int, ...]
    """Ids that end a completion."""
    train: PromptDataset
    heldout: PromptDataset
    reward_fn: RewardFn
    demonstrations: Demonstrator
    encode_prompt: PromptEncoder


def json_lines(text: str) -> list[str]:
    """The lines of a JSONL file. str.splitlines() would also cut at U+2028 and similar, which JSON strings may hold."""
    return [line for line in text.split("\n") if line.strip()]


def pad_rows(rows: list[list[int]], width: int, pad: int) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, "n"]]:
    """Token lists as one array, padded on the right, and their lengths. No list may be longer than `width`."""
    out = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)
