"""The reward of tasks whose completions end in a number: whether it is the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.task import CompletionBatch, RewardResult


def last_number(batch: CompletionBatch, tokenizer: CharTokenizer) -> Callable[[], RewardResult]:
    """1 if a completion ends in EOS and the text after its last `=` is the answer, else 0."""
    b, g = batch.lengths.shape
    verdicts = np.zeros((b, g), np.float32)
    answers: list[list[str | None]] = []
    for i in range(b):
        answer = batch.prompts.answers[int(batch.rows[i])]
        answers.append([])
        for j in range(g):
            ids = batch.tokens[i, j, : batch.lengths[i, j]].tolist()
            _, equals, found = tokenizer.decode(ids).removesuffix("$").rpartition("=")
            answers[-1].append(found if equals else None)
            verdicts[i, j] = bool(ids) and ids[-1] == tokenizer.eos_token_id and bool(equals) and found == answer
    return lambda: RewardResult(verdicts, {"accuracy": verdicts}, verdicts, answers, Counter())
