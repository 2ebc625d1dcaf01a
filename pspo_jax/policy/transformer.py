"""The built-in policy: a decoder-only transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU).

Optional q/k/v biases (Qwen2), q/k norms (Qwen3) and a tied head cover the Llama and Qwen families. Training scans over
stacked layers. Decoding slices them once, before the token loop, and runs them unrolled: the loop then reads each
weight in place (slicing inside it was measured 1.7x slower in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.config import PolicyConfig
from pspo_jax.parallel.mesh import constrain, gather_for_decode
from pspo_jax.policy.attention import attend, attend_shared_prefix
from pspo_jax.policy.base import Policy, mask_logits
from pspo_jax.policy.matmul import product
from pspo_jax.policy.weights import Weight, init_weights, table, weight_axes


@dataclass(frozen=True)
class Architecture(PolicyConfig):
    """PolicyConfig, and what the tokenizer adds to it."""

    vocab_size: int = 0
    """Rows of the embedding, V."""
    forbidden: tuple[int, ...] = ()
    """Ids that are never drawn: padding, and rows of the embedding that no token uses."""


def transformer(a: Architecture) -> Policy:
    """The policy of an architecture."""
    weights = table(a)
    return Policy(
        init=lambda key: init_weights(weights, key, jnp.dtype(a.param_dtype)),
        hidden=lambda params, tokens: _forward(a, params, tokens)[0],
        logits=lambda params, hidden: _logits(a, params, hidden),
        decoder=lambda *args: _decoder(a, *args),
        axes=weight_axes(weights),
        vocab_size=a.vocab_size,
    )


def rms_norm(x: Float[Array, "*n D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*n D"]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


Rotation = tuple[Float[Array, "*n S h/2"], Float[Array, "*n S h/2"]]
"""Sines and cosines of the positions' angles."""


def rotation(positions: Int[Array, "*n S"], head_dim: int, theta: float) -> Rotation:
    """Angles of the rotary embedding: position x theta^(-i / half) for pair i."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rope(x: Float[Array, "*n S K h"], at: Rotation) -> Float[Array, "*n S K h"]:
    """Rotary embedding in the half-split layout of Llama and Qwen checkpoints."""
    half = x.shape[-1] // 2
    sin, cos = (t[..., None, :] for t in at)
    x32 = x.astype(jnp.float32)
    a, b = x32[..., :half], x32[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _qkv(a: Architecture, w: dict[str, Array], x: Float[Array, "R S D"], at: Rotation) -> tuple[Array, Array, Array]:
    dtype = jnp.dtype(a.compute_dtype)
    y = rms_norm(x, w["attn_norm"], a.norm_eps)
    q, k, v = (product("rsd,dnh->rsnh", y, w[name], dtype, dtype) for name in "qkv")
    if a.qkv_bias:
        q, k, v = (t + w[f"{name}_bias"].astype(dtype) for name, t in zip("qkv", (q, k, v), strict=True))
    if a.qk_norm:
        q, k = rms_norm(q, w["q_norm"], a.norm_eps), rms_norm(k, w["k_norm"], a.norm_eps)
    return rope(q, at), rope(k, at), v


def _finish_block(
    a: Architecture, w: dict[str, Array], x: Float[Array, "R S D"], mixed: Float[Array, "R S H h"]
) -> Float[Array, "R S D"]:
    """Output projection and MLP, each added to the residual stream."""
    dtype = jnp.dtype(a.compute_dtype)
    x = x + product("rsnh,nhd->rsd", mixed, w["o"], dtype, dtype)
    y = rms_norm(x, w["mlp_norm"], a.norm_eps)
    gate, up = (product("rsd,df->rsf", y, w[name], dtype, dtype) for name in ("gate", "up"))
    return x + product("rsf,fd->rsd", jax.nn.silu(gate) * up, w["down"], dtype, dtype)


def _embed(a: Architecture, params: Any, tokens: Int[Array, "R S"]) -> Float[Array, "R S D"]:
    return params["embed"][tokens].astype(jnp.dtype(a.compute_dtype))


def _forward(
    a: Architecture, params: Any, tokens: Int[Array, "R S"], keep_cache: bool = False
) -> tuple[Float[Array, "R S D"], tuple[Array, Array] | None]:
    """Hidden states after the final norm and, if asked for, every layer's keys and values [L, R, S, K, h]."""
    x = constrain(_embed(a, params, tokens), "batch", None, None)
    at = rotation(jnp.arange(tokens.shape[1])[None], a.head_dim, a.rope_theta)

    def block(x: Array, w: dict[str, Array]) -> tuple[Array, Any]:
        q, k, v = _qkv(a, w, x, at)
        x = _finish_block(a, w, x, attend(q, k, v))
        return constrain(x, "batch", None, None), (k, v) if keep_cache else None

    body = jax.checkpoint(block) if a.remat else block
    x, cache = jax.lax.scan(body, x, params["layers"], unroll=min(a.scan_unroll, a.layers))
    return rms_norm(x, params["final_norm"], a.norm_eps), cache


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
    params = gather_for_decode(_in_compute_type(a, params), weight_axes(table(a)))
    hidden, prefix = _forward(a, params, prompts, keep_cache=True)
    assert prefix is not None
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(a.layers)]
    prefixes = [tuple(jnp.swapaxes(t[i], 1, 2) for t in prefix) for i in range(a.layers)]  # [B, K, P, h]
    b = prompts.shape[0]
    shape = (b, group_size, a.kv_heads, max_new_tokens, a.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(a.compute_dtype))
    empty = constrain(empty, "batch", None, "kv_heads", None, None)
    cache = [(empty, empty) for _ in range(a.layers)]
    places = rotation(lengths[:, None] + jnp.arange(max_new_tokens), a.head_dim, a.rope_theta)

    def step(cache: Any, tokens: Int[Array, "B G"], t: Int[Array, ""]) -> tuple[Float[Array, "B G V"], Any]:
        x = params["embed"][tokens]
        sin, cos = (jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in places)
        new_cache = []
        for w, (prefix_k, prefix_v), (keys, values) in zip(layers, prefixes, cache, strict=True):
            q, k, v = _qkv(a, w, x, (sin, cos))
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k[:, :, :, None], t, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(values, v[:, :, :, None], t, axis=3)
            mixed = attend_shared_prefix(q, prefix_k, prefix_v, lengths, keys, values, t)
            x = _finish_block(a, w, x, mixed)
            new_cache.append((keys, values))
        return _logits(a, params, rms_norm(x, params["final_norm"], a.norm_eps)), new_cache

    return _logits(a, params, last), cache, step


def _in_compute_type(a: Architecture, params: Any) -> Any:
    """Matrices and biases cast once, before the token loop; norm scales stay float32 as in training."""
    dtype = jnp.dtype(a.compute_dtype)
    return jax.tree.map(
        lambda weight, w: w if weight.std == 0 else w.astype(dtype),
        table(a),
        params,
        is_leaf=lambda x: isinstance(x, Weight),
    )
