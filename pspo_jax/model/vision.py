"""The vision tower: from the patches of a batch of prompts' images to one embedding for each unit.

Shapes follow from the number of windows that prompts have room for (arrays/images.py), and not from the images: one
compiled program serves images of every size. Patches beyond an image's edge and empty windows are computed too, and
masked as keys. Masks are finite, so that a window without any patch has finite outputs and gradients; no token reads
them.

Letters: B prompts, W windows of a prompt, k patches of a window, S = W k patches of a prompt, u units of a window,
U = W u units of a prompt, c numbers of a patch, N heads, h width of a head, D width of the tower, E width of
embeddings.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from pspo_jax.arrays.images import ImageEmbeddings, Images, ImageWindows
from pspo_jax.distributed.mesh import constrain
from pspo_jax.model.architecture import Architecture, Rotary, Vision, plain_frequencies
from pspo_jax.model.interface import MASKED, ImageTokens
from pspo_jax.model.mixed_precision import einsum_lowp
from pspo_jax.model.rotary import rope, rotation_on_axes

_ROTARY_BASE = 10_000.0
_NORM_EPS = 1e-6
_FAST_GELU = 1.702
"""Factor in x sigmoid(1.702 x), the fast approximation of GELU."""
_QUERY_WINDOWS = 8
"""Largest number of windows whose patches are the queries of a whole image at a time."""

Weights = dict[str, Array]
"""Weights of a block, or those outside the blocks, by their names in `weights.vision_table`."""


@jax.named_scope("vision_tower")
def encode_images(a: Architecture, params: PyTree, images: Images) -> Float[Array, "B U E"]:
    """The built-in model's `EncodeImagesFn`; embeddings of units that no token stands for are arbitrary.

    The backward pass computes each block again from its input. Images that are embeddings already pass through.

    Args:
      params: the weights of `weights.table`.
    """
    if isinstance(images, ImageEmbeddings):
        return images.embeddings
    assert a.vision is not None
    v, dtype, params = a.vision, jnp.dtype(a.compute_dtype), params["vision"]
    b, windows, k = images.patches.shape[:3]
    rows, columns, real = places(v, images)
    angles = rotation_on_axes(jnp.stack([rows, columns], axis=-1), _rotary(v))
    x = constrain(embed_patches(v, params["patch"], images.patches, dtype), "batch", None, None)
    whole = [i in v.whole_image for i in range(v.layers)]
    in_windows = functools.partial(_attend_in_windows, real=real, windows=windows)
    image_of = jnp.repeat(images.image, k, axis=1)
    over_image = functools.partial(_attend_over_image, real=real, image=image_of, windows=windows)

    @jax.checkpoint
    def block(x: Float[Array, "B S D"], layer: tuple[Weights, Bool[Array, ""]]) -> tuple[Array, None]:
        w, sees_all = layer
        y = _norm(v, w, "attn_norm", x)
        qkv = einsum_lowp("bsd,dtnh->bstnh", y, w["qkv"], dtype, dtype) + w["qkv_bias"].astype(dtype)
        qkv = constrain(qkv, "batch", None, None, "heads", None)
        operands = rope(qkv[:, :, 0], angles), rope(qkv[:, :, 1], angles), qkv[:, :, 2]
        if all(whole):
            mixed = over_image(*operands)
        elif not any(whole):
            mixed = in_windows(*operands)
        else:
            mixed = jax.lax.cond(sees_all, over_image, in_windows, *operands)
        x = x + einsum_lowp("bsnh,nhd->bsd", mixed, w["o"], dtype, dtype) + w["o_bias"].astype(dtype)
        x = x + _mlp(v, w, _norm(v, w, "mlp_norm", x), dtype)
        return constrain(x, "batch", None, None), None

    x, _ = jax.lax.scan(block, x, (params["layers"], jnp.asarray(whole)))
    return _merge(v, params, x.reshape(b, windows * v.layout.units, v.layout.merge**2, v.width), dtype)


def image_tokens(embeddings: Float[Array, "B U E"], images: Images) -> ImageTokens:
    """The tokens of images in the prompts themselves, as rows."""
    b, units, width = embeddings.shape
    index = jnp.where(images.unit >= 0, images.unit + units * jnp.arange(b)[:, None], -1)
    return ImageTokens(embeddings.reshape(b * units, width), index, images.positions)


def places(v: Vision, images: ImageWindows) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Bool[Array, "B S"]]:
    """Row and column of each patch in its image, and whether it is a patch of the image at all."""
    down, right = (jnp.asarray(x) for x in v.layout.offsets())
    row, column = images.corner[..., :1] + down, images.corner[..., 1:] + right
    real = (row < images.grid[..., :1]) & (column < images.grid[..., 1:])
    b = row.shape[0]
    return row.reshape(b, -1), column.reshape(b, -1), real.reshape(b, -1)


def _rotary(v: Vision) -> Rotary:
    """The first half of a head's pairs is rotated by the row, and the second by the column."""
    frequencies = plain_frequencies(v.head_dim // 2, _ROTARY_BASE)
    return Rotary(frequencies * 2, axes=(0,) * len(frequencies) + (1,) * len(frequencies))


def embed_patches(
    v: Vision, weight: Float[Array, "D channels frames pixels"], patches: UInt8[Array, "B W k c"], dtype: DTypeLike
) -> Float[Array, "B S D"]:
    """Grey values, brought to the tower's range, times the matrix of patches.

    A still image is the same in all frames, so that the matrices of the frames are added up first.
    """
    b = patches.shape[0]
    x = patches.reshape(b, -1, v.channels, v.patch**2).astype(jnp.float32) / 255
    mean, std = (jnp.asarray(n, jnp.float32)[:, None] for n in (v.mean, v.std))
    return einsum_lowp("bsic,dic->bsd", (x - mean) / std, weight.astype(jnp.float32).sum(axis=2), dtype, dtype)


def _norm(v: Vision, w: Weights, name: str, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """RMSNorm, or LayerNorm where the tower has it, in float32."""
    x32 = x.astype(jnp.float32)
    if v.layer_norm:
        x32 = x32 - x32.mean(axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + _NORM_EPS) * w[name].astype(jnp.float32)
    return (y + w[f"{name}_bias"].astype(jnp.float32) if v.layer_norm else y).astype(x.dtype)


def _mlp(v: Vision, w: Weights, x: Float[Array, "B S D"], dtype: DTypeLike) -> Float[Array, "B S D"]:
    def linear(name: str, x: Array, spec: str) -> Array:
        return einsum_lowp(spec, x, w[name], dtype, dtype) + w[f"{name}_bias"].astype(dtype)

    up = linear("up", x, "bsd,df->bsf")
    inner = jax.nn.silu(linear("gate", x, "bsd,df->bsf")) * up if v.gated else up * jax.nn.sigmoid(_FAST_GELU * up)
    return linear("down", inner, "bsf,fd->bsd")


def _attend(
    q: Float[Array, "*n q N h"],
    k: Float[Array, "*n k N h"],
    v: Float[Array, "*n k N h"],
    visible: Bool[Array, "*n q k"],
) -> Float[Array, "*n q N h"]:
    """Bidirectional attention with a float32 softmax."""
    scores = jnp.einsum("...qnh,...knh->...nqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[..., None, :, :], scores, MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("...nqk,...knh->...qnh", weights, v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype)


def _attend_in_windows(
    q: Float[Array, "B S N h"],
    k: Float[Array, "B S N h"],
    v: Float[Array, "B S N h"],
    real: Bool[Array, "B S"],
    windows: int,
) -> Float[Array, "B S N h"]:
    """Each patch attends to the patches of its window."""

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], windows, -1, *x.shape[2:])

    return _attend(cut(q), cut(k), cut(v), cut(real)[:, :, None]).reshape(q.shape)


def _attend_over_image(
    q: Float[Array, "B S N h"],
    k: Float[Array, "B S N h"],
    v: Float[Array, "B S N h"],
    real: Bool[Array, "B S"],
    image: Int[Array, "B S"],
    windows: int,
) -> Float[Array, "B S N h"]:
    """Each patch attends to the patches of its image, some queries at a time, so that their scores fit in memory.

    Args:
      image: index of each patch's image in its prompt.
    """

    def some(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        queries, image_of = part
        return None, _attend(queries, k, v, real[:, None] & (image_of[:, :, None] == image[:, None]))

    parts = next(n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= _QUERY_WINDOWS)

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1)

    _, out = jax.lax.scan(jax.checkpoint(some), None, (cut(q), cut(image)))
    return out.swapaxes(0, 1).reshape(q.shape)


def _merge(v: Vision, params: Weights, x: Float[Array, "B U m D"], dtype: DTypeLike) -> Float[Array, "B U E"]:
    """The embedding of each unit, from the m patches of the unit."""
    x = _norm(v, params, "merger_norm", x)
    x = x.reshape(*x.shape[:2], -1)
    up = einsum_lowp("bud,df->buf", x, params["merger_up"], dtype, dtype) + params["merger_up_bias"].astype(dtype)
    down = einsum_lowp("buf,fe->bue", jax.nn.gelu(up, approximate=False), params["merger_down"], dtype, dtype)
    return down + params["merger_down_bias"].astype(dtype)
