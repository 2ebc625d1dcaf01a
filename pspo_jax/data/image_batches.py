"""Batches of chosen prompts with their images, and the room that a batch has for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.images import Images, PatchLayout, PlacedImage, empty_images, lay_out
from pspo_jax.arrays.state import Prompts
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.images.prompt_images import PromptImages
from pspo_jax.data.loading import NO_IMAGES
from pspo_jax.data.task import Demonstrations, PromptDataset
from pspo_jax.model.architecture import Vision


class ImageBatch(NamedTuple):
    """B prompts with their images, on the host."""

    tokens: Int[np.ndarray, "B P"]
    """Token ids, padded on the right; a run of the image token stands for each image."""
    lengths: Int[np.ndarray, "B"]
    """Tokens of each prompt."""
    images: Sequence[Sequence[PlacedImage]]
    """Images of each prompt in the order of their tokens; none where a prompt has none."""


class ImageRoom(NamedTuple):
    """The sizes of the arrays that hold the images of a batch. All batches of a run have the same."""

    windows: int
    """Windows for which a prompt has room, W."""
    patch_numbers: int
    """Numbers of a patch, c."""
    layout: PatchLayout
    """The sizes of the tower."""

    def empty(self, prompts: int, longest: int) -> Images:
        """The images of prompts that have none; a prompt has room for `longest` tokens."""
        return empty_images(prompts, longest, self.windows, self.patch_numbers, self.layout)

    def laid_out(self, images: Sequence[Sequence[PlacedImage]], lengths: Int[np.ndarray, "B"], longest: int) -> Images:
        """The images of prompts of these lengths in tokens, on the host."""
        return lay_out(images, lengths.tolist(), longest, self.windows, self.patch_numbers, self.layout)


def image_room(vision: Vision | None, *parts: PromptDataset | Demonstrations) -> ImageRoom | None:
    """Room for the images of the prompt of these data sets that has most windows; None if no prompt has images.

    Args:
      vision: the model's vision tower; None = it has none.
    Raises:
      ConfigError: there are images, and the model has no tower, or one for other patches.
    """
    found = [part.images for part in parts if part.images is not None]
    if not found:
        return None
    if vision is None:
        raise ConfigError(
            "model.source: the prompts have images, and this model has no vision tower; name a checkpoint that has "
            f"one, or set task.image_column={NO_IMAGES}"
        )
    for images in found:
        sizes = images.processor.patch_size, images.processor.merge_size
        if sizes != (vision.patch, vision.layout.merge):
            raise ConfigError(
                f"model.source: its image processor has patch_size={sizes[0]} and merge_size={sizes[1]}, and its "
                f"vision tower {vision.patch} and {vision.layout.merge}; use the processor's files of the same model"
            )
    windows = max(_most_windows(images, vision.layout) for images in found)
    return ImageRoom(windows, vision.patch_numbers, vision.layout)


def _most_windows(images: PromptImages, layout: PatchLayout) -> int:
    """Windows of the prompt that has most of them."""
    of_image = (-(-images.grids // layout.window)).prod(axis=1)
    before = np.concatenate([[0], np.cumsum(of_image)])
    return int((before[images.first[1:]] - before[images.first[:-1]]).max(initial=1))


def image_batch(prompts: PromptDataset, rows: Int[np.ndarray, "B"]) -> ImageBatch:
    """The prompts of a data set with these rows.

    Patches are read from the cache of patches, through a memory map; an image that is not there any more is decoded
    again.
    """
    tokens, lengths = prompts.tokens[rows], prompts.lengths[rows]
    if prompts.images is None:
        return ImageBatch(tokens, lengths, [[] for _ in rows])
    of = prompts.images.of
    found = [of(int(row), ids[:n].tolist()) for row, ids, n in zip(rows, tokens, lengths, strict=True)]
    return ImageBatch(tokens, lengths, found)


def laid_out_images(prompts: PromptDataset, rows: Int[np.ndarray, "B"], room: ImageRoom) -> Images:
    """The images of these rows as arrays on the host."""
    batch = image_batch(prompts, rows)
    return room.laid_out(batch.images, batch.lengths, batch.tokens.shape[1])


def gather(
    prompts: PromptDataset,
    rows: Int[np.ndarray, "B"],
    loss_weight: Float[np.ndarray, "B"],
    room: ImageRoom | None = None,
) -> Prompts:
    """The batch of these rows as arrays on the host; `processes.to_global` puts it on the devices.

    Args:
      room: room for images; None = no prompt of the run has any.
    Raises:
      ValueError: the prompts have images, and there is no room for them.
    """
    if prompts.images is not None and room is None:
        raise ValueError("the prompts have images, and the batch has no room for them; give the room of `image_room`")

    def host(x: np.ndarray) -> Array:
        return cast(Array, x)

    batch = image_batch(prompts, rows)
    return Prompts(
        ids=host(rows),
        tokens=host(batch.tokens),
        lengths=host(batch.lengths),
        loss_weight=host(np.asarray(loss_weight)),
        images=None if room is None else room.laid_out(batch.images, batch.lengths, batch.tokens.shape[1]),
    )
