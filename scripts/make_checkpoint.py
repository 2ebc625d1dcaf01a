"""Write a checkpoint of random weights in Hugging Face's format, for tests, plans and benchmarks.

python scripts/make_checkpoint.py OUT --shape NAME [--tokenizer DIR] [--dtype bfloat16] [--config-only] [--force]

An existing folder is left alone; --force replaces it if this script made it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.huggingface.load import read_source
from pspo_jax.model.huggingface.save import TOKENIZER_FILES, copy_files, write_tensors
from pspo_jax.model.weights import entries, table

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}


def shape(layers: int, width: int, mlp: int, heads: int, kv_heads: int, tied: bool) -> dict[str, object]:
    return QWEN2 | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": shape(4, 64, 128, 4, 2, True),
    "qwen2.5-0.5b": shape(24, 896, 4864, 14, 2, True),
    "qwen2.5-1.5b": shape(28, 1536, 8960, 12, 2, True),
    "r1-distill-qwen-1.5b": shape(28, 1536, 8960, 12, 2, False),
    "qwen2.5-3b": shape(36, 2048, 11008, 16, 2, True),
    "qwen2.5-7b": shape(28, 3584, 18944, 28, 4, False) | {"vocab_size": 152_064},
}
"""`tiny` has the real vocabulary, and little else."""


MARK = ".made-by-make_checkpoint"
"""File by which a folder of this script is known."""


def clear(out: Path, force: bool) -> None:
    """Make room for the folder.

    Raises:
      ConfigError: the folder exists and must not be replaced, or this script did not make it.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ConfigError(f"{out}: exists already; name a new folder, or replace it with --force")
    if out.is_symlink() or not (out / MARK).is_file():
        raise ConfigError(f"{out}: was not made by this script, so --force leaves it alone; name a new folder")
    shutil.rmtree(out)


def make(out: Path, config: dict[str, object], dtype: str, tokenizer: Path | None, config_only: bool) -> None:
    """Write the folder: weights are normal with standard deviation 0.02, norms are one, biases are zero."""
    out.mkdir(parents=True)
    (out / MARK).write_text("random weights, made by scripts/make_checkpoint.py\n")
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2))
    stop_ids = [i for i in (config["eos_token_id"], config["bos_token_id"]) if i is not None]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids, "pad_token_id": stop_ids[-1]}))
    if tokenizer:
        copy_files(out, tokenizer, TOKENIZER_FILES)
    if config_only:
        return
    source = read_source(ModelConfig(source=str(out)), weights=False)
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for _, name, w, _ in entries(table(source.architecture)):
            if w.std == 0:
                yield name, np.full(w.hf_shape, w.fill, jnp.dtype(dtype))
            else:
                yield name, (0.02 * rng.standard_normal(w.hf_shape, np.float32)).astype(jnp.dtype(dtype))

    write_tensors(out, tensors(), shard_bytes=2**30)


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--config-only", action="store_true", help="no weights: enough for --plan")
    parser.add_argument("--force", action="store_true", help="replace a folder that this script made")
    args = parser.parse_args(argv)
    if args.tokenizer and not any((args.tokenizer / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"--tokenizer {args.tokenizer}: holds no tokenizer; name a folder with a tokenizer.json")
    try:
        clear(args.out, args.force)
        make(args.out, SHAPES[args.shape], args.dtype, args.tokenizer, args.config_only)
    except OSError as error:
        raise ConfigError(f"{args.out}: {error.strerror or error}; name a folder that can be written") from error
    print(args.out)
    return 0


if __name__ == "__main__":
    command_line.run(main, "make_checkpoint.py")
