"""One table per architecture: each weight's shape, axes, initialiser and Hugging Face name. All derives from it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pspo_jax.model.architecture import Architecture

LAYER = "layers"
"""Logical axis along which the blocks' weights are stacked."""


class Weight(NamedTuple):
    shape: tuple[int, ...]
    """With the stacking axis L in front, for weights of a block."""
    axes: tuple[str | None, ...]
    """Logical axis of each dimension; parallel/mesh.py says which mesh axis holds it."""
    std: float
    """Standard deviation of the normal initialiser; 0 = the constant `fill`."""
    hf: str
    """Name in a Hugging Face checkpoint, "{}" standing for the layer."""
    hf_shape: tuple[int, ...]
    """Shape there, of one layer."""
    transposed: bool = False
    """True where it is stored as [out, in]; here matrices are [in, out], with heads apart."""
    fill: float = 0.0

    @property
    def stacked(self) -> bool:
        return self.axes[0] == LAYER


def _matrix(
    hf: str, inputs: dict[str, int], outputs: dict[str, int], std: float, stack: int | None, split: tuple[str, ...]
) -> Weight:
    """A linear map; dimensions named in `split` are sharded by that name, the others are not."""
    dims = {**inputs, **outputs}
    front: dict[str, int] = {} if stack is None else {LAYER: stack}
    return Weight(
        (*front.values(), *dims.values()),
        (*front, *(name if name in split else None for name in dims)),
        std,
        hf,
        (math.prod(outputs.values()), math.prod(inputs.values())),
        transposed=True,
    )


_SHARDED = ("embed", "heads", "kv_heads", "mlp", "vocab")


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


def table(a: Architecture) -> dict[str, Any]:
    """The weights of a decoder-only transformer; layers are stacked along a first axis L."""
    n, d, v = a.layers, a.width, a.vocab_size
    residual = 1 / math.sqrt(2 * n)
    unit = 1.0 - a.norm_offset

    def norm(hf: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Weight:
        hf = f"model.layers.{{}}.{hf}.weight"
        return Weight((n, *shape), (LAYER, *axes), 0, hf, (math.prod(shape),), fill=unit)

    layers = {}
    for name, (module, inputs, outputs) in projections(a).items():
        std = (residual if name in ("o", "down") else 1) / math.sqrt(math.prod(inputs.values()))
        hf = f"model.layers.{{}}.{module}"
        layers[name] = _matrix(f"{hf}.weight", inputs, outputs, std, n, _SHARDED)
        if name in a.biases:
            shape = tuple(outputs.values())
            axes = tuple(x if x in _SHARDED else None for x in outputs)
            layers[f"{name}_bias"] = Weight((n, *shape), (LAYER, *axes), 0, f"{hf}.bias", (math.prod(shape),))
    if a.pre_norm:
        layers["attn_norm"] = norm("input_layernorm", (d,), (None,))
        # Llama calls the norm before the MLP by where it stands; families with norms on outputs took that name for one.
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
    weights: dict[str, Any] = {
        "embed": Weight((v, d), ("vocab", "embed"), fan if a.tied else 1.0, "model.embed_tokens.weight", (v, d)),
        "layers": layers,
        "final_norm": Weight((d,), (None,), 0, "model.norm.weight", (d,), fill=unit),
    }
    if not a.tied:
        weights["head"] = _matrix("lm_head.weight", {"embed": d}, {"vocab": v}, fan, None, _SHARDED)
    return weights


def lora_table(a: Architecture) -> dict[str, Any]:
    """The adapters' weights, A [in, rank] and B [rank, out] of each target, named as PEFT names them.

    A starts as PEFT's does in variance (1 / (3 in)), B at zero: the adapted model is the base at first.
    """
    assert a.lora is not None
    out: dict[str, Weight] = {}
    for name, (module, inputs, outputs) in projections(a).items():
        if name in a.lora.targets:
            hf = f"base_model.model.model.layers.{{}}.{module}.lora_"
            rank = {"rank": a.lora.rank}
            std = 1 / math.sqrt(3 * math.prod(inputs.values()))
            out[f"{name}_lora_a"] = _matrix(f"{hf}A.weight", inputs, rank, std, a.layers, _SHARDED)
            out[f"{name}_lora_b"] = _matrix(f"{hf}B.weight", rank, outputs, 0, a.layers, _SHARDED)
    return {"layers": out}


def is_weight(x: Any) -> bool:
    return isinstance(x, Weight)


def named_weights(weights: Any) -> list[tuple[str, Weight]]:
    """(path, weight) of every entry, in the order of the params' leaves."""
    pairs = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight)
    return [(jax.tree_util.keystr(path), w) for path, w in pairs]


def init_weights(weights: Any, key: Key[Array, ""], dtype: Any) -> Any:
    """Draw every weight of a table; a weight's values depend on its name and the key alone."""

    def draw(path: Any, w: Weight) -> Array:
        if w.std == 0:
            return jnp.full(w.shape, w.fill, dtype)
        name = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
        return (w.std * jax.random.normal(jax.random.fold_in(key, name), w.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, weights, is_leaf=is_weight)


def weight_axes(weights: Any) -> Any:
    """The table's logical axes, as a pytree of tuples like the params."""
    return jax.tree.map(lambda w: w.axes, weights, is_leaf=is_weight)


def merge_adapter(base: Any, adapter: Any) -> Any:
    """One tree of base weights and adapters, for params, axes and tables alike."""
    return {**base, "layers": {**base["layers"], **adapter["layers"]}}


def entries(weights: Any) -> Iterator[tuple[str, str, Weight, int | None]]:
    """(params path, Hugging Face name, weight, layer or None) of every tensor of a checkpoint."""
    for path, w in named_weights(weights):
        if w.stacked:
            for i in range(w.shape[0]):
                yield path, w.hf.format(i), w, i
        else:
            yield path, w.hf, w, None


def from_hf(w: Weight, x: np.ndarray) -> np.ndarray:
    """A tensor of a Hugging Face checkpoint as a weight (of one layer); a view where possible."""
    return (x.T if w.transposed else x).reshape(w.shape[1:] if w.stacked else w.shape)


def to_hf(w: Weight, x: np.ndarray) -> np.ndarray:
    """The inverse of `from_hf`, contiguous."""
    if not w.transposed:
        return np.ascontiguousarray(x.reshape(w.hf_shape))
    outputs, inputs = w.hf_shape
    return np.ascontiguousarray(x.reshape(inputs, outputs).T)
