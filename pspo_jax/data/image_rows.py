"""Rows of a tokenised data set that have images: their patches, their share of the tokens, and broken ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, UInt8

from pspo_jax.data.conversations import IMAGE_MARK
from pspo_jax.data.files import Records, as_records
from pspo_jax.data.images.cache import PatchCache, keep_all
from pspo_jax.data.images.processor import ImageError, ImageProcessor
from pspo_jax.data.images.prompt_images import PromptImages, first_of
from pspo_jax.data.images.prompts import VisualInput
from pspo_jax.data.images.reading import image_bytes
from pspo_jax.data.loading import Source
from pspo_jax.data.mixing import Picked, keep_only
from pspo_jax.data.tokenising import column_array, unusable
from pspo_jax.system.storage import StorageError

if TYPE_CHECKING:
    import datasets

_ANNOUNCED_FROM = 200
"""Images from which on decoding is announced."""


def text_records(source: Source) -> Records:
    """The records of a source without its column of images."""
    records = as_records(source.records)
    return records if source.image_column is None else records.without(source.image_column)


def say_unmarked(rows: datasets.Dataset, reason: np.ndarray, name: str, say: Callable[[str], None]) -> None:
    """Says how many rows have images whose places nothing marks."""
    counts = _counts(rows)
    some = np.flatnonzero((reason == "") & (counts > 0))
    if unmarked := sum(IMAGE_MARK not in text for text in rows.select(some)["text"]) if len(some) else 0:
        say(f"{name}: {unmarked:,} prompts do not mark the places of their images by {IMAGE_MARK}; images come first")


def name_images(
    rows: datasets.Dataset, reason: np.ndarray, lengths: Int[np.ndarray, "n"], most: int, processor: ImageProcessor
) -> None:
    """Changes the reason of rows that are too long with their images, so that it names the images' share."""
    tokens = _tokens(rows, processor)
    long = np.flatnonzero((reason != "") & (lengths > most) & (tokens > 0))
    if not len(long):
        return
    worst = long[np.argmax(lengths[long])]
    reason[long] = (
        f"longer than prompt.max_tokens={most} with images (up to {lengths[worst]:,} tokens, {tokens[worst]:,} of them "
        "for images; prompt.max_pixels bounds these)"
    )


def kept_images(pick: Picked, sources: Sequence[Source], patches: PatchCache, say: Callable[[str], None]) -> Picked:
    """`pick` without the rows whose images cannot be decoded; the patches of all others are in the cache afterwards.

    Raises:
      StorageError: the cache cannot be written.
    """
    rows = pick.rows.select(pick.keep)
    found = {key: (i, j, grid) for i, j, key, grid in _images(rows)}
    wanted = {key: grid for key, (_, _, grid) in found.items()}
    missing = sum(patches.find(key, grid) is None for key, grid in wanted.items())
    if missing >= _ANNOUNCED_FROM:
        say(f"decoding {missing:,} images (once; their patches are kept in {patches.folder})")
    read = _reader(rows, sources)
    broken = keep_all(patches, wanted, lambda key: read(*found[key][:2], key))
    if not broken:
        return pick
    parts, keep = column_array(rows, "part"), pick.keep
    reasons = {i: (int(parts[i]), unusable(broken[key])) for i, _, key, _ in _images(rows) if key in broken}
    for part, reason in dict.fromkeys(reasons.values()):
        bad = keep[[i for i, why in reasons.items() if why == (part, reason)]]
        pick = keep_only(pick, pick.keep[~np.isin(pick.keep, bad)], sources[part].name, reason)
    return pick


def prompt_images(
    rows: datasets.Dataset, sources: Sequence[Source], visual: VisualInput | None, patches: PatchCache | None
) -> PromptImages | None:
    """The images of prompts; None if they have none.

    Args:
      rows: the rows that are prompts.
      sources: the source of each value of the column part.
    """
    if visual is None or patches is None or not any(source.images for source in sources):
        return None
    counts = _counts(rows)
    if not counts.any():
        return None
    found = list(_images(rows))
    read = _reader(rows, sources)

    def patches_of_image(number: int) -> UInt8[np.ndarray, "n c"]:
        """The patches of an image, which is decoded again if the cache has lost it."""
        i, j, key, grid = found[number]
        kept = patches.find(key, grid)
        if kept is not None:
            return kept
        try:
            patches.keep(key, read(i, j, key))
        except ImageError as error:
            raise StorageError(f"{patches.path(key)}: is lost, and cannot be made again: {error}") from error
        again = patches.find(key, grid)
        if again is None:
            raise StorageError(f"{patches.path(key)}: was written, and cannot be read; check the disk")
        return again

    return PromptImages(
        first_of(counts),
        np.array([grid for *_, grid in found], np.int32).reshape(-1, 2),
        [key for _, _, key, _ in found],
        patches_of_image,
        visual.processor,
        visual.image_id,
    )


def _counts(rows: datasets.Dataset) -> Int[np.ndarray, "n"]:
    """Number of images of each row."""
    return np.array([len(keys) for keys in rows["images"]], np.int64)


def _tokens(rows: datasets.Dataset, processor: ImageProcessor) -> Int[np.ndarray, "n"]:
    """Number of tokens that each row's images have together."""
    grids = [zip(sides[::2], sides[1::2], strict=True) for sides in rows["grids"]]
    return np.array([sum(processor.num_tokens(grid) for grid in pairs) for pairs in grids], np.int64)


def _images(rows: datasets.Dataset) -> Iterator[tuple[int, int, str, tuple[int, int]]]:
    """For each image: its row, its place in the row, its key and its grid."""
    for i, (keys, sides) in enumerate(zip(rows["images"], rows["grids"], strict=True)):
        for j, key in enumerate(keys):
            yield i, j, key, (sides[2 * j], sides[2 * j + 1])


def _reader(rows: datasets.Dataset, sources: Sequence[Source]) -> Callable[[int, int, str], bytes]:
    """A function from an image's row, its place in the row and its key to its bytes."""
    records = [as_records(source.records) for source in sources]

    def read(i: int, j: int, key: str) -> bytes:
        row = rows[i]
        part = row["part"]
        images = sources[part].images
        assert images is not None
        stored = records[part].table[row["row"]]
        data = image_bytes(images(records[part].plain(stored))[j], records[part].folder(stored))
        if hashlib.sha256(data).hexdigest() != key:
            raise ImageError("its file has changed since the prompts were tokenised")
        return data

    return read
