"""The table of a transformer's weights: the shape, axes, initialiser and Hugging Face name of each.

Initialisation, sharding, loading, export and adapters are derived from this table, so that a new weight is stated once.
A table is a dict with the structure of the params and a `Weight` at each leaf: "embed", "final_norm", "head" (unless it
is tied), "layers", the weights of the blocks, each stacked over the layers along its first axis, and "vision", the
table of the vision tower, if there is one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from pspo_jax.model.architecture import Architecture, Vision

LAYERS_AXIS = "layers"
"""Logical axis along which the blocks' weights are stacked."""


class Weight(NamedTuple):
    """One weight, before it has a value."""

    shape: tuple[int, ...]
    """Shape here; weights of a block have the number of layers in front."""
    axes: tuple[str | None, ...]
    """Logical axis of each dimension, None = never split; distributed/mesh.py says which mesh axis splits it."""
    std: float
    """Standard deviation of the normal initialiser; 0 = all numbers are `fill`."""
    hf_name: str
    """Name in a Hugging Face checkpoint, with "{}" for the number of the layer. Names of models with a vision tower are
    those of released files, "model.*" and "visual.*"; load.py renames those of the other layout."""
    hf_shape: tuple[int, ...]
    """Shape in the checkpoint, of one layer."""
    transposed: bool = False
    """Whether the checkpoint stores it as [out, in]; here matrices are [in, out], with an axis for the heads."""
    fill: float = 0.0
    """Initial value where std is 0."""

    @property
    def stacked(self) -> bool:
        """Whether it is a weight of the blocks, stacked over the layers."""
        return self.axes[0] == LAYERS_AXIS


def _matrix(
    hf_name: str, inputs: dict[str, int], outputs: dict[str, int], std: float, stack: int | None, split: tuple[str, ...]
) -> Weight:
    """The weight of a linear map.

    Args:
      inputs: names and sizes of its input dimensions.
      outputs: names and sizes of its output dimensions.
      stack: number of layers; None = the weight is not in a block.
      split: names of the dimensions that a mesh may split; the name is the logical axis.
    """
    dims = {**inputs, **outputs}
    front: dict[str, int] = {} if stack is None else {LAYERS_AXIS: stack}
    return Weight(
        (*front.values(), *dims.values()),
        (*front, *(name if name in split else None for name in dims)),
        std,
        hf_name,
        (math.prod(outputs.values()), math.prod(inputs.values())),
        transposed=True,
    )


_SPLIT_DIMENSIONS = ("embed", "heads", "kv_heads", "mlp", "vocab")
"""Names of dimensions that a mesh may split."""


def projections(a: Architecture) -> dict[str, tuple[str, dict[str, int], dict[str, int]]]:
    """Name -> (module of a Hugging Face block, input dimensions, output dimensions) of a block's matrices."""
    d, q, kv, f = {"embed": a.width}, {"heads": a.heads}, {"kv_heads": a.kv_heads}, {"mlp": a.mlp_width}
    h = {"head_dim": a.head_dim}
    return {
        "q": ("self_attn.q_proj", d, q | h),
        "k": ("self_attn.k_proj", d, kv | h),
        "v": ("self_attn.v_proj", d, kv | h),
        "o": ("self_attn.o_proj", q | h, d),
        "gate": ("mlp.gate_proj", d, f),
        "up": ("mlp.up_proj", d, f),
        "down": ("mlp.down_proj", f, d),
    }


def table(a: Architecture) -> PyTree[Weight]:
    """The table of all weights of an architecture, without adapters."""
    n, d, v = a.layers, a.width, a.vocab_size
    residual = 1 / math.sqrt(2 * n)
    unit = 1.0 - a.norm_offset

    def norm(module: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Weight:
        name = f"model.layers.{{}}.{module}.weight"
        return Weight((n, *shape), (LAYERS_AXIS, *axes), 0, name, (math.prod(shape),), fill=unit)

    layers = {}
    for name, (module, inputs, outputs) in projections(a).items():
        std = (residual if name in ("o", "down") else 1) / math.sqrt(math.prod(inputs.values()))
        hf = f"model.layers.{{}}.{module}"
        layers[name] = _matrix(f"{hf}.weight", inputs, outputs, std, n, _SPLIT_DIMENSIONS)
        if name in a.biases:
            shape = tuple(outputs.values())
            axes = tuple(x if x in _SPLIT_DIMENSIONS else None for x in outputs)
            layers[f"{name}_bias"] = Weight((n, *shape), (LAYERS_AXIS, *axes), 0, f"{hf}.bias", (math.prod(shape),))
    if a.pre_norm:
        layers["attn_norm"] = norm("input_layernorm", (d,), (None,))
        # Llama names the norm before the MLP post_attention_layernorm; families with norms on the outputs use that name
        # for the norm on the output of attention.
        before_mlp = "pre_feedforward_layernorm" if a.post_norm else "post_attention_layernorm"
        layers["mlp_norm"] = norm(before_mlp, (d,), (None,))
    if a.post_norm:
        layers["attn_post_norm"] = norm("post_attention_layernorm", (d,), (None,))
        layers["mlp_post_norm"] = norm("post_feedforward_layernorm", (d,), (None,))
    if a.qk_norm != "none":
        whole = a.qk_norm == "projection"
        for name, count, axis in (("q", a.heads, "heads"), ("k", a.kv_heads, "kv_heads")):
            shape, axes = ((count, a.head_dim), (axis, None)) if whole else ((a.head_dim,), (None,))
            layers[f"{name}_norm"] = norm(f"self_attn.{name}_norm", shape, axes)

    fan = 1 / math.sqrt(d)
    weights: dict[str, PyTree[Weight]] = {
        "embed": Weight((v, d), ("vocab", "embed"), fan if a.tied else 1.0, "model.embed_tokens.weight", (v, d)),
        "layers": layers,
        "final_norm": Weight((d,), (None,), 0, "model.norm.weight", (d,), fill=unit),
    }
    if not a.tied:
        weights["head"] = _matrix("lm_head.weight", {"embed": d}, {"vocab": v}, fan, None, _SPLIT_DIMENSIONS)
    if a.vision is not None:
        weights["vision"] = vision_table(a.vision, d)
    return weights


def vision_table(v: Vision, out: int) -> dict[str, PyTree[Weight]]:
    """The table of a vision tower. Its matrices are split as those of the language model's blocks are; the dimension
    between the two matrices of the merger counts as that of an MLP.

    Args:
      out: width of the embeddings that the tower makes.
    """
    width, merged = {"embed": v.width}, v.width * v.layout.merge**2
    stored = (v.width, v.channels, v.frames, v.patch, v.patch)
    return {
        "patch": Weight(
            (v.width, v.channels, v.frames, v.patch**2),
            ("embed", None, None, None),
            1 / math.sqrt(v.patch_numbers * v.frames),
            "visual.patch_embed.proj.weight",
            stored,
        ),
        "layers": _vision_layers(v, width),
        **_tower_norm(v, "merger_norm", "merger.ln_q", None),
        **_tower_linear("merger_up", "merger.mlp.0", {"embed": merged}, {"mlp": merged}, None),
        **_tower_linear("merger_down", "merger.mlp.2", {"mlp": merged}, {"embed": out}, None),
    }


def _vision_layers(v: Vision, width: dict[str, int]) -> dict[str, Weight]:
    """The table of a vision tower's blocks."""
    n, residual = v.layers, 1 / math.sqrt(2 * v.layers)
    heads, mlp = {"heads": v.heads, "head_dim": v.head_dim}, {"mlp": v.mlp_width}
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if v.gated else (None, "fc1", "fc2")
    block = "blocks.{}"
    layers = _tower_norm(v, "attn_norm", f"{block}.norm1", n) | _tower_norm(v, "mlp_norm", f"{block}.norm2", n)
    layers |= _tower_linear("qkv", f"{block}.attn.qkv", width, {"qkv": 3, **heads}, n)
    layers |= _tower_linear("o", f"{block}.attn.proj", heads, width, n, residual)
    if gate is not None:
        layers |= _tower_linear("gate", f"{block}.mlp.{gate}", width, mlp, n)
    layers |= _tower_linear("up", f"{block}.mlp.{up}", width, mlp, n)
    return layers | _tower_linear("down", f"{block}.mlp.{down}", mlp, width, n, residual)


def _tower_linear(
    key: str, module: str, inputs: dict[str, int], outputs: dict[str, int], stack: int | None, factor: float = 1.0
) -> dict[str, Weight]:
    """A matrix of the tower and its bias, which is split along the heads or the MLP as the matrix's columns are.

    Args:
      stack: number of blocks; None = the weight is not in a block.
      factor: factor of the standard deviation by which the matrix is drawn.
    """
    std = factor / math.sqrt(math.prod(inputs.values()))
    front: dict[str, int] = {} if stack is None else {LAYERS_AXIS: stack}
    shape = (*front.values(), *outputs.values())
    axes = (*front, *(name if name in ("heads", "mlp") else None for name in outputs))
    return {
        key: _matrix(f"visual.{module}.weight", inputs, outputs, std, stack, _SPLIT_DIMENSIONS),
        f"{key}_bias": Weight(shape, axes, 0, f"visual.{module}.bias", (math.prod(outputs.values()),)),
    }


def _tower_norm(v: Vision, key: str, module: str, stack: int | None) -> dict[str, Weight]:
    """The scale of a norm of the tower, and its bias if it has one; `stack` as in `_tower_linear`."""
    shape, axes = ((v.width,), (None,)) if stack is None else ((stack, v.width), (LAYERS_AXIS, None))
    scale = Weight(shape, axes, 0, f"visual.{module}.weight", (v.width,), fill=1.0)
    bias = Weight(shape, axes, 0, f"visual.{module}.bias", (v.width,))
    return {key: scale, f"{key}_bias": bias} if v.layer_norm else {key: scale}


def lora_table(a: Architecture) -> PyTree[Weight]:
    """The table of the adapters: A [in, rank] and B [rank, out] of each target, with the names that PEFT gives them.

    A starts with the variance that PEFT gives it, 1 / (3 in), and B at zero: at first, the adapted model is the base.
    """
    assert a.lora is not None
    out: dict[str, Weight] = {}
    for name, (module, inputs, outputs) in projections(a).items():
        if name in a.lora.targets:
            hf = f"{peft_module(a, f'model.layers.{{}}.{module}')}.lora_"
            rank = {"rank": a.lora.rank}
            std = 1 / math.sqrt(3 * math.prod(inputs.values()))
            out[f"{name}_lora_a"] = _matrix(f"{hf}A.weight", inputs, rank, std, a.layers, _SPLIT_DIMENSIONS)
            out[f"{name}_lora_b"] = _matrix(f"{hf}B.weight", rank, outputs, 0, a.layers, _SPLIT_DIMENSIONS)
    return {"layers": out}


def peft_module(a: Architecture, module: str) -> str:
    """PEFT's name of a module of the language model, from its name in released files.

    PEFT names modules as transformers does in memory, where the language model beside a tower has a prefix of its own.
    """
    inner = module if a.vision is None else module.replace("model.", "model.language_model.", 1)
    return f"base_model.model.{inner}"


def trained_and_frozen(a: Architecture) -> tuple[PyTree[Weight], PyTree[Weight] | None]:
    """The tables of the weights that train and of those that do not; None = all weights train."""
    whole = table(a)
    if a.lora is not None:
        return lora_table(a), whole
    if a.vision is None or not a.freezes_vision:
        return whole, None
    return {name: w for name, w in whole.items() if name != "vision"}, {"vision": whole["vision"]}


def is_weight(x: object) -> TypeGuard[Weight]:
    """Whether x is a leaf of a table."""
    return isinstance(x, Weight)


def named_weights(weights: PyTree[Weight]) -> list[tuple[str, Weight]]:
    """(path in the params, weight) of every entry of a table, in the order of the params' leaves."""
    pairs = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight)
    return [(jax.tree_util.keystr(path), w) for path, w in pairs]


def init_weights(weights: PyTree[Weight], key: Key[Array, ""], dtype: DTypeLike) -> PyTree[Array]:
    """Initial params of a table; the values of a weight depend on nothing but the key and its path."""

    def draw(path: jax.tree_util.KeyPath, w: Weight) -> Array:
        if w.std == 0:
            return jnp.full(w.shape, w.fill, dtype)
        name = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
        return (w.std * jax.random.normal(jax.random.fold_in(key, name), w.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, weights, is_leaf=is_weight)


def weight_axes(weights: PyTree[Weight]) -> PyTree[tuple[str | None, ...]]:
    """The logical axes of a table's weights; see `Model.axes`."""
    return jax.tree.map(lambda w: w.axes, weights, is_leaf=is_weight)


def merge(frozen: PyTree, trained: PyTree) -> PyTree:
    """One tree of frozen and trained weights; the arguments are both params, both axes or both tables."""
    layers = {**frozen.get("layers", {}), **trained["layers"]}
    return {**frozen, **trained, "layers": layers}


def entries(weights: PyTree[Weight]) -> Iterator[tuple[str, str, Weight, int | None]]:
    """(path in the params, Hugging Face name, weight, layer or None) of every tensor of a checkpoint."""
    for path, w in named_weights(weights):
        if w.stacked:
            for i in range(w.shape[0]):
                yield path, w.hf_name.format(i), w, i
        else:
            yield path, w.hf_name, w, None


def from_hf(w: Weight, x: np.ndarray) -> np.ndarray:
    """A tensor of a Hugging Face checkpoint in the layout used here, of one layer; a view where possible."""
    return (x.T if w.transposed else x).reshape(w.shape[1:] if w.stacked else w.shape)


def to_hf(w: Weight, x: np.ndarray) -> np.ndarray:
    """The inverse of `from_hf`; the result is contiguous."""
    if not w.transposed:
        return np.ascontiguousarray(x.reshape(w.hf_shape))
    outputs, inputs = w.hf_shape
    return np.ascontiguousarray(x.reshape(inputs, outputs).T)
