"""Greedy completions by transformers and torch, and their comparison with those of an evaluation here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 16
"""Number of prompts that transformers completes at a time."""


class Answer(NamedTuple):
    """The greedy completions of one problem."""

    problem: int
    prompt: str
    gold: str
    right: float | None
    """The verdict on `here`; None = no verdict."""
    here: str
    """The completion in the evaluation's file, with its special tokens."""
    there: str
    """The completion of transformers."""


def load(folder: Path, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder in Hugging Face's format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, stop_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    """The greedy tokens of each prompt, up to the first stop id and including it. `stop_ids` may be empty.

    Prompts are sorted by length and padded on the left, where the mask hides the padding, so that little is padded.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for batch in [order[i : i + ROWS] for i in range(0, len(order), ROWS)]:
        width = len(prompts[batch[-1]])
        tokens = torch.tensor([[pad_id] * (width - len(prompts[i])) + list(prompts[i]) for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        with torch.no_grad():
            made = model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=pad_id,
            )
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in stop_ids]
            out[i] = row[: ends[0] + 1] if ends else row
    return out


def stop_ids_of(folder: Path) -> list[int]:
    """The ids under eos_token_id in generation_config.json."""
    value = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def answers(folder: Path, results: Path, new_tokens: int, stop: Sequence[int] = ()) -> list[Answer]:
    """The problems of an evaluation, with the greedy completions of transformers beside those in the file.

    Args:
      folder: a checkpoint in Hugging Face's format.
      results: JSONL of `python -m pspo_jax.evaluate --temperature 0` for the same weights.
      new_tokens: the evaluation's largest number of tokens.
      stop: ids that end a completion, besides those of generation_config.json.
    """
    model, tokenizer = load(folder)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()][1:]
    prompts = [tokenizer.encode(line["prompt"], add_special_tokens=False) for line in lines]
    stop_ids = [*stop_ids_of(folder), *stop]
    pad = stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    made = greedy(model, prompts, new_tokens, stop_ids, pad)
    return [
        Answer(
            problem=line["problem"],
            prompt=line["prompt"],
            gold=line["answer"],
            right=line["right"][0],
            here=line["completions"][0],
            there=tokenizer.decode(tokens, skip_special_tokens=False),
        )
        for line, tokens in zip(lines, made, strict=True)
    ]


def main(argv: Sequence[str]) -> int:
    """Print, as JSON, the answers of an exported folder beside those of its run's evaluation."""
    folder, results, new_tokens = Path(argv[0]), Path(argv[1]), int(argv[2])
    print(json.dumps([answer._asdict() for answer in answers(folder, results, new_tokens)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
