"""The message for a path that is not a checkpoint: its contents, and the remedy."""

from __future__ import annotations

from pathlib import Path

_CONVERT = "save it as safetensors, by transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def what_it_is(path: Path) -> str:
    """The contents of a path that is not a checkpoint, and the remedy, in one line.

    Args:
      path: a file, or a folder without config.json or without *.safetensors.
    """
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        kind = "is a GGUF file" if path.suffix == ".gguf" else "holds GGUF files"
        return f"{kind}, quantised weights for inference; name the checkpoint in safetensors that they were made from"
    if not path.is_dir():
        return "is a file; name the folder of a checkpoint, with its config.json and *.safetensors"
    if (path / "adapter_config.json").exists():
        return (
            "holds adapters (adapter_config.json) and no model; merge them into their base, by PEFT's "
            "merge_and_unload(), and name that folder"
        )
    has_config, has_weights = (path / "config.json").exists(), any(path.glob("*.safetensors"))
    pickled = next((p.name for pattern in _PICKLES for p in sorted(path.glob(pattern))), None)
    if pickled is not None and not has_weights:
        return f"holds no *.safetensors file, but {pickled}, pickled weights that are not read; {_CONVERT}"
    if has_config:
        return "holds no *.safetensors file, only its config.json; fetch the weights too"
    if (path / "config.yaml").exists() and ((path / "checkpoints").exists() or (path / "cold_start").exists()):
        return "is a run folder; write its checkpoint by python -m pspo_jax.export --run RUN --out DIR, and name DIR"
    if not any(path.iterdir()):
        return "is an empty folder; name the folder of a checkpoint, or a hub id such as Qwen/Qwen2.5-0.5B"
    if has_weights:
        return "holds *.safetensors files and no config.json: No such file; fetch the model's config.json too"
    inside = next((p.parent for p in sorted(path.glob("*/config.json"))), None)
    if inside is not None:
        return f"holds no config.json, but its folder {inside.name} does; name {path / inside.name}"
    if any((path / name).exists() for name in _TOKENIZERS):
        return "holds a tokenizer and no model; name the model's folder (model.tokenizer is the field for a tokenizer)"
    return "holds no config.json: No such file; name the folder of a checkpoint, with config.json and *.safetensors"
