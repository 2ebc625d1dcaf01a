"""Reading checkpoints: from a Hugging Face folder or hub id to an architecture, and to weights on their devices.

No weight is loaded before everything has been checked: the config, the name and shape of every tensor, and the length
of every file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.huggingface.families import FAMILIES, HfConfig, architecture_of, unknown_family
from pspo_jax.model.huggingface.hub import Repository, download
from pspo_jax.model.huggingface.json_files import check_side_files, read_json, read_model_config
from pspo_jax.model.huggingface.not_a_checkpoint import what_it_is
from pspo_jax.model.huggingface.vision_config import with_processor
from pspo_jax.model.weights import Weight, entries, from_hf, is_weight, table

_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Patterns of the files that are fetched from the hub."""
_DTYPES = ("F32", "F16", "BF16")
"""Supported types of tensors, as safetensors names them."""
_ROWS_AT_A_TIME = 4096
"""Rows of a matrix that are read at a time where two matrices are compared."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Tensor(NamedTuple):
    """The place and form of a tensor of a checkpoint."""

    name: str
    """Name in its file."""
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Type as safetensors names it, such as BF16."""


class Source(NamedTuple):
    """A checkpoint whose config and tensor headers have been read and agree."""

    name: str
    """model.source, as the user gave it."""
    folder: Path
    architecture: Architecture
    """The architecture, without adapters; its forbidden ids are those of images alone."""
    tensors: dict[str, Tensor]
    """The tensors by their names in `weights.table`; empty if only the config was read."""
    untied: bool = False
    """Whether config.json ties the head to the embedding although another head is stored; `architecture` has that
    head."""

    def fingerprint(self) -> str:
        """Hash of config.json and of the name, shape and type of every tensor, but not of their numbers."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}{tensor.shape}{tensor.dtype}".encode())
        return digest.hexdigest()[:16]


def import_transformers() -> ModuleType:
    """The library transformers, without its advice to install PyTorch: only its configs and tokenizers are used."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def fetch(name: str, revision: str | None, field: str, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the cache of huggingface_hub.

    Args:
      name: a folder or a hub id.
      revision: branch, tag or commit on the hub; None = the main branch.
      field: the config field that holds the name, for messages.
      weights: whether the safetensors files are wanted too.
    Raises:
      ConfigError: there is no such folder, and the hub has no such id, or refuses it.
      StorageError: there is no such folder, and the hub does not answer now.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.suffix == ".gguf":
        raise ConfigError(f"{field}={name}: {what_it_is(folder)}")
    if not _HUB_ID.fullmatch(name) or name.startswith(("./", "../")):
        raise ConfigError(f"{field}={name}: no such folder; name a folder or a hub id such as Qwen/Qwen2.5-0.5B")
    patterns = [pattern for pattern in _DOWNLOADED if weights or pattern != "*.safetensors"]
    return download(Repository(name, field, revision), patterns)


def read_source(model: ModelConfig, weights: bool = True) -> Source:
    """The checkpoint `model.source`, read and checked up to its weights, which are not loaded.

    Args:
      weights: whether tensors are looked for; False = the config is enough, as for a plan.
    Raises:
      ConfigError: something is missing, left over, of a wrong shape, cut off or not supported; the message names it.
    """
    assert model.source is not None
    name = model.source
    folder = fetch(name, model.revision, "model.source", weights)
    architecture = architecture_of(_read_config(folder, name), model, name)
    check_side_files(folder, f"model.source={name}", ("generation_config.json",))
    tensors = _read_headers(folder, name) if weights else {}
    if architecture.vision is not None:
        vision = with_processor(architecture.vision, folder, name)
        architecture = dataclasses.replace(architecture, vision=vision)
        tensors = _released_names(tensors, name)
    untied = architecture.tied and _has_own_head(tensors)
    architecture = dataclasses.replace(architecture, tied=architecture.tied and not untied)
    if weights:
        _match(architecture, tensors, name)
    return Source(name, folder, architecture, tensors, untied)


class Classifier(NamedTuple):
    """A sequence-classification checkpoint with one label, such as a reward model."""

    source: Source
    """The checkpoint without its head: the architecture is of a language model with a tied head, which is not used."""
    score: Tensor
    """The head, a matrix of one row."""
    pad_id: int | None
    """Id of padding by config.json, behind which no score is taken; None = it has none."""


def read_classifier(name: str, model: ModelConfig, field: str) -> Classifier:
    """A sequence-classification checkpoint, read and checked as `read_source` does it.

    Args:
      name: a folder or a hub id.
      model: gives the compute type, in which its weights are held too.
      field: the config field that holds the name, for messages.
    Raises:
      ConfigError: as `read_source`, or the checkpoint has no head of one label.
    """
    with errors_of(field, name):
        folder = fetch(name, None, field)
        config = _read_config(folder, name)
        labels = getattr(config, "num_labels", None)
        tensors = _read_headers(folder, name)
        score = tensors.pop("score.weight", None)
        if score is None or labels != 1:
            found = "lacks score.weight" if score is None else f"has {labels} labels"
            raise ConfigError(
                f"{found}; name a checkpoint of transformers' ...ForSequenceClassification with one label"
            )
        dtype = model.compute_dtype or "float32"
        own = dataclasses.replace(model, source=name, param_dtype=dtype, remat="none")
        architecture = dataclasses.replace(architecture_of(config, own, name), tied=True)
        if architecture.vision is not None:
            raise ConfigError("has a vision tower; name a reward model of text")
        _match(architecture, tensors, name)
        if score.shape != (1, architecture.width) or score.dtype not in _DTYPES:
            raise ConfigError(
                f"score.weight is {score.dtype} {list(score.shape)}, config.json implies [1, {architecture.width}]"
            )
    return Classifier(Source(name, folder, architecture, tensors), score, getattr(config, "pad_token_id", None))


@contextmanager
def errors_of(field: str, name: str) -> Iterator[None]:
    """A context in which errors about model.source name another field, whose value is `name`."""
    try:
        yield
    except ConfigError as error:
        text = str(error).replace(f"model.source={name}", f"{field}={name}")
        stage = f"{field.partition('.')[0]}."
        raise ConfigError(text if text.startswith(stage) else f"{field}={name}: {text}") from error


def _has_own_head(tensors: dict[str, Tensor]) -> bool:
    """Whether a checkpoint stores a head that differs from its embedding."""
    names = "lm_head.weight", "model.embed_tokens.weight"
    if not all(name in tensors for name in names):
        return False
    head, embedding = (tensors[name] for name in names)
    if head.shape != embedding.shape or len(head.shape) != 2 or not {head.dtype, embedding.dtype} <= set(_DTYPES):
        return True
    parts = (_rows_of(tensors[name]) for name in names)
    return any(not np.array_equal(x, y) for x, y in zip(*parts, strict=True))


def _read_config(folder: Path, name: str) -> HfConfig:
    """config.json as transformers reads it, after the checks of `read_model_config`."""
    where = f"model.source={name}"
    if not (folder / "config.json").exists():
        raise ConfigError(f"{where}: {what_it_is(folder)}")
    model_type = str(read_model_config(folder, where)["model_type"])
    if model_type not in FAMILIES:
        raise ConfigError(unknown_family(model_type, name))
    from huggingface_hub.errors import StrictDataclassError

    try:
        return import_transformers().AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: config.json cannot be read: {reason}") from error


def _read_headers(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from the headers of its files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for file in _weight_files(folder, name):
        path = folder / file
        try:
            with safe_open(path, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    part = opened.get_slice(key)
                    if key in found:
                        raise ConfigError(
                            f"model.source={name}: {key} stands in {found[key].file.name} and in {file}; remove the "
                            "file that is not the model's"
                        )
                    found[key] = Tensor(key, path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"model.source={name}: {file} is damaged or cut off ({' '.join(str(error).split())}); fetch it again"
            ) from error
    return found


def _released_names(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a model with a vision tower by the names that released files give them.

    Some files have the names of transformers' modules instead: model.language_model.* for model.*, and model.visual.*
    for visual.*.

    Raises:
      ConfigError: names of both layouts occur.
    """
    found: dict[str, Tensor] = {}
    example: dict[bool, str] = {}
    for name, tensor in tensors.items():
        renamed = name
        for inner, released in (("model.language_model.", "model."), ("model.visual.", "visual.")):
            if name.startswith(inner):
                renamed = released + name.removeprefix(inner)
        if name.startswith(("model.", "visual.")):
            example.setdefault(renamed != name, name)
        found[renamed] = tensor
    if len(example) > 1:
        raise ConfigError(
            f"model.source={where}: the checkpoint mixes two layouts of names, as in {example[False]} and "
            f"{example[True]}; fetch it again, or save it anew by transformers' save_pretrained"
        )
    return found


def _weight_files(folder: Path, name: str) -> list[str]:
    """Names of the files that hold a checkpoint's tensors: model.safetensors, those of its index, or all there are."""
    index, whole = folder / "model.safetensors.index.json", "model.safetensors"
    if not index.exists():
        files = [whole] if (folder / whole).exists() else sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"model.source={name}: {what_it_is(folder)}")
        return files
    weight_map = read_json(index, f"model.source={name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ConfigError(f"model.source={name}: {index.name} has no weight_map from tensors to files; fetch it again")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if not (folder / file).exists():
            raise ConfigError(f"model.source={name}: {file} is missing; {index.name} names it")
    if (folder / whole).exists() and whole not in files:
        raise ConfigError(
            f"model.source={name}: holds {whole} and {index.name}, which names other files; remove the one that is "
            "not the model's"
        )
    return files


def _match(a: Architecture, tensors: dict[str, Tensor], where: str) -> None:
    """Raise ConfigError unless the tensors are those of the table, with their shapes and of a supported type."""
    wanted = {name: w.hf_shape for _, name, w, _ in entries(table(a))}
    missing = [name for name in wanted if name not in tensors]
    # Old checkpoints store the rotary frequencies, and some store the head although it is tied.
    ignored = {"lm_head.weight"} if a.tied else set()
    computed = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    extra = [n for n in tensors if n not in wanted and n not in ignored and not n.endswith(computed)]
    for kind, names in (("lacks", missing), ("has tensors that the architecture lacks:", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"model.source={where}: the checkpoint {kind} {', '.join(names[:3])}{more}")
    for name, shape in wanted.items():
        found = tensors[name]
        if found.shape != shape:
            raise ConfigError(
                f"model.source={where}: {name} has shape {list(found.shape)}, config.json implies {list(shape)}"
            )
        if found.dtype not in _DTYPES:
            raise ConfigError(f"model.source={where}: {name} is {found.dtype}; supported: {', '.join(_DTYPES)}")


def read_tensor(tensor: Tensor) -> np.ndarray:
    """A tensor as it lies on disk. The file is mapped for this call alone, or the whole model would become resident."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="numpy") as opened:
        return opened.get_tensor(tensor.name)


def _rows_of(tensor: Tensor) -> Iterator[np.ndarray]:
    """A matrix in float32, a few thousand rows at a time."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="numpy") as opened:
        rows = opened.get_slice(tensor.name)
        for start in range(0, tensor.shape[0], _ROWS_AT_A_TIME):
            yield np.asarray(rows[start : min(start + _ROWS_AT_A_TIME, tensor.shape[0])]).astype(np.float32)


def load_params(
    source: Source, weights: PyTree[Weight], shardings: PyTree[NamedSharding], dtype: DTypeLike
) -> PyTree[Array]:
    """The params of a checkpoint. Each weight is read, transposed, cast and placed before the next one is read.

    Host memory beyond the params is a small multiple of the largest tensor. The weights outside the blocks come first,
    the largest first, while little else is in memory; those of the blocks are filled layer by layer in place.

    Args:
      weights: the table of the source's architecture.
      shardings: a NamedSharding for each weight.
      dtype: type in which weights are held.
    Raises:
      ConfigError: a tensor has numbers that are not finite, in its file or in `dtype`.
    """
    leaves, structure = jax.tree.flatten(weights, is_leaf=is_weight)
    leaf_shardings = jax.tree.leaves(shardings)
    order = sorted(range(len(leaves)), key=lambda i: (leaves[i].stacked, -int(np.prod(leaves[i].shape))))
    loaded: dict[int, Array] = {}
    finite: dict[str, Array] = {}
    for i in order:
        loaded[i] = _load_leaf(source, leaves[i], leaf_shardings[i], jnp.dtype(dtype), finite)
    # One transfer at the end: a transfer for each tensor would wait for its device.
    bad = [name for name, good in jax.device_get(finite).items() if not good]
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise ConfigError(
            f"model.source={source.name}: NaN or infinity in {', '.join(sorted(bad)[:3])}{more}, read as {dtype}; "
            "fetch the checkpoint again, or one from before it diverged"
        )
    return jax.tree.unflatten(structure, [loaded[i] for i in range(len(leaves))])


def _load_leaf(source: Source, w: Weight, sharding: NamedSharding, dtype: jnp.dtype, finite: dict[str, Array]) -> Array:
    """A weight on its devices.

    Args:
      finite: gets an entry for each tensor of the weight, whether all its numbers are finite.
    """

    def read(name: str, sharding: NamedSharding) -> Array:
        x = _place(from_hf(w, read_tensor(source.tensors[name])), sharding)
        finite[name] = _all_finite(x, dtype)
        return x

    if not w.stacked:
        return read(w.hf_name, sharding).astype(dtype)
    leaf = jax.jit(functools.partial(jnp.zeros, w.shape, dtype), out_shardings=sharding)()
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    put = jax.jit(
        lambda leaf, part, i: jax.lax.dynamic_update_index_in_dim(leaf, part.astype(leaf.dtype), i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    for i in range(w.shape[0]):
        leaf = put(leaf, read(w.hf_name.format(i), one), i)
    return leaf


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(x: Array, dtype: jnp.dtype) -> Array:
    """Whether all numbers are finite after a cast to this type."""
    return jnp.isfinite(x.astype(dtype)).all()


def _place(x: np.ndarray, sharding: NamedSharding) -> Array:
    """A host array on its devices; each device gets its own part only."""
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.ascontiguousarray(x[part]))
