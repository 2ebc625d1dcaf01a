"""Rotary position embeddings in the half-split layout of Llama and Qwen checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.model.architecture import Rotary

Rotation = tuple[Float[Array, "*n S h/2"], Float[Array, "*n S h/2"]]
"""Sines and cosines of the angles by which the h/2 pairs of a head are rotated at each position."""


def rotation(positions: Int[Array, "*n S"], rotary: Rotary) -> Rotation:
    """Sines and cosines of position x frequency, times the embedding's scale."""
    frequency = jnp.asarray(rotary.frequencies, jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.sin(angle) * rotary.scale, jnp.cos(angle) * rotary.scale


def rotation_on_axes(positions: Int[Array, "*n S axes"], rotary: Rotary) -> Rotation:
    """`rotation` where a position has several axes: each pair is rotated by its axis of `Rotary.axes`."""
    frequency = jnp.asarray(rotary.frequencies, jnp.float32)
    angle = positions[..., jnp.asarray(rotary.axes)].astype(jnp.float32) * frequency
    return jnp.sin(angle) * rotary.scale, jnp.cos(angle) * rotary.scale


def rope(x: Float[Array, "*n S K h"], angles: Rotation) -> Float[Array, "*n S K h"]:
    """x with pair (i, i + h/2) of each head rotated by its angle."""
    half = x.shape[-1] // 2
    sin, cos = (t[..., None, :] for t in angles)
    x32 = x.astype(jnp.float32)
    a, b = x32[..., :half], x32[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
