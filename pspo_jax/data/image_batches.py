"""Batches of chosen prompts with their images, and the room that a batch has for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.images import (
    ImageEmbeddings,
    Images,
    ImageWindows,
    PatchLayout,
    PlacedImage,
    empty_embeddings,
    empty_images,
    lay_out,
    lay_out_embeddings,
)
from pspo_jax.arrays.state import Prompts
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.images.embedding_cache import EmbeddingCache
from pspo_jax.data.images.prompt_images import PromptImages
from pspo_jax.data.loading import NO_IMAGES
from pspo_jax.data.task import Demonstrations, PromptDataset
from pspo_jax.model.architecture import Vision
from pspo_jax.system.storage import StorageError


class ImageBatch(NamedTuple):
    """B prompts with their images, on the host."""

    tokens: Int[np.ndarray, "B P"]
    """Token ids, padded on the right; a run of the image token stands for each image."""
    lengths: Int[np.ndarray, "B"]
    """Tokens of each prompt."""
    images: Sequence[Sequence[PlacedImage]]
    """Images of each prompt in the order of their tokens; none where a prompt has none."""


class BatchRoom(Protocol):
    """The sizes of the arrays that hold the images of a batch. All batches of a run have the same."""

    def empty(self, prompts: int, longest: int) -> Images:
        """The images of prompts that have none; a prompt has room for `longest` tokens."""
        ...

    def of_rows(
        self,
        images: PromptImages | None,
        rows: Int[np.ndarray, "B"],
        tokens: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, "B"],
    ) -> Images:
        """The images of prompts, on the host.

        Args:
          images: those of the data set; None = it has none.
          rows: the prompts' rows in the data set.
          tokens: their tokens, padded.
          lengths: tokens of each.
        """
        ...


class ImageRoom(NamedTuple):
    """Room for the images of a batch as the patches that a tower encodes in every step; a `BatchRoom`."""

    windows: int
    """Windows for which a prompt has room, W."""
    patch_numbers: int
    """Numbers of a patch, c."""
    layout: PatchLayout
    """The sizes of the tower."""

    def empty(self, prompts: int, longest: int) -> ImageWindows:
        """The images of prompts that have none; a prompt has room for `longest` tokens."""
        return empty_images(prompts, longest, self.windows, self.patch_numbers, self.layout)

    def laid_out(
        self, images: Sequence[Sequence[PlacedImage]], lengths: Int[np.ndarray, "B"], longest: int
    ) -> ImageWindows:
        """The images of prompts of these lengths in tokens, on the host."""
        return lay_out(images, lengths.tolist(), longest, self.windows, self.patch_numbers, self.layout)

    def of_rows(
        self,
        images: PromptImages | None,
        rows: Int[np.ndarray, "B"],
        tokens: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, "B"],
    ) -> ImageWindows:
        """See `BatchRoom`; patches are read as in `image_batch`."""
        return self.laid_out(_placed(images, rows, tokens, lengths), lengths, tokens.shape[1])


class EmbeddingTable(NamedTuple):
    """The embeddings of all images that a run reads, on disk."""

    cache: EmbeddingCache
    digests: Mapping[str, str]
    """Key of each image (`PromptImages.keys`) -> its digest in the cache."""

    def read(self, key: str, tokens: int) -> Float[np.ndarray, "n E"]:
        """The embeddings of an image of so many tokens; raises StorageError if they are gone or damaged by now."""
        found = self.cache.find(self.digests[key], tokens)
        if found is None:
            path = self.cache.path(self.digests[key])
            raise StorageError(f"{path}: is lost or damaged; the same command computes it again, and carries on")
        return found


class EmbeddingRoom(NamedTuple):
    """Room for the images of a batch as the embeddings that a frozen tower has made of them; a `BatchRoom`."""

    tokens: int
    """Tokens of images for which a prompt has room, U."""
    width: int
    """Width of an embedding, E."""
    dtype: str
    """Type of the embeddings."""
    layout: PatchLayout
    """The sizes of the tower."""
    table: EmbeddingTable | None = None
    """The embeddings; None = they are not computed yet (training/image_table.py), and no batch can be made."""

    def empty(self, prompts: int, longest: int) -> ImageEmbeddings:
        """The images of prompts that have none; a prompt has room for `longest` tokens."""
        return empty_embeddings(prompts, longest, (self.tokens, self.width), self.dtype)

    def of_rows(
        self,
        images: PromptImages | None,
        rows: Int[np.ndarray, "B"],
        tokens: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, "B"],
    ) -> ImageEmbeddings:
        """See `BatchRoom`.

        Raises:
          ValueError: the embeddings are not computed yet.
          StorageError: those of an image are gone or damaged by now.
        """
        if self.table is None:
            raise ValueError("the embeddings of images are not computed yet; give the room that `fill` returns")
        read = self.table.read
        found = [
            [] if images is None else images.embedded(int(row), ids[:n].tolist(), read)
            for row, ids, n in zip(rows, tokens, lengths, strict=True)
        ]
        room = self.tokens, self.width
        return lay_out_embeddings(found, lengths.tolist(), tokens.shape[1], room, self.dtype, self.layout)


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


def embedding_room(room: ImageRoom | None, width: int, dtype: str, *parts: PromptDataset) -> EmbeddingRoom | None:
    """Room for the embeddings of the prompt of these data sets whose images have most tokens.

    Args:
      room: `image_room` of the same data sets; None = no prompt has images, and the result is None too.
      width: width of an embedding.
      dtype: type of the embeddings.
    """
    if room is None:
        return None
    tokens = max(int(part.images.tokens().max(initial=1)) for part in parts if part.images is not None)
    return EmbeddingRoom(tokens, width, dtype, room.layout)


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
    return ImageBatch(tokens, lengths, _placed(prompts.images, rows, tokens, lengths))


def _placed(
    images: PromptImages | None,
    rows: Int[np.ndarray, "B"],
    tokens: Int[np.ndarray, "B P"],
    lengths: Int[np.ndarray, "B"],
) -> list[list[PlacedImage]]:
    """The images of each prompt with their patches; the arguments are those of `BatchRoom.of_rows`."""
    if images is None:
        return [[] for _ in rows]
    return [images.of(int(row), ids[:n].tolist()) for row, ids, n in zip(rows, tokens, lengths, strict=True)]


def laid_out_images(prompts: PromptDataset, rows: Int[np.ndarray, "B"], room: ImageRoom) -> Images:
    """The images of these rows as arrays on the host."""
    batch = image_batch(prompts, rows)
    return room.laid_out(batch.images, batch.lengths, batch.tokens.shape[1])


def gather(
    prompts: PromptDataset,
    rows: Int[np.ndarray, "B"],
    loss_weight: Float[np.ndarray, "B"],
    room: BatchRoom | None = None,
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

    tokens, lengths = prompts.tokens[rows], prompts.lengths[rows]
    return Prompts(
        ids=host(rows),
        tokens=host(tokens),
        lengths=host(lengths),
        loss_weight=host(np.asarray(loss_weight)),
        images=None if room is None else room.of_rows(prompts.images, rows, tokens, lengths),
    )
