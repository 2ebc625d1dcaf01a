"""Blocks of the transformer, and its forward pass over whole rows.

The weights decide what a block computes: a bias, a norm or an adapter that is in the table is applied, and no other
switch exists for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, PyTree

from pspo_jax.config.schema import Remat
from pspo_jax.distributed.mesh import constrain
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.attention.xla import attend
from pspo_jax.model.interface import ImageTokens, Packed, mask_logits
from pspo_jax.model.mixed_precision import einsum_lowp, lookup, lookup_in_batch
from pspo_jax.model.rotary import Rotation, rope, rotation, rotation_on_axes

_NO_WINDOW = np.iinfo(np.int32).max
"""Window, in tokens, of a layer whose queries see all tokens before them."""

P = ParamSpec("P")
T = TypeVar("T")

BlockWeights = dict[str, Array]
"""The weights of one block by their names in `weights.table`; those that a model lacks are absent."""

_INPUT, _PROJECTION = "block_input", "projection"
"""Names of values that the forward pass may keep for the backward pass; see `_remat`."""

_EINSUMS = {
    "q": ("rsd,dgh->rsgh", "rsd,dk->rsk", "rsk,kgh->rsgh"),
    "o": ("rsgh,ghd->rsd", "rsgh,ghk->rsk", "rsk,kd->rsd"),
    "gate": ("rsd,df->rsf", "rsd,dk->rsk", "rsk,kf->rsf"),
    "down": ("rsf,fd->rsd", "rsf,fk->rsk", "rsk,kd->rsd"),
}
"""Einsums of a projection: with its weight, with its adapter's A, with its adapter's B.

The letters are r row, s position, d width, g head, h width of a head, f width of the MLP, k rank.
einsum contracts in alphabetical order: heads need a letter before their width's, or both operands are transposed.
"""
_EINSUMS |= {"k": _EINSUMS["q"], "v": _EINSUMS["q"], "up": _EINSUMS["gate"]}


def rms_norm(
    x: Float[Array, "*n D"], scale: Float[Array, "D"], eps: float, offset: float = 0.0
) -> Float[Array, "*n D"]:
    """x / rms(x) * (scale + offset); rms is taken over as many trailing axes as `scale` has."""
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    gain = scale.astype(jnp.float32)
    return (x32 * inverse * (gain + offset if offset else gain)).astype(x.dtype)


def norm(a: Architecture, w: BlockWeights, name: str, x: Array) -> Array:
    """x normalised, if the block has this norm; else x."""
    return rms_norm(x, w[name], a.norm_eps, a.norm_offset) if name in w else x


def project(a: Architecture, w: BlockWeights, name: str, x: Array, key: Key[Array, ""] | None) -> Array:
    """A projection of x, with its bias and its adapter where the block has them.

    Args:
      key: key of the adapters' dropout in this block; None = no dropout.
    """
    dtype = jnp.dtype(a.compute_dtype)
    full, down, up = _EINSUMS[name]
    y = einsum_lowp(full, x, w[name], dtype, dtype)
    if f"{name}_bias" in w:
        y = y + w[f"{name}_bias"].astype(dtype)
    if f"{name}_lora_a" in w:
        assert a.lora is not None
        if key is not None and a.lora.dropout:
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
            kept = jax.random.bernoulli(own_key, 1 - a.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - a.lora.dropout), 0).astype(x.dtype)
        # The narrow product is scaled, and not the wide one, which would cost a pass over a wide gradient too.
        low = a.lora.scale * einsum_lowp(down, x, w[f"{name}_lora_a"], dtype, dtype)
        y = y + einsum_lowp(up, low, w[f"{name}_lora_b"], dtype, dtype)
    return checkpoint_name(y.astype(dtype), _PROJECTION)


def qkv(
    a: Architecture,
    w: BlockWeights,
    x: Float[Array, "R S D"],
    angles: Rotation,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "R S H h"], Float[Array, "R S K h"], Float[Array, "R S K h"]]:
    """Queries, keys and values of a block, queries and keys rotated by the angles of their positions."""
    y = norm(a, w, "attn_norm", x)
    q, k, v = (project(a, w, name, y, key) for name in "qkv")
    return rope(norm(a, w, "q_norm", q), angles), rope(norm(a, w, "k_norm", k), angles), v


def finish_block(
    a: Architecture,
    w: BlockWeights,
    x: Float[Array, "R S D"],
    mixed: Float[Array, "R S H h"],
    key: Key[Array, ""] | None = None,
    split: bool = False,
) -> Float[Array, "R S D"]:
    """Output projection and MLP, each added to the residual stream.

    Args:
      x: the residual stream before the block.
      mixed: the result of attention.
      split: whether the MLP's weights are split along fsdp too, as in decoding with rollout.weights=split.
    """
    x = x + norm(a, w, "attn_post_norm", project(a, w, "o", mixed, key))
    y = norm(a, w, "mlp_norm", x)
    y = constrain(y, "outer_batch", None, None) if split else y
    gate, up = (project(a, w, name, y, key) for name in ("gate", "up"))
    gate = jax.nn.silu(gate) if a.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    inner = constrain(gate * up, "outer_batch", None, "split_mlp") if split else gate * up
    y = project(a, w, "down", inner, key)
    return x + norm(a, w, "mlp_post_norm", constrain(y, "batch", None, None) if split else y)


def embed(
    a: Architecture, embed: Float[Array, "V D"], tokens: Int[Array, "R S"], images: ImageTokens | None = None
) -> Float[Array, "R S D"]:
    """The tokens' embeddings in the compute type, times the architecture's factor; those of images as they are."""
    # Indices are split as the result is, or the compiler would look up whole rows and then make them whole everywhere.
    x = lookup(embed, constrain(tokens, "outer_batch", None), jnp.dtype(a.compute_dtype))
    x = x if a.embed_scale == 1 else x * jnp.asarray(a.embed_scale, x.dtype)
    if images is None:
        return x
    index = constrain(images.embedding_of, "outer_batch", None)
    found = lookup_in_batch(images.embeddings, jnp.maximum(index, 0), x.dtype)
    of_images = constrain(found, "outer_batch", None, "embed")
    return jnp.where(index[..., None] >= 0, of_images, x)


def forward(
    a: Architecture,
    params: PyTree,
    key: Key[Array, ""] | None,
    tokens: Int[Array, "R S"],
    keep_cache: bool = False,
    packed: Packed | None = None,
    images: ImageTokens | None = None,
) -> tuple[Float[Array, "R S D"], tuple[Array, Array] | None]:
    """Hidden states after the final norm, and every layer's keys and values [L, R, S, K, h] if `keep_cache`, else None.

    Args:
      key: key of the adapters' dropout; None = no dropout.
      packed: the layout of several rows in one; None = each row stands alone.
      images: the tokens of images in the rows; None = all tokens are text.
    """
    # The layout changes by one axis of the mesh at a time. It begins with rows along data and width along the rest, as
    # the embedding is split; in one change, the compiler would make the whole width of every row on every device.
    rows, length = ("batch", None) if keep_cache else ("rows", "length")
    x = constrain(embed(a, params["embed"], tokens, images), "outer_batch", None, "embed")
    x = constrain(constrain(x, rows, None, length), rows, length, None)
    if images is not None:
        tables = [rotation_on_axes(images.positions, rotary) for rotary in a.rotaries]
    else:
        positions = jnp.arange(tokens.shape[1])[None] if packed is None else packed.positions
        tables = [rotation(positions, rotary) for rotary in a.rotaries]
    # What differs between layers travels with the scan; what all layers share is a constant.
    per_layer: dict[str, Array] = {}
    if len(tables) > 1:
        per_layer["rotary"] = jnp.asarray(a.layer_rotary)
    if any(a.windows):
        per_layer["window"] = jnp.asarray([w or _NO_WINDOW for w in a.windows], jnp.int32)
    if key is not None:
        per_layer["key"] = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(a.layers))
    stacked = [jnp.stack(t) for t in zip(*tables, strict=True)]

    def block(x: Array, layer: tuple[BlockWeights, dict[str, Array]]) -> tuple[Array, tuple[Array, Array] | None]:
        x = checkpoint_name(x, _INPUT)
        w, this = layer
        angles = tables[0] if "rotary" not in this else (stacked[0][this["rotary"]], stacked[1][this["rotary"]])
        q, k, v = qkv(a, w, x, angles, this.get("key"))
        # The positions of each device attend to all positions: along context, keys and values are gathered.
        k, v = (constrain(y, rows, None, "kv_heads", None) for y in (k, v))
        kernel = a.attention if packed is None else a.packed_attention
        mixed = attend(q, k, v, a.attention_scale, this.get("window"), packed, kernel)
        x = finish_block(a, w, x, mixed, this.get("key"))
        return constrain(x, rows, length, None), (k, v) if keep_cache else None

    x, cache = jax.lax.scan(
        _remat(a.remat, block), x, (params["layers"], per_layer), unroll=min(a.scan_unroll, a.layers)
    )
    return norm(a, params, "final_norm", x), cache


def _remat(kind: Remat, block: Callable[P, T]) -> Callable[P, T]:
    """The block, with the activations of `model.remat` kept for its backward pass and the others computed again."""
    policies = jax.checkpoint_policies
    if kind == "none":
        return block
    if kind == "dots":
        return jax.checkpoint(block, policy=policies.save_only_these_names(_PROJECTION))
    if kind == "full":
        return jax.checkpoint(block)
    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(block, policy=offload)


def logits_of(a: Architecture, params: PyTree, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """float32 logits of hidden states, with the forbidden ids at MASKED."""
    spec, head = ("nd,vd->nv", params["embed"]) if a.tied else ("nd,dv->nv", params["head"])
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = einsum_lowp(spec, flat, head, jnp.dtype(a.compute_dtype), jnp.float32)
    return mask_logits(logits.reshape(*hidden.shape[:-1], -1), a.forbidden)
