"""Rows and images in parts of equal size: microbatches, minibatches, and prompts whose images are encoded together.

Letters: B prompts, R rows, P prompt length, U units of the images of a prompt.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from pspo_jax.arrays.images import ImageEmbeddings, Images, ImageWindows
from pspo_jax.arrays.rows import Rows
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import ROWS, constrain, microbatch_size
from pspo_jax.model.interface import Model
from pspo_jax.replay import Groups

PROMPTS_ENCODED_AT_A_TIME = 8
"""Largest number of prompts whose images are encoded at a time, unless more devices share them."""
RowsOrArray = TypeVar("RowsOrArray", Rows, Array)


def split_microbatches(rows: RowsOrArray, parts: int) -> RowsOrArray:
    """[R, ...] -> [parts, R / parts, ...], dealt like cards, so that every part is spread over all devices."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def config_of_slice(config: Config, slices: int) -> Config:
    """The config with bounds of microbatches for one of several slices, whose microbatches are computed together."""
    o = config.loss
    tokens = o.microbatch_tokens
    return replace(
        config,
        {
            "loss.microbatch_rows": max(o.microbatch_rows // slices, min(o.microbatch_rows, 1)),
            "loss.microbatch_tokens": None if tokens is None else -(-tokens // slices),
        },
    )


def merge_microbatches(x: Array) -> Array:
    """The inverse of `split_microbatches` for one array."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def split_minibatches(
    rows: Rows, images: Images | None, parts: int, group_size: int, extra: int = 0
) -> tuple[Rows, Images | None]:
    """`split_microbatches` that keeps the rows of a group together, with the images to which each part points.

    Args:
      extra: number of rows at the end that are groups of one.
    """
    if images is None or rows.images is None:
        return _split_rows(rows, parts, group_size, extra), None
    first = images.delta.shape[0] - extra  # prompts of whole groups; group i becomes the i // parts-th of its part
    prompt = rows.images.prompt
    local = jnp.where(prompt < first, prompt // parts, first // parts + (prompt - first) // parts)
    rows = dataclasses.replace(rows, images=dataclasses.replace(rows.images, prompt=local))

    def split(x: Array) -> Array:
        return jnp.concatenate([split_microbatches(y, parts) for y in (x[:first], x[first:])], axis=1)

    return _split_rows(rows, parts, group_size, extra), jax.tree.map(split, images)


def _split_rows(rows: Rows, parts: int, group_size: int, extra: int) -> Rows:

    def split(x: Array, size: int) -> Array:
        groups = x.reshape(-1, size, *x.shape[1:])
        return split_microbatches(groups, parts).reshape(parts, -1, *x.shape[1:])

    def one(x: Array) -> Array:
        if not extra:
            return split(x, group_size)
        return jnp.concatenate([split(x[:-extra], group_size), split(x[-extra:], 1)], axis=1)

    return jax.tree.map(one, rows)


def images_of_batch(groups: Groups, added: Groups | None) -> Images | None:
    """The images to which `rows_of_batch` points; None = the data has none."""
    images = groups.prompts.images
    if images is None or added is None:
        return images
    found: Images = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), images, added.prompts.images)
    return found


def encoded(model: Model, weights: PyTree, images: Images | None) -> Float[Array, "B U D"] | None:
    """What the model makes of the images, some prompts at a time; None = there are none.

    A gradient through it encodes them again, some prompts at a time too.

    Raises:
      ValueError: the model reads text alone, or its encoder trains and the batch holds embeddings from before.
    """
    if images is None:
        return None
    encode = model.encode_images
    if encode is None:
        raise ValueError("the prompts have images, and this model has no `encode_images`; choose one that reads them")
    if isinstance(images, ImageEmbeddings):
        if model.trains_encoder:
            raise ValueError("the batch holds embeddings of images, and this model's encoder trains; give it patches")
        return constrain(images.embeddings, None, None, "embed")
    parts = split_images(images)
    found = merge_microbatches(jax.lax.map(jax.checkpoint(lambda part: encode(weights, part)), parts))
    # Rows of any device may need them: they are moved once, to the layout in which tokens are embedded.
    return constrain(found, None, None, "embed")


def split_images(images: ImageWindows) -> ImageWindows:
    """Images in parts of equal size, [B, ...] -> [parts, B / parts, ...], that are encoded one after another."""
    b = images.delta.shape[0]
    parts = b // microbatch_size(b, PROMPTS_ENCODED_AT_A_TIME, ROWS)
    found: ImageWindows = jax.tree.map(lambda x: split_microbatches(x, parts), images)
    return found
