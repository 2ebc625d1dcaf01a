"""One table per architecture: each weight's shape, logical axes and initialiser. Everything else derives from it."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


class Weight(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension; parallel/mesh.py says which mesh axis holds it."""
    std: float
    """Standard deviation of the normal initialiser; 0 = all ones (norms), -1 = all zeros (biases)."""


def table(a: Any) -> dict[str, Any]:
    """The weights of a decoder-only transformer, `a` being its `Architecture`.

    Layers are stacked along a first axis L. Matrices are [in, out], with heads apart: q is [D, H, h].
    """
    n, d, h, k, hd, f, v = a.layers, a.width, a.heads, a.kv_heads, a.head_dim, a.mlp_width, a.vocab_size
    fan = 1 / math.sqrt(d)
    residual = 1 / math.sqrt(2 * n)
    layers = {
        "attn_norm": Weight((n, d), ("layers", None), 0),
        "q": Weight((n, d, h, hd), ("layers", "embed", "heads", None), fan),
        "k": Weight((n, d, k, hd), ("layers", "embed", "kv_heads", None), fan),
        "v": Weight((n, d, k, hd), ("layers", "embed", "kv_heads", None), fan),
        "o": Weight((n, h, hd, d), ("layers", "heads", None, "embed"), residual / math.sqrt(h * hd)),
        "mlp_norm": Weight((n, d), ("layers", None), 0),
        "gate": Weight((n, d, f), ("layers", "embed", "mlp"), fan),
        "up": Weight((n, d, f), ("layers", "embed", "mlp"), fan),
        "down": Weight((n, f, d), ("layers", "mlp", "embed"), residual / math.sqrt(f)),
    }
    if a.qkv_bias:
        layers["q_bias"] = Weight((n, h, hd), ("layers", "heads", None), -1)
        layers["k_bias"] = Weight((n, k, hd), ("layers", "kv_heads", None), -1)
        layers["v_bias"] = Weight((n, k, hd), ("layers", "kv_heads", None), -1)
    if a.qk_norm:
        layers["q_norm"] = Weight((n, hd), ("layers", None), 0)
        layers["k_norm"] = Weight((n, hd), ("layers", None), 0)
    weights: dict[str, Any] = {
        "embed": Weight((v, d), ("vocab", "embed"), fan if a.tied else 1.0),
        "layers": layers,
        "final_norm": Weight((d,), (None,), 0),
    }
    if not a.tied:
        weights["head"] = Weight((d, v), ("embed", "vocab"), fan)
    return weights


def _is_weight(x: Any) -> bool:
    return isinstance(x, Weight)


def init_weights(weights: Any, key: Key[Array, ""], dtype: Any) -> Any:
    """Draw every weight of a table; a weight's values depend on its name and the key alone."""

    def draw(path: Any, w: Weight) -> Array:
        if w.std == 0:
            return jnp.ones(w.shape, dtype)
        if w.std < 0:
            return jnp.zeros(w.shape, dtype)
        name = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
        return (w.std * jax.random.normal(jax.random.fold_in(key, name), w.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, weights, is_leaf=_is_weight)


def weight_axes(weights: Any) -> Any:
    """The table's logical axes, as a pytree of tuples like the params."""
    return jax.tree.map(lambda w: w.axes, weights, is_leaf=_is_weight)
