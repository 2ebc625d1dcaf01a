"""Writing a run, or one of its checkpoints, as a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from jaxtyping import PyTree

from pspo_jax.checkpoint.reading import read_params, saved_steps
from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.synthetic import segments
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.huggingface.hub import create_repository, upload
from pspo_jax.model.huggingface.save import (
    TOKENIZER_FILES,
    built_in_config,
    built_in_processor,
    copy_files,
    merged_tensors,
    numpy_dtype,
    set_config,
    set_dtype,
    set_stop_ids,
    stored_names,
    whole_tensors,
    write_adapter,
    write_folder,
    write_tensors,
)
from pspo_jax.model.weights import entries, table
from pspo_jax.runs.access import metrics_of
from pspo_jax.runs.home import home_of
from pspo_jax.training.architectures import architecture_for


def exporter(config: Config, run: Path, dtype: str | None, adapter_only: bool) -> Callable[[Path, int], None]:
    """`write(folder, step)` for the checkpoints of a run; what cannot be exported is refused here."""
    _, _, architecture = architecture_for(config)
    if adapter_only and architecture.lora is None:
        raise ConfigError("--adapter-only: this run trained all weights (lora.rank=0); leave it out")

    def write(folder: Path, step: int) -> None:
        params, metadata = read_params(home_of(run) / "checkpoints", step, alone=True)
        write_model(folder, config, params, dtype, adapter_only, metadata.get("source"))
        card = model_card(config, run, step, adapter_only)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def write_model(
    folder: Path,
    config: Config,
    params: PyTree,
    dtype: str | None = None,
    adapter_only: bool = False,
    began_from: str | None = None,
) -> None:
    """Write trained params to a folder in Hugging Face's format, with config and tokenizer.

    Args:
      params: on the host or one device.
      dtype: of the tensors; None = each tensor's in the source.
      adapter_only: adapters in PEFT's layout, not merged.
      began_from: fingerprint of the checkpoint that training began from; None = the config's is known to be it.
    Raises:
      ConfigError: model.source is another checkpoint.
    """
    source, tokenizer, architecture = architecture_for(config)
    if source is not None and began_from not in (None, source.fingerprint()):
        raise ConfigError(
            f"model.source={source.name}: is not the checkpoint that this run began from (another config, or "
            "other tensors); name the right one with --base"
        )

    def dtype_of(name: str) -> np.dtype:
        stored = source.tensors[name].dtype if source else architecture.param_dtype
        return numpy_dtype(dtype or stored)

    if architecture.lora is not None and not adapter_only and (line := rounding(architecture, dtype_of)):
        print(line, file=sys.stderr)
    if adapter_only:
        assert source is not None
        write_adapter(folder, architecture, params, source.name)
    elif source is not None:
        adapted = architecture.lora is not None
        tensors = (merged_tensors if adapted else whole_tensors)(architecture, source, params, dtype_of)
        write_tensors(folder, stored_names(tensors, source))
    else:
        write_tensors(folder, whole_tensors(architecture, None, params, dtype_of))
    if source is not None and not adapter_only:
        copy_files(folder, source.folder, ("config.json", "generation_config.json"))
        set_stop_ids(folder, _stop_ids(tokenizer), tokenizer.pad_token_id)
        if dtype:
            set_dtype(folder, dtype)
        if source.untied:  # config.json claims otherwise, and loaders that believe it would drop the head
            set_config(folder, {"tie_word_embeddings": False})
    elif source is None:
        _write_built_in(folder, config, architecture, tokenizer, dtype)
    if hasattr(tokenizer, "folder"):
        copy_files(folder, tokenizer.folder, TOKENIZER_FILES)


def _stop_ids(tokenizer: TextTokenizer | CharTokenizer) -> tuple[int, ...]:
    """Ids that ended completions in training."""
    return tuple(getattr(tokenizer, "stop_ids", (tokenizer.eos_token_id,)))


def rounding(a: Architecture, dtype_of: Callable[[str], np.dtype]) -> str | None:
    """A line on merged weights that are written in fewer bits than they are trained in; None if none are.

    Args:
      dtype_of: type in which the tensor of a name is written.
    """
    assert a.lora is not None
    merged = [name for path, name, _, _ in entries(table(a)) if path.split("'")[-2] in a.lora.targets]
    types = sorted({str(dtype_of(name)) for name in merged} - {"float32"})
    if not types:
        return None
    return (
        f"adapters are merged into {' and '.join(types)}, whose rounding changes some greedy texts after short runs; "
        "--dtype float32 keeps all of them, and --adapter-only leaves the base as it is"
    )


def _write_built_in(
    folder: Path,
    config: Config,
    architecture: Architecture,
    tokenizer: TextTokenizer | CharTokenizer,
    dtype: str | None,
) -> None:
    """config.json, generation_config.json and, for a task with an alphabet of its own, its tokenizer."""
    stop_ids = _stop_ids(tokenizer)
    image_ids = segments.IMAGE_IDS if config.task.name == "segments" else {}
    hf = built_in_config(architecture, config.model.rope_theta, stop_ids, tokenizer.pad_token_id, image_ids)
    (folder / "config.json").write_text(json.dumps(hf | ({"dtype": dtype} if dtype else {}), indent=2))
    generation = {"eos_token_id": list(stop_ids), "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if architecture.vision is not None:
        bounds = segments.PROCESSOR.min_pixels, segments.PROCESSOR.max_pixels
        processor = built_in_processor(architecture.vision, *bounds)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    if hasattr(tokenizer, "to_hf"):
        tokenizer.to_hf().save_pretrained(folder)


def model_card(config: Config, run: Path, step: int, adapter_only: bool) -> str:
    """README.md of an export: base, data, algorithm, metrics, config."""
    lines = [line for line in metrics_of(run) if line["step"] <= step]
    shown: dict[str, float] = {}
    for line in lines:
        shown |= {
            k: v for k, v in line.items() if v is not None and k.startswith(("eval/", "reward", "rollouts/total"))
        }
    library = "peft" if adapter_only else "transformers"
    head: dict[str, object] = {"library_name": library, "tags": ["pspo_jax", config.algorithm.name]}
    if config.model.source is not None and not Path(config.model.source).expanduser().exists():
        head["base_model"] = config.model.source  # the hub refuses a card whose base is no id of a model
    table = "".join(f"| {k} | {v:.4g} |\n" for k, v in sorted(shown.items()))
    base = config.model.source or "random weights"
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.resolve().name}, step {step}\n\n"
        f"Trained with pspo_jax: {config.algorithm.name} on {config.task.name}"
        f"{f' ({config.task.train_data})' if config.task.train_data else ''}, from {base}"
        f"{f', LoRA of rank {config.lora.rank}' if config.lora.rank else ''}.\n\n"
        f"## Metrics\n\nLatest values up to this step.\n\n| Metric | Value |\n|---|---|\n{table}\n"
        f"## Config\n\n```yaml\n{command_line.to_yaml(config)}```\n"
    )


class Publish(Protocol):
    """Uploads an exported folder, as one commit with this message, and prints the address of its page."""

    def __call__(self, folder: Path, message: str, /) -> None: ...


def publisher(push_to: str | None, private: bool) -> Publish:
    """The upload of an export; without an id, one that does nothing.

    The repository is made here, so that a token that may not write is refused before anything is computed.

    Args:
      push_to: id of the repository.
      private: whether only its owner may see it.
    """
    if push_to is None:
        if private:
            raise ConfigError("--private: belongs to --push-to, which is missing; name a repository, or leave it out")
        return lambda folder, message: None
    full_id = create_repository(push_to, private)

    def publish(folder: Path, message: str) -> None:
        print(upload(folder, full_id, message))

    return publish


def copy_finished_model(args: argparse.Namespace) -> bool:
    """Whether the run is one of supervised fine-tuning alone, whose only model has been copied."""
    model = args.run / "model"
    if not model.is_dir() or saved_steps(home_of(args.run) / "checkpoints"):
        return False
    for flag, value in (("--dtype", args.dtype), ("--adapter-only", args.adapter_only), ("--base", args.base)):
        if value:
            raise ConfigError(f"{flag}: {args.run} holds one finished model, which is copied as it is; leave it out")
    if args.step not in ("latest", "best"):
        raise ConfigError(f"--step {args.step}: {args.run} holds one finished model and no steps; leave it out")
    refuse_existing(args.out)
    publish = publisher(args.push_to, args.private)
    write_folder(args.out, lambda folder: shutil.copytree(model, folder, dirs_exist_ok=True))
    print(args.out)
    publish(args.out, f"Upload the model of {args.run.resolve().name}")
    return True


def refuse_existing(out: Path) -> None:
    """Raise ConfigError if the folder to write exists."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name a new folder")
