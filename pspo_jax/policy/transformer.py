"""The policy: a decoder-only transformer (RMSNorm, rotary positions, grouped-query attention, gated MLP).

A block does what its weights say: a bias, a norm or an adapter that is in the table is applied, and no other switch
exists for it. Training scans over stacked layers. Decoding slices them once, before the token loop, and runs them
unrolled: the loop then reads each weight in place (slicing inside it was measured 1.7x slower in bfloat16).

Precision: products run in `compute_dtype` with float32 accumulation. Float32 always: softmax and its scores (sums of
many terms of one sign), norms (a mean of squares), rotary angles (positions beyond 256 have no bfloat16), logits and
log-probs (a ratio of two policies is the exponential of a small difference), adapters and their optimizer state
(updates of 1e-6 vanish in bfloat16).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pspo_jax.config import Remat
from pspo_jax.parallel.mesh import constrain, gather_for_decode
from pspo_jax.policy.architecture import Architecture
from pspo_jax.policy.attention import attend, attend_shared_prefix
from pspo_jax.policy.base import Adapted, Packed, Policy, mask_logits
from pspo_jax.policy.matmul import product
from pspo_jax.policy.rotary import Rotation, rope, rotation
from pspo_jax.policy.weights import (
    init_weights,
    lora_table,
    merge_adapter,
    table,
    weight_axes,
)

_FAR = np.iinfo(np.int32).max
"""A window that sees everything."""

_INPUT, _PROJECTION = "block_input", "projection"
"""Names of values that a backward pass may keep; see `_remat`."""

_SPECS = {
    "q": ("rsd,dnh->rsnh", "rsd,dk->rsk", "rsk,knh->rsnh"),
    "o": ("rsnh,nhd->rsd", "rsnh,nhk->rsk", "rsk,kd->rsd"),
    "gate": ("rsd,df->rsf", "rsd,dk->rsk", "rsk,kf->rsf"),
    "down": ("rsf,fd->rsd", "rsf,fk->rsk", "rsk,kd->rsd"),
}
"""Products of a projection: with its weight, with its adapter's A, with its adapter's B."""
_SPECS |= {"k": _SPECS["q"], "v": _SPECS["q"], "up": _SPECS["gate"]}


def transformer(a: Architecture) -> Policy:
    """The policy of an architecture; with `a.lora`, its params are the adapters and its functions take `Adapted`."""
    base, adapted = table(a), a.lora is not None
    trained = lora_table(a) if adapted else base
    return Policy(
        init=lambda key: init_weights(trained, key, jnp.dtype("float32" if adapted else a.param_dtype)),
        hidden=lambda params, tokens, packed=None: _forward(a, *_unwrap(params), tokens, packed=packed)[0],
        logits=lambda params, hidden: _logits(a, _unwrap(params)[0], hidden),
        decoder=lambda params, *args: _decoder(a, _unwrap(params)[0], *args),
        axes=weight_axes(trained),
        vocab_size=a.vocab_size,
        frozen_axes=weight_axes(base) if adapted else None,
        packs=True,
    )


def _unwrap(params: Any) -> tuple[Any, Array | None]:
    """One tree of all weights, and the dropout key if there is to be dropout."""
    if not isinstance(params, Adapted):
        return params, None
    if params.adapter is None:
        return params.base, None
    return merge_adapter(params.base, params.adapter), params.key


def rms_norm(
    x: Float[Array, "*n D"], scale: Float[Array, "D"], eps: float, offset: float = 0.0
) -> Float[Array, "*n D"]:
    """x / rms(x) * (scale + offset); the mean is over as many trailing axes as `scale` has."""
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    gain = scale.astype(jnp.float32)
    return (x32 * inverse * (gain + offset if offset else gain)).astype(x.dtype)


def _norm(a: Architecture, w: dict[str, Array], name: str, x: Array) -> Array:
    """x normalised, if the block has this norm."""
    return rms_norm(x, w[name], a.norm_eps, a.norm_offset) if name in w else x


def _project(a: Architecture, w: dict[str, Array], name: str, x: Array, key: Array | None) -> Array:
    """A projection with its bias and its adapter, where the block has them."""
    dtype = jnp.dtype(a.compute_dtype)
    full, down, up = _SPECS[name]
    y = product(full, x, w[name], dtype, dtype)
    if f"{name}_bias" in w:
        y = y + w[f"{name}_bias"].astype(dtype)
    if f"{name}_lora_a" in w:
        assert a.lora is not None
        if key is not None and a.lora.dropout:
            mine = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
            kept = jax.random.bernoulli(mine, 1 - a.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - a.lora.dropout), 0).astype(x.dtype)
        low = product(down, x, w[f"{name}_lora_a"], dtype, dtype)
        y = y + a.lora.scale * product(up, low, w[f"{name}_lora_b"], dtype, dtype)
    return checkpoint_name(y.astype(dtype), _PROJECTION)


def _qkv(
    a: Architecture, w: dict[str, Array], x: Float[Array, "R S D"], at: Rotation, key: Array | None = None
) -> tuple[Array, Array, Array]:
    y = _norm(a, w, "attn_norm", x)
    q, k, v = (_project(a, w, name, y, key) for name in "qkv")
    return rope(_norm(a, w, "q_norm", q), at), rope(_norm(a, w, "k_norm", k), at), v


def _finish_block(
    a: Architecture,
    w: dict[str, Array],
    x: Float[Array, "R S D"],
    mixed: Float[Array, "R S H h"],
    key: Array | None = None,
    split: bool = False,
) -> Float[Array, "R S D"]:
    """Output projection and MLP, each added to the residual stream; split = the MLP's weights are along fsdp too."""
    x = x + _norm(a, w, "attn_post_norm", _project(a, w, "o", mixed, key))
    y = _norm(a, w, "mlp_norm", x)
    y = constrain(y, "outer_batch", None, None) if split else y
    gate, up = (_project(a, w, name, y, key) for name in ("gate", "up"))
    gate = jax.nn.silu(gate) if a.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    inner = constrain(gate * up, "outer_batch", None, "split_mlp") if split else gate * up
    y = _project(a, w, "down", inner, key)
    return x + _norm(a, w, "mlp_post_norm", constrain(y, "batch", None, None) if split else y)


def _embed(a: Architecture, embed: Float[Array, "V D"], tokens: Int[Array, "R S"]) -> Float[Array, "R S D"]:
    x = embed[tokens].astype(jnp.dtype(a.compute_dtype))
    return x if a.embed_scale == 1 else x * jnp.asarray(a.embed_scale, x.dtype)


def _forward(
    a: Architecture,
    params: Any,
    key: Array | None,
    tokens: Int[Array, "R S"],
    keep_cache: bool = False,
    packed: Packed | None = None,
) -> tuple[Float[Array, "R S D"], tuple[Array, Array] | None]:
    """Hidden states after the final norm and, if asked for, every layer's keys and values [L, R, S, K, h]."""
    # One axis of the mesh after the other, from rows along data and width along the rest, which is how the table is
    # split: at once, the compiler would make every row's whole width on every device.
    rows, length = ("batch", None) if keep_cache else ("rows", "length")
    x = constrain(_embed(a, params["embed"], tokens), "outer_batch", None, "embed")
    x = constrain(constrain(x, rows, None, length), rows, length, None)
    positions = jnp.arange(tokens.shape[1])[None] if packed is None else packed.places
    segments = None if packed is None else packed.rows
    tables = [rotation(positions, rotary) for rotary in a.rotaries]
    # Per-layer facts travel with the scan; those that all layers share are constants instead.
    extra: dict[str, Any] = {}
    if len(tables) > 1:
        extra["rotary"] = jnp.asarray(a.layer_rotary)
    if any(a.windows):
        extra["window"] = jnp.asarray([w or _FAR for w in a.windows], jnp.int32)
    if key is not None:
        extra["key"] = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(a.layers))
    stacked = [jnp.stack(t) for t in zip(*tables, strict=True)]

    def block(x: Array, xs: Any) -> tuple[Array, Any]:
        x = checkpoint_name(x, _INPUT)
        w, own = xs
        at = tables[0] if "rotary" not in own else (stacked[0][own["rotary"]], stacked[1][own["rotary"]])
        q, k, v = _qkv(a, w, x, at, own.get("key"))
        # Each device's places attend to all: along context, keys and values are gathered.
        k, v = (constrain(y, rows, None, "kv_heads", None) for y in (k, v))
        mixed = attend(q, k, v, a.attention_scale, own.get("window"), segments)
        x = _finish_block(a, w, x, mixed, own.get("key"))
        return constrain(x, rows, length, None), (k, v) if keep_cache else None

    x, cache = jax.lax.scan(_remat(a.remat, block), x, (params["layers"], extra), unroll=min(a.scan_unroll, a.layers))
    return _norm(a, params, "final_norm", x), cache


def _remat(kind: Remat, block: Callable[..., Any]) -> Callable[..., Any]:
    """The block, with what its backward pass is to find in memory."""
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


def _logits(a: Architecture, params: Any, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    spec, head = ("nd,vd->nv", params["embed"]) if a.tied else ("nd,dv->nv", params["head"])
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = product(spec, flat, head, jnp.dtype(a.compute_dtype), jnp.float32)
    return mask_logits(logits.reshape(*hidden.shape[:-1], -1), a.forbidden)


def _decoder(
    a: Architecture,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    group_size: int,
    max_new_tokens: int,
) -> tuple[Float[Array, "B V"], Any, Callable[..., Any]]:
    """Prefill each prompt once; see Policy.decoder. The cache is a (k, v) pair of [B, G, K, T, h] per layer."""
    hidden, prefix = _forward(a, params, None, prompts, keep_cache=True)
    assert prefix is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    params, layers = _for_decoding(a, params)
    prefixes = [tuple(jnp.swapaxes(t[i], 1, 2) for t in prefix) for i in range(a.layers)]  # [B, K, P, h]
    b = prompts.shape[0]
    shape = (b, group_size, a.kv_heads, max_new_tokens, a.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(a.compute_dtype))
    empty = constrain(empty, "batch", None, "kv_heads", None, None)
    cache = [(empty, empty) for _ in range(a.layers)]
    positions = lengths[:, None] + jnp.arange(max_new_tokens)
    places = [rotation(positions, rotary) for rotary in a.rotaries]

    def head(x: Float[Array, "B s D"]) -> Float[Array, "B s V"]:
        if not a.split_decode:
            return _logits(a, params, x)
        logits = _logits(a, params, constrain(x, "outer_batch", None, None))
        return constrain(logits, "outer_batch", None, "split_vocab")

    def step(cache: Any, tokens: Int[Array, "B G"], t: Int[Array, ""]) -> tuple[Float[Array, "B G V"], Any]:
        x = _embed(a, params["embed"], constrain(tokens, "outer_batch", None) if a.split_decode else tokens)
        x = constrain(x, "batch", None, None)
        at = [tuple(jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in pair) for pair in places]
        new_cache = []
        for i, (w, (prefix_k, prefix_v), (keys, values)) in enumerate(zip(layers, prefixes, cache, strict=True)):
            sin, cos = at[a.layer_rotary[i]]
            q, k, v = _qkv(a, w, x, (sin, cos))
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k[:, :, :, None], t, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(values, v[:, :, :, None], t, axis=3)
            mixed = attend_shared_prefix(
                q, prefix_k, prefix_v, lengths, keys, values, t, a.attention_scale, a.windows[i]
            )
            x = _finish_block(a, w, x, mixed, split=a.split_decode)
            new_cache.append((keys, values))
        return head(_norm(a, params, "final_norm", x)), new_cache

    return head(last[:, None])[:, 0], cache, step


def _for_decoding(a: Architecture, params: Any) -> tuple[Any, list[dict[str, Array]]]:
    """Weights sliced into layers, cast and gathered once, before the token loop: (those outside blocks, each block's).

    Norm scales keep their type, as in training.
    """
    adapted = a.lora is not None and any("_lora_" in name for name in params["layers"])
    weights = merge_adapter(table(a), lora_table(a)) if adapted else table(a)
    dtype = jnp.dtype(a.compute_dtype)

    def ready(name: str, w: Array, axes: tuple[str | None, ...]) -> Array:
        return gather_for_decode(w if "norm" in name else w.astype(dtype), axes, a.split_decode)

    outside = {name: ready(name, w, weights[name].axes) for name, w in params.items() if name != "layers"}
    blocks = [
        {name: ready(name, w[i], weights["layers"][name].axes[1:]) for name, w in params["layers"].items()}
        for i in range(a.layers)
    ]
    return outside, blocks
