"""A task of the user's own, and a reward that is a plain Python function, for `pspo_jax.train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.task import (
    CompletionBatch,
    Demonstrations,
    PromptDataset,
    PromptEncoder,
    RewardFn,
    RewardResult,
    Task,
    Tokenizer,
    pad_rows,
)

Example = tuple[str, str]
"""A prompt and its gold answer."""
_NO_VALUE = "the function returned None or NaN"


class RewardFunction(Protocol):
    """A reward as a user writes it."""

    def __call__(self, completions: list[str], answers: list[str], /) -> Sequence[float | None]:
        """Rewards of completions, given the gold answer of each one's prompt; None or NaN = no verdict."""


def function_reward(
    function: RewardFunction, tokenizer: Tokenizer, require_end: bool = True, prefix: str = ""
) -> RewardFn:
    """A task's reward from a Python function, which is called in this process with all completions of a batch at once.

    The reward is what the function returns. The verdict, which accuracy is the mean of and by which selectors count
    successes, is the reward clipped to [0, 1]. What the function raises reaches the caller of the loop.

    Args:
      tokenizer: turns completions into text; the stop token at the end is left out.
      require_end: whether a completion that was cut off at the length limit gets at most 0.
      prefix: text that the prompt has begun the answer with; it stands before each completion.
    """

    def reward_fn(batch: CompletionBatch) -> Callable[[], RewardResult]:
        lengths = (batch.lengths - batch.ended).reshape(-1)
        tokens = batch.tokens.reshape(len(lengths), -1)
        texts = [prefix + tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        golds = [batch.prompts.answers[int(row)] for row in batch.rows for _ in range(batch.lengths.shape[1])]
        found = list(function(texts, golds))
        if len(found) != len(texts):
            raise ConfigError(f"reward: the function returned {len(found)} values for {len(texts)} completions")
        reward = np.array([np.nan if value is None else value for value in found], np.float32)
        reward = reward.reshape(batch.lengths.shape)
        if require_end:
            reward = np.where(batch.ended, reward, np.minimum(reward, 0)).astype(np.float32)
        verdict = np.clip(reward, 0, 1)
        unknown = int(np.isnan(reward).sum())
        reasons = Counter({_NO_VALUE: unknown} if unknown else {})
        answers: list[list[str | None]] = [[None] * batch.lengths.shape[1] for _ in batch.rows]
        result = RewardResult(
            reward, {"accuracy": verdict, "reward": reward}, verdict, answers, reasons, missing={"accuracy": reasons}
        )
        return lambda: result

    return reward_fn


def own_task(
    name: str,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    heldout: Sequence[Example],
    reward: RewardFunction,
    vocab_size: int,
    stop_ids: Sequence[int] | None = None,
    forbidden: Sequence[int] = (),
    require_end: bool = True,
) -> Task:
    """A task from prompts, gold answers and a reward function.

    Args:
      name: of the task, for logs.
      tokenizer: has encode, decode, eos_token_id and pad_token_id, as transformers' tokenizers do.
      train: (prompt, gold answer) pairs to train on, at least rollout.prompts of them.
      heldout: (prompt, gold answer) pairs to evaluate on.
      reward: see `function_reward`.
      vocab_size: number of the tokenizer's entries; a built-in model's embedding has as many rows.
      stop_ids: ids that end a completion; None = the tokenizer's EOS.
      forbidden: ids that the policy must never draw, such as the padding.
      require_end: whether a completion that was cut off at the length limit gets at most 0.
    Raises:
      ConfigError: `train` or `heldout` is empty, or a prompt has no token or one beyond the vocabulary.
    """
    width = max((len(tokenizer.encode(prompt)) for prompt, _ in [*train, *heldout]), default=0)
    return Task(
        name=name,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        forbidden=tuple(sorted({*forbidden, tokenizer.pad_token_id})),
        stop_ids=(tokenizer.eos_token_id,) if stop_ids is None else tuple(stop_ids),
        train=_dataset("train", train, tokenizer, vocab_size, width),
        heldout=_dataset("heldout", heldout, tokenizer, vocab_size, width),
        reward_fn=function_reward(reward, tokenizer, require_end),
        demonstrations=_no_demonstrations,
        encode_prompt=_prompt_encoder(tokenizer),
    )


def _prompt_encoder(tokenizer: Tokenizer) -> PromptEncoder:
    """The encoder of a prompt, which must be text: there is no chat template."""

    def encode(prompt: object) -> list[int]:
        if not isinstance(prompt, str):
            raise TypeError(f"{prompt!r} is no text")
        return tokenizer.encode(prompt)

    return encode


def _dataset(
    part: str, examples: Sequence[Example], tokenizer: Tokenizer, vocab_size: int, width: int
) -> PromptDataset:
    if not examples:
        raise ConfigError(f"{part}: holds no prompts; give at least one (prompt, answer) pair")
    rows = [tokenizer.encode(prompt) for prompt, _ in examples]
    for (prompt, _), row in zip(examples, rows, strict=True):
        if not row or max(row) >= vocab_size:
            raise ConfigError(f"{part}: the prompt {prompt!r} has no token, or one beyond vocab_size={vocab_size}")
    tokens, lengths = pad_rows(rows, width, tokenizer.pad_token_id)
    return PromptDataset(tokens, lengths, [answer for _, answer in examples], [prompt for prompt, _ in examples])


def _no_demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
    raise ConfigError("sft.steps: a task of your own has no demonstrations; set sft.steps 0, or name a file: sft.data")
