"""Patches of images on disk: made once for each distinct image, and mapped into memory wherever they are read."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from pspo_jax.data.images.processor import ImageError, ImageProcessor, patches_of
from pspo_jax.system.storage import write_whole, writing

_FORMAT = "1"
"""Version of the files, to be raised when the same image would give other patches."""


class PatchCache(NamedTuple):
    """A folder with one file for each distinct image, which several processes may read and write at the same time.

    A file is written whole under a name of its own and then renamed, so that a reader finds all of it or none. Two
    processes that write the same file write the same bytes.
    """

    folder: Path
    """The folder of one image processor; others have folders of their own beside it."""
    processor: ImageProcessor

    def path(self, key: str) -> Path:
        """The file of an image.

        Args:
          key: SHA-256 of the image's bytes, in hexadecimal.
        """
        return self.folder / key[:2] / f"{key}.npy"

    def find(self, key: str, grid: tuple[int, int]) -> UInt8[np.ndarray, "n c"] | None:
        """The patches of an image, mapped into memory and not writable; None if they are not kept yet, or cut off."""
        try:
            found = np.load(self.path(key), mmap_mode="r")
        except (OSError, ValueError, EOFError):  # there is none yet, or a failing disk has cut it off
            return None
        wanted = (grid[0] * grid[1], 3 * self.processor.patch_size**2)
        return found if found.shape == wanted and found.dtype == np.uint8 else None

    def keep(self, key: str, data: bytes) -> None:
        """Decode an image and write its patches.

        Args:
          data: the bytes of the image.
        Raises:
          ImageError: the image is broken.
          StorageError: the file cannot be written.
        """
        patches, _ = patches_of(data, self.processor)
        out = io.BytesIO()
        np.save(out, patches)
        path = self.path(key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, out.getvalue(), shared=True)


def patch_cache(folder: Path, processor: ImageProcessor) -> PatchCache:
    """The cache of an image processor's patches in a cache folder."""
    name = hashlib.sha256(f"{_FORMAT} {processor.patches_identity()}".encode()).hexdigest()[:16]
    return PatchCache(folder / "images" / name, processor)


def keep_all(
    cache: PatchCache, wanted: Mapping[str, tuple[int, int]], read: Callable[[str], bytes]
) -> dict[str, ImageError]:
    """Decode the images that are not kept yet, on as many threads as there are cores.

    Args:
      wanted: key -> grid of each image.
      read: the bytes of the image of a key; ImageError if they cannot be read.
    Returns:
      Key -> error of each image that is broken.
    Raises:
      StorageError: a file cannot be written.
    """
    missing = [key for key, grid in wanted.items() if cache.find(key, grid) is None]

    def one(key: str) -> ImageError | None:
        try:
            cache.keep(key, read(key))
        except ImageError as error:
            return error
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = zip(missing, threads.map(one, missing), strict=True)
        return {key: error for key, error in found if error is not None}
