"""Embeddings of images on disk: computed once for each distinct image and vision tower, and read by every later run."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from pspo_jax.system.storage import write_whole, writing

_FORMAT = "1"
"""Version of the files, to be raised when the same tower would give other embeddings of an image."""
_HEADER = 4
"""Bytes of the checksum with which a file begins."""


class EmbeddingCache(NamedTuple):
    """A folder with one file for each distinct image, which several processes may read and write at the same time.

    A file is a CRC-32 of what follows and of the image's digest, and then the numbers of the embeddings. It is written
    whole under a name of its own and then renamed. A file whose size or checksum is wrong counts as none.
    """

    folder: Path
    """The folder of one vision tower; others have folders of their own beside it."""
    width: int
    """Width of an embedding, E."""
    dtype: str
    """Type of the numbers."""

    def path(self, digest: str) -> Path:
        """The file of an image.

        Args:
          digest: `digest_of` the image.
        """
        return self.folder / digest[:2] / f"{digest}.bin"

    def find(self, digest: str, tokens: int) -> Float[np.ndarray, "n E"] | None:
        """The embeddings of an image of so many tokens, mapped into memory and not writable; None if they are not
        kept, or damaged."""
        found = self._mapped(digest, tokens)
        return None if found is None else found[1]

    def checksum(self, digest: str, tokens: int) -> int:
        """The checksum of an image's embeddings, equal for equal embeddings; 0 if they are not kept, or damaged."""
        found = self._mapped(digest, tokens)
        return 0 if found is None else found[0]

    def keep(self, digest: str, embeddings: Float[np.ndarray, "n E"]) -> None:
        """Write the embeddings of an image; raises StorageError if the file cannot be written."""
        numbers = np.ascontiguousarray(embeddings, jnp.dtype(self.dtype)).tobytes()
        path = self.path(digest)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _checksum(digest, numbers).to_bytes(_HEADER, "little") + numbers, shared=True)

    def _mapped(self, digest: str, tokens: int) -> tuple[int, Float[np.ndarray, "n E"]] | None:
        """Checksum and embeddings in an image's file; None if there is none, or it is damaged."""
        try:
            found = np.memmap(self.path(digest), np.uint8, "r")
        except (OSError, ValueError):  # there is none yet, or it is empty
            return None
        dtype = jnp.dtype(self.dtype)
        if found.size != _HEADER + tokens * self.width * dtype.itemsize:
            return None
        stored, numbers = int.from_bytes(found[:_HEADER].tobytes(), "little"), found[_HEADER:]
        if stored != _checksum(digest, numbers):
            return None
        return stored, numbers.view(dtype).reshape(tokens, self.width)


def _checksum(digest: str, numbers: bytes | UInt8[np.ndarray, "n"]) -> int:
    """The checksum of a file, which is never 0."""
    return zlib.crc32(np.frombuffer(numbers, np.uint8).data, zlib.crc32(digest.encode())) or 1


def digest_of(patches: UInt8[np.ndarray, "n c"], grid: tuple[int, int]) -> str:
    """SHA-256 of all that a tower sees of an image, in hexadecimal: the image and the image processor decide it.

    Args:
      grid: rows and columns of patches.
    """
    found = hashlib.sha256(f"{grid[0]} {grid[1]} {patches.shape[1]} ".encode())
    found.update(np.ascontiguousarray(patches).data)
    return found.hexdigest()


def embedding_cache(folder: Path, tower: str, width: int, dtype: str) -> EmbeddingCache:
    """The cache of a vision tower's embeddings in a cache folder.

    Args:
      tower: a text that changes with the tower's sizes and weights.
      width: width of an embedding.
      dtype: type in which the tower computes.
    """
    name = hashlib.sha256(f"{_FORMAT} {width} {dtype} {tower}".encode()).hexdigest()[:16]
    return EmbeddingCache(folder / "image_embeddings" / name, width, dtype)
