"""Checkpoints of random weights, written by transformers, and what torch computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is a test dependency; install '.[test]'")
torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(
    folder: Path, model_type: str, seed: int = 0, dtype: Any = None, shards: str = "5GB", **fields: Any
):
    """A torch model of random weights, saved to `folder`; norms and biases are random too, so that they are tested."""
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | fields))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    spread(model)
    model = model.to(dtype or torch.float32)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def spread(model: Any) -> None:
    """Make norms and biases of a torch model random and its matrices larger, so that mistakes in any of them show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(4 if "embed" not in name else 20)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens)).long()).logits.float().numpy()


def torch_greedy(model: Any, tokens: np.ndarray, lengths: np.ndarray, count: int, left: bool) -> np.ndarray:
    """`count` greedy tokens of each right-padded prompt, through generate on left- or right-padded copies."""
    width = tokens.shape[1]
    mask = np.arange(width) < lengths[:, None]
    if left:
        tokens = np.stack([np.roll(row, width - n) for row, n in zip(tokens, lengths, strict=True)])
        mask = mask[:, ::-1].copy()
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        if left:
            out = model.generate(
                torch.as_tensor(tokens).long(), attention_mask=torch.as_tensor(mask).long(), **settings
            )
            return out[:, width:].numpy()
        rows = [
            model.generate(torch.as_tensor(r[None, :n]).long(), **settings)[0, n:]
            for r, n in zip(tokens, lengths, strict=True)
        ]
        return np.stack([r.numpy() for r in rows])


VOCABULARIES = {
    "qwen2.5": {"vocab_size": 151_936, "bos_token_id": 151_643, "eos_token_id": 151_645},
    "qwen2.5-small": {"vocab_size": 4352, "bos_token_id": 4096, "eos_token_id": 4098},
}
"""Fields of a checkpoint's config, by the folder of its tokenizer."""
TWO, FIVE = 17, 20
"""The ids of "2" and "5" in both."""


def write_talker(folder: Path, tokenizer: Path, layers: int = 4) -> None:
    """Write a Qwen2 of random weights that says little but "2", "5" and the end of its turn.

    The first dimension of every embedding is a constant, larger for these tokens: with a tied head their logits rise.
    """
    from safetensors.numpy import load_file, save_file

    from scripts.make_checkpoint import SHAPES, make

    fields = VOCABULARIES[tokenizer.name]
    make(folder, SHAPES["tiny"] | fields | {"num_hidden_layers": layers}, "float32", tokenizer, config_only=False)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0.5
    embedding[[TWO, FIVE, fields["eos_token_id"]], 0] = 2.5
    save_file(tensors, path, metadata={"format": "pt"})
