"""Writing checkpoints: folders that transformers, PEFT, vLLM and lighteval load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pspo_jax.config.fields import ConfigError
from pspo_jax.model.architecture import Architecture, Vision
from pspo_jax.model.huggingface.json_files import Json
from pspo_jax.model.huggingface.load import Source, read_tensor
from pspo_jax.model.weights import entries, lora_table, peft_module, projections, table, to_hf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a tokenizer and of an image processor, which are copied as they are."""
SHARD_BYTES = 4 * 2**30
"""Bytes of a shard at most, unless a single tensor has more."""

Tensors = Iterator[tuple[str, np.ndarray]]
"""(Hugging Face name, value) of each tensor. They are made one by one, so that only a shard is in memory at a time."""


class DtypeOf(Protocol):
    """The type in which the tensor of a Hugging Face name is written."""

    def __call__(self, name: str, /) -> np.dtype: ...


def write_folder(out: Path, fill: Callable[[Path], object], replace: bool = False) -> None:
    """Make a folder atomically: `fill` writes into a folder beside it, which takes its name when it is complete.

    After a failure, nothing is left, so that a full disk has its room back.

    Args:
      fill: is called with the folder to write into.
      replace: whether an existing folder is replaced.
    Raises:
      ConfigError: `out` exists, or cannot be written.
    """
    if out.is_symlink() or (out.exists() and not replace):
        raise ConfigError(f"--out {out}: exists already; name a new folder")
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        fill(partial)
        if replace:
            shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {error.strerror or error}; nothing was kept, name a folder that can be written and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def whole_tensors(a: Architecture, source: Source | None, params: PyTree[Array], dtype: DtypeOf) -> Tensors:
    """Params without adapters as the tensors of a checkpoint, each cast once to `dtype(name)`.

    Args:
      source: has the tensors that did not train; None = all trained.
    """
    values = dict(_paths(params))
    for path, name, w, layer in entries(table(a)):
        if path in values:
            value = np.asarray(values[path] if layer is None else values[path][layer])
            yield name, to_hf(w, value).astype(dtype(name))
        else:
            assert source is not None
            yield name, np.ascontiguousarray(read_tensor(source.tensors[name]).astype(dtype(name)))


def merged_tensors(a: Architecture, source: Source, adapter: PyTree[Array], dtype: DtypeOf) -> Tensors:
    """The tensors of the source with the adapters added: W + alpha / rank B A, computed in float32 and cast once."""
    assert a.lora is not None
    low = dict(adapter_tensors(a, adapter))
    for _, name, _, _ in entries(table(a)):
        value = read_tensor(source.tensors[name])
        stem = peft_module(a, name.removesuffix(".weight"))
        if f"{stem}.lora_A.weight" in low:
            down, up = low[f"{stem}.lora_A.weight"], low[f"{stem}.lora_B.weight"]
            value = value.astype(np.float32) + np.float32(a.lora.scale) * (up @ down)
        yield name, np.ascontiguousarray(value.astype(dtype(name)))


def stored_names(tensors: Tensors, source: Source) -> Tensors:
    """The tensors by the names that they have in the files of the source."""
    return ((source.tensors[name].name, value) for name, value in tensors)


def adapter_tensors(a: Architecture, adapter: PyTree[Array]) -> Tensors:
    """Adapters in float32, with PEFT's names and layout."""
    values = dict(_paths(adapter))
    for path, name, w, layer in entries(lora_table(a)):
        yield name, to_hf(w, np.asarray(values[path][layer], np.float32))


def _paths(tree: PyTree[Array]) -> list[tuple[str, Array]]:
    """(path, array) of each leaf."""
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def write_tensors(folder: Path, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (or one tensor) and their index."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        _save(held, folder / f"shard-{len(shards)}")
        shards.append(list(held))
        held.clear()

    for name, value in tensors:
        if held and sum(x.nbytes for x in held.values()) + value.nbytes > shard_bytes:
            flush()
        held[name] = value
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_adapter(folder: Path, a: Architecture, adapter: PyTree[Array], base: str) -> None:
    """Write adapters as PEFT does, into adapter_config.json and adapter_model.safetensors.

    Args:
      base: folder or hub id of the base model.
    """
    assert a.lora is not None
    modules = [projections(a)[name][0] for name in a.lora.targets]
    last_names = [module.rpartition(".")[2] for module in modules]
    # PEFT would find names such as gate_proj in the vision tower too; a pattern matches whole names.
    pattern = rf"model\.language_model\.layers\.\d+\.({'|'.join(map(re.escape, modules))})"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.lora.rank,
        "lora_alpha": a.lora.alpha,
        "lora_dropout": a.lora.dropout,
        "target_modules": last_names if a.vision is None else pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    _save(dict(adapter_tensors(a, adapter)), folder / "adapter_model.safetensors")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file with the permissions of its folder; the library would make it private to its owner."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # The library raises it where the disk is full.
        raise OSError(" ".join(str(error).split())) from error
    path.chmod(path.parent.stat().st_mode & 0o666)


def copy_files(folder: Path, source: Path, names: tuple[str, ...]) -> None:
    """Copy the files that exist; the others are left out."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def set_dtype(folder: Path, dtype: str) -> None:
    """Set the type of the tensors in config.json, under the key that it has."""
    config = json.loads((folder / "config.json").read_text())
    set_config(folder, {"torch_dtype" if "torch_dtype" in config else "dtype": dtype})


def set_config(folder: Path, fields: dict[str, Json]) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def set_stop_ids(folder: Path, stop_ids: Sequence[int], pad_id: int) -> None:
    """Set the ids that end a completion in generation_config.json, and the pad id if it has none."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config = {"pad_token_id": pad_id} | config | {"eos_token_id": list(stop_ids)}
    path.write_text(json.dumps(config, indent=2))


def built_in_config(
    a: Architecture,
    theta: float,
    stop_ids: tuple[int, ...],
    pad_id: int,
    image_ids: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Json]:
    """The config.json of a built-in model that was not read from a checkpoint; with a vision tower, Qwen2.5-VL's.

    Args:
      theta: base of the rotary frequencies.
      stop_ids: ids that end a completion.
      image_ids: the ids of images by the names of their fields, for a model with a vision tower.
    Raises:
      ConfigError: no family has this combination of options.
    """
    if a.vision is not None:
        return _visual_config(a, a.vision, theta, stop_ids, pad_id) | dict(image_ids)
    family = {((), "none"): "Llama", (("q", "k", "v"), "none"): "Qwen2", ((), "head"): "Qwen3"}.get(
        (a.biases, a.qk_norm)
    )
    if family is None:
        raise ConfigError("model.qkv_bias with model.qk_norm: no family of checkpoints has both; it cannot be exported")
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": a.vocab_size,
        "hidden_size": a.width,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "rope_theta": theta,
        "tie_word_embeddings": a.tied,
        "attention_bias": False,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "dtype": a.param_dtype,
    }


def _visual_config(a: Architecture, v: Vision, theta: float, stop_ids: tuple[int, ...], pad_id: int) -> dict[str, Json]:
    """The config.json of Qwen2.5-VL for a built-in model, without the ids of images."""
    if a.biases != ("q", "k", "v") or a.qk_norm != "none" or a.head_dim * a.heads != a.width:
        raise ConfigError(
            f"model.qkv_bias={'q' in a.biases}, model.qk_norm={a.qk_norm != 'none'}, model.head_dim={a.head_dim}: "
            "Qwen2.5-VL has biases of q, k and v, no norms of them, and heads that share model.width; another model "
            "with a vision tower cannot be exported"
        )
    text: dict[str, Json] = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": a.vocab_size,
        "hidden_size": a.width,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": theta,
            "mrope_section": [a.rotaries[0].axes.count(axis) for axis in range(3)],
        },
        "tie_word_embeddings": a.tied,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "bos_token_id": None,
        "dtype": a.param_dtype,
    }
    tower: dict[str, Json] = {
        "model_type": "qwen2_5_vl",
        "depth": v.layers,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_width,
        "num_heads": v.heads,
        "hidden_act": "silu",
        "in_channels": v.channels,
        "patch_size": v.patch,
        "temporal_patch_size": v.frames,
        "spatial_merge_size": v.layout.merge,
        "window_size": v.layout.window * v.patch,
        "fullatt_block_indexes": list(v.whole_image),
        "out_hidden_size": a.width,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": a.tied,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "dtype": a.param_dtype,
    }


def built_in_processor(v: Vision, min_pixels: int, max_pixels: int) -> dict[str, Json]:
    """The preprocessor_config.json of a built-in vision tower.

    Args:
      min_pixels: smallest number of pixels of an image.
      max_pixels: largest number of pixels of an image.
    """
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "patch_size": v.patch,
        "temporal_patch_size": v.frames,
        "merge_size": v.layout.merge,
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of a safetensors ("BF16") or config ("bfloat16") name."""
    return jnp.dtype({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(name, name))
