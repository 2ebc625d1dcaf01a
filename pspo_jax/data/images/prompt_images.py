"""The images of a data set's prompts, addressed by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from pspo_jax.arrays.images import EmbeddedImage, PlacedImage
from pspo_jax.data.images.processor import ImageProcessor
from pspo_jax.data.images.prompts import first_tokens


class PromptImages(NamedTuple):
    """The images of N prompts, M in all. An image that occurs in several prompts counts in each of them."""

    first: Int[np.ndarray, "N+1"]
    """The images of prompt i are the numbers from first[i] to first[i + 1], in the order of their tokens."""
    grids: Int[np.ndarray, "M 2"]
    """Rows and columns of patches of each image."""
    keys: Sequence[str]
    """A text for each image that is equal for equal images alone, such as a hash of its bytes."""
    read: Callable[[int], UInt8[np.ndarray, "n c"]]
    """A function from an image's number to its patches."""
    processor: ImageProcessor
    """Sizes of patches and units, and the constants by which a tower's input is made of grey values."""
    image_id: int
    """Id of the token that stands for a unit of an image."""

    def of(self, prompt: int, ids: Sequence[int]) -> list[PlacedImage]:
        """The images of a prompt.

        Args:
          ids: the prompt's ids, without padding.
        """
        return [PlacedImage(place, *grid, self.read(i)) for i, place, grid in self._places(prompt, ids)]

    def embedded(
        self, prompt: int, ids: Sequence[int], embeddings: Callable[[str, int], Float[np.ndarray, "n E"]]
    ) -> list[EmbeddedImage]:
        """The images of a prompt by their embeddings; no patch is read.

        Args:
          ids: the prompt's ids, without padding.
          embeddings: a function from an image's key and its number of tokens to the embeddings of these.
        """
        return [
            EmbeddedImage(place, *grid, embeddings(self.keys[i], self.processor.num_tokens(grid)))
            for i, place, grid in self._places(prompt, ids)
        ]

    def _places(self, prompt: int, ids: Sequence[int]) -> list[tuple[int, int, tuple[int, int]]]:
        """Number, first token and grid of each image of a prompt."""
        numbers = range(int(self.first[prompt]), int(self.first[prompt + 1]))
        grids = [self.grid(i) for i in numbers]
        places = first_tokens(ids, self.image_id, [self.processor.num_tokens(grid) for grid in grids])
        return list(zip(numbers, places, grids, strict=True))

    def grid(self, number: int) -> tuple[int, int]:
        """Rows and columns of patches of the image of a number."""
        return int(self.grids[number, 0]), int(self.grids[number, 1])

    def text(self, prompt: int, ids: Sequence[int], decode: Callable[[list[int]], str]) -> str:
        """The text of a prompt in which `[image 15x10]` stands for 15 columns and 10 rows of an image's tokens.

        Args:
          ids: the prompt's ids, without padding.
        """
        merge, out, end = self.processor.merge_size, "", 0
        grids = self.grids[self.first[prompt] : self.first[prompt + 1]].tolist()
        numbers = [self.processor.num_tokens((rows, columns)) for rows, columns in grids]
        places = first_tokens(ids, self.image_id, numbers)
        for place, number, (rows, columns) in zip(places, numbers, grids, strict=True):
            out += f"{decode(list(ids[end:place]))}[image {columns // merge}x{rows // merge}]"
            end = place + number
        return out + decode(list(ids[end:]))

    def tokens(self) -> Int[np.ndarray, "N"]:
        """Number of tokens that each prompt's images have together."""
        sums = np.concatenate([[0], np.cumsum(self.grids.prod(axis=1) // self.processor.merge_size**2)])
        return sums[self.first[1:]] - sums[self.first[:-1]]

    def identity(self) -> str:
        """Hash of all images, and of the settings on which the tower's input depends."""
        return hashlib.sha256("\0".join([self.processor.identity(), *self.keys]).encode()).hexdigest()

    def exchanged(self, seed: int) -> PromptImages:
        """The same prompts with other prompts' images of the same size: a control that may do no better than chance.

        Images of a size go to one another in a random cycle, so that each prompt gets another image wherever its own
        is not the only one of its size. Equal images count as one.
        """
        rng = np.random.default_rng(seed)
        source = list(range(len(self.keys)))
        for grid in np.unique(self.grids, axis=0):
            alike = np.flatnonzero((self.grids == grid).all(axis=1)).tolist()
            distinct = list(dict.fromkeys(self.keys[i] for i in alike))
            order = [distinct[i] for i in rng.permutation(len(distinct))]
            following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
            number = {self.keys[i]: i for i in alike}
            for i in alike:
                source[i] = number[following[self.keys[i]]]
        return self._replace(keys=[self.keys[i] for i in source], read=lambda i: self.read(source[i]))

    def all_differ(self, other: PromptImages) -> Bool[np.ndarray, "N"]:
        """Whether a prompt has images here and in `other`, a list of as many images, and none of them are equal."""
        equal = [one == two for one, two in zip(self.keys, other.keys, strict=True)]
        before = np.concatenate([[0], np.cumsum(equal, dtype=np.int64)])
        return (before[self.first[1:]] == before[self.first[:-1]]) & (np.diff(self.first) > 0)


def joined_images(parts: Sequence[PromptImages]) -> PromptImages:
    """The images of several lists of prompts, one list after the other, with the settings of the first."""
    before = first_of([len(part.keys) for part in parts])

    def read(number: int) -> UInt8[np.ndarray, "n c"]:
        part = int(np.searchsorted(before, number, side="right")) - 1
        return parts[part].read(number - int(before[part]))

    return parts[0]._replace(
        first=first_of(np.concatenate([np.diff(part.first) for part in parts])),
        grids=np.concatenate([part.grids for part in parts]),
        keys=[key for part in parts for key in part.keys],
        read=read,
    )


def first_of(counts: Sequence[int] | Int[np.ndarray, "N"]) -> Int[np.ndarray, "N+1"]:
    """`PromptImages.first` for prompts with so many images."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
