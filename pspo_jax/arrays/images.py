"""The images of a batch of prompts, cut into windows, and how NumPy lays them out before a step.

A vision tower reads an image as a grid of patches. Squares of merge x merge patches become one token each: such a
square is a unit here. Some blocks of the tower attend within windows, which are squares of window x window patches, cut
from the image's top left corner; those at the right and bottom edges are cut off. Shapes must not depend on the size of
an image, so every prompt has room for the same number of whole windows, and patches beyond an image's edge are zeros.

Patches of a window are ordered by unit: the units row by row, and within each unit its patches row by row. A window of
4 x 4 patches with units of 2 x 2 has this order:

     0  1 |  4  5
     2  3 |  6  7
    -------------
     8  9 | 12 13
    10 11 | 14 15

Neighbours in this order make a unit, so that merging is a reshape, and a window is a run, so that attention within
windows is one too.

Positions have three axes: time, row and column. On a text token all three are equal. The tokens of an image that begins
at position p have time p, row p + i and column p + j for unit (i, j); the text behind it goes on at p + max(rows,
columns) of its units. Behind a prompt all axes are equal again: token t of a completion is at length + delta + t.

A tower that does not train makes the same embeddings of an image in every step. A batch then holds these in place of
patches, one for each token of an image in the order of the tokens, and windows do not matter.

Letters: B prompts, P longest prompt in tokens, W windows of a prompt, k patches of a window, u units of a window, c
numbers of a patch, U most tokens that the images of a prompt have, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8


class PatchLayout(NamedTuple):
    """The sizes by which a vision tower cuts images."""

    merge: int = 2
    """Patches along each side of a unit."""
    window: int = 8
    """Patches along each side of a window, a multiple of `merge`."""

    @property
    def patches(self) -> int:
        """Number of patches of a whole window, k."""
        return self.window**2

    @property
    def units(self) -> int:
        """Number of units of a whole window, u."""
        return (self.window // self.merge) ** 2

    def num_tokens(self, rows: int, columns: int) -> int:
        """Number of tokens of an image of so many rows and columns of patches."""
        return rows * columns // self.merge**2

    def num_windows(self, rows: int, columns: int) -> int:
        """Number of windows of an image of so many rows and columns of patches."""
        return -(-rows // self.window) * -(-columns // self.window)

    def offsets(self) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "k"]]:
        """Row and column within its window of each patch, in the order of patches."""
        across, m = self.window // self.merge, self.merge
        row, column = np.divmod(np.arange(self.patches), self.window)

        def by_unit(x: np.ndarray) -> np.ndarray:
            return x.reshape(across, m, across, m).swapaxes(1, 2).reshape(-1).astype(np.int32)

        return by_unit(row), by_unit(column)


@struct.dataclass
class ImageWindows:
    """The images of a batch of prompts, for the tower. A prompt without images has empty windows alone."""

    patches: UInt8[Array, "B W k c"]
    """Grey values of each patch in each channel, (channel, row, column); 0 beyond an image's edge."""
    image: Int[Array, "B W"]
    """Index, within the prompt, of the image that each window belongs to; -1 = the window is empty."""
    corner: Int[Array, "B W 2"]
    """Row and column, in patches, of each window's first patch in its image."""
    grid: Int[Array, "B W 2"]
    """Rows and columns, in patches, of the whole image; 0 where the window is empty."""
    unit: Int[Array, "B P"]
    """Index of the unit that each token stands for, among the W u units of the prompt; -1 = the token is text."""
    positions: Int[Array, "B P 3"]
    """Positions of each token on the three axes. Padding goes on behind the prompt."""
    delta: Int[Array, "B"]
    """Position behind the prompt minus the prompt's length in tokens, at most 0."""


@struct.dataclass
class ImageEmbeddings:
    """The images of a batch of prompts as the tower has encoded them before."""

    embeddings: Float[Array, "B U E"]
    """Embeddings of the tokens of each prompt's images, in their order; 0 behind the last one."""
    unit: Int[Array, "B P"]
    """Index of each token's embedding among those of its prompt; -1 = the token is text."""
    positions: Int[Array, "B P 3"]
    """Positions of each token on the three axes. Padding goes on behind the prompt."""
    delta: Int[Array, "B"]
    """Position behind the prompt minus the prompt's length in tokens, at most 0."""


Images = ImageWindows | ImageEmbeddings
"""The images of a batch of prompts in either form."""


class ImagePlace(Protocol):
    """The place of an image in its prompt, and its size."""

    @property
    def first_token(self) -> int:
        """Index, within the prompt, of the image's first token."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the image in patches."""
        ...

    @property
    def columns(self) -> int:
        """Columns of the image in patches."""
        ...


class PlacedImage(NamedTuple):
    """One image of a prompt."""

    first_token: int
    """Index, within the prompt, of the image's first token; its tokens are a run."""
    rows: int
    """Rows of the image in patches, a multiple of `PatchLayout.merge`."""
    columns: int
    """Columns of the image in patches, a multiple of `PatchLayout.merge`."""
    patches: UInt8[np.ndarray, "n c"]
    """Its patches in the order of image processors: by units, row by row, and within each unit row by row."""


class EmbeddedImage(NamedTuple):
    """One image of a prompt that the tower has encoded before; the first three fields are those of `PlacedImage`."""

    first_token: int
    rows: int
    columns: int
    embeddings: Float[np.ndarray, "n E"]
    """Embeddings of its tokens, row by row."""


def lay_out(
    prompts: Sequence[Sequence[PlacedImage]],
    lengths: Sequence[int],
    longest: int,
    windows: int,
    patch_numbers: int,
    layout: PatchLayout,
) -> ImageWindows:
    """The images of a batch as arrays of fixed shapes, in NumPy.

    Args:
      prompts: the images of each prompt in the order of their tokens.
      lengths: tokens of each prompt.
      longest: tokens for which a prompt has room, P.
      windows: windows for which a prompt has room, W.
      patch_numbers: numbers of a patch, c.
      layout: the sizes of the tower.
    Raises:
      ValueError: a prompt has more windows than there is room for, or an image does not fit its tokens or patches.
    """
    b = len(prompts)
    patches = np.zeros((b, windows, layout.patches, patch_numbers), np.uint8)
    image_of = np.full((b, windows), -1, np.int32)
    corner, grid = np.zeros((b, windows, 2), np.int32), np.zeros((b, windows, 2), np.int32)
    unit = np.full((b, longest), -1, np.int32)
    positions, delta = np.zeros((b, longest, 3), np.int32), np.zeros(b, np.int32)
    for i, (images, length) in enumerate(zip(prompts, lengths, strict=True)):
        _check(images, length, windows, layout)
        positions[i], delta[i] = token_positions(images, length, longest, layout)
        first = 0
        for number, image in enumerate(images):
            part = slice(first, first + layout.num_windows(image.rows, image.columns))
            tokens = slice(image.first_token, image.first_token + layout.num_tokens(image.rows, image.columns))
            source, corner[i, part] = window_patches(image.rows, image.columns, layout)
            patches[i, part] = np.where(source[..., None] >= 0, image.patches[source], 0)
            image_of[i, part] = number
            grid[i, part] = image.rows, image.columns
            unit[i, tokens] = first * layout.units + _unit_of_token(source, layout)
            first = part.stop

    return ImageWindows(
        patches=_host(patches),
        image=_host(image_of),
        corner=_host(corner),
        grid=_host(grid),
        unit=_host(unit),
        positions=_host(positions),
        delta=_host(delta),
    )


def lay_out_embeddings(
    prompts: Sequence[Sequence[EmbeddedImage]],
    lengths: Sequence[int],
    longest: int,
    room: tuple[int, int],
    dtype: DTypeLike,
    layout: PatchLayout,
) -> ImageEmbeddings:
    """The images of a batch whose embeddings are known, as arrays of fixed shapes, in NumPy.

    Args:
      room: tokens of images for which a prompt has room, U, and the width of an embedding, E.
      dtype: type of the embeddings.
      prompts, lengths, longest, layout: as in `lay_out`.
    Raises:
      ValueError: a prompt's images have more tokens than there is room for, or an image does not fit its tokens or
        embeddings.
    """
    b = len(prompts)
    embeddings = np.zeros((b, *room), jnp.dtype(dtype))
    unit = np.full((b, longest), -1, np.int32)
    positions, delta = np.zeros((b, longest, 3), np.int32), np.zeros(b, np.int32)
    for i, (images, length) in enumerate(zip(prompts, lengths, strict=True)):
        _check_places(images, length, layout)
        positions[i], delta[i] = token_positions(images, length, longest, layout)
        first = 0
        for image in images:
            count = layout.num_tokens(image.rows, image.columns)
            if image.embeddings.shape != (count, room[1]):
                raise ValueError(f"an image of {count} tokens has embeddings of shape {image.embeddings.shape}")
            if first + count > room[0]:
                raise ValueError(f"the images of a prompt have {first + count} tokens, and there is room for {room[0]}")
            embeddings[i, first : first + count] = image.embeddings
            unit[i, image.first_token : image.first_token + count] = np.arange(first, first + count)
            first += count
    return ImageEmbeddings(_host(embeddings), _host(unit), _host(positions), _host(delta))


def _host(x: np.ndarray) -> Array:
    """An array on the host, which the devices take as they are given it."""
    return cast(Array, x)


def empty_embeddings(prompts: int, longest: int, room: tuple[int, int], dtype: DTypeLike) -> ImageEmbeddings:
    """The images of prompts that have none; the other arguments are those of `lay_out_embeddings`."""
    return ImageEmbeddings(
        embeddings=jnp.zeros((prompts, *room), dtype),
        unit=jnp.full((prompts, longest), -1, jnp.int32),
        positions=jnp.zeros((prompts, longest, 3), jnp.int32),
        delta=jnp.zeros(prompts, jnp.int32),
    )


def empty_images(prompts: int, longest: int, windows: int, patch_numbers: int, layout: PatchLayout) -> ImageWindows:
    """The images of prompts that have none; the other arguments are those of `lay_out`."""
    return ImageWindows(
        patches=jnp.zeros((prompts, windows, layout.patches, patch_numbers), jnp.uint8),
        image=jnp.full((prompts, windows), -1, jnp.int32),
        corner=jnp.zeros((prompts, windows, 2), jnp.int32),
        grid=jnp.zeros((prompts, windows, 2), jnp.int32),
        unit=jnp.full((prompts, longest), -1, jnp.int32),
        positions=jnp.zeros((prompts, longest, 3), jnp.int32),
        delta=jnp.zeros(prompts, jnp.int32),
    )


def _check(images: Sequence[PlacedImage], length: int, windows: int, layout: PatchLayout) -> None:
    """Raise ValueError unless a prompt's images fit its tokens, its windows and their own patches."""
    needed = sum(layout.num_windows(x.rows, x.columns) for x in images)
    if needed > windows:
        raise ValueError(f"the images of a prompt have {needed} windows, and there is room for {windows}")
    for x in images:
        if len(x.patches) != x.rows * x.columns:
            raise ValueError(f"an image of {x.rows} x {x.columns} patches has {len(x.patches)} patches")
    _check_places(images, length, layout)


def _check_places(images: Sequence[ImagePlace], length: int, layout: PatchLayout) -> None:
    """Raise ValueError unless a prompt's images fit its tokens."""
    end = 0
    for x in images:
        if x.rows % layout.merge or x.columns % layout.merge or x.rows < 1 or x.columns < 1:
            raise ValueError(f"an image has {x.rows} x {x.columns} patches; each must be a multiple of {layout.merge}")
        if x.first_token < end:
            raise ValueError(f"an image begins at token {x.first_token}, inside the one before it")
        end = x.first_token + layout.num_tokens(x.rows, x.columns)
    if end > length:
        raise ValueError(f"an image ends at token {end} of a prompt of {length} tokens")


def window_patches(
    rows: int, columns: int, layout: PatchLayout
) -> tuple[Int[np.ndarray, "w k"], Int[np.ndarray, "w 2"]]:
    """For each window of an image, the indices of its patches in the processor's order, -1 = none; and its corner."""
    m, size = layout.merge, layout.window
    corner = np.stack(
        np.meshgrid(np.arange(0, rows, size), np.arange(0, columns, size), indexing="ij"), axis=-1
    ).reshape(-1, 2)
    down, right = layout.offsets()
    row, column = corner[:, :1] + down, corner[:, 1:] + right
    index = (row // m * (columns // m) + column // m) * m * m + row % m * m + column % m
    return np.where((row < rows) & (column < columns), index, -1), corner.astype(np.int32)


def _unit_of_token(source: Int[np.ndarray, "w k"], layout: PatchLayout) -> Int[np.ndarray, "n"]:
    """For each token of an image, row by row, the index of its unit among those of the image's windows."""
    area = layout.merge**2
    token = source.reshape(-1, area)[:, 0] // area  # -1 where there is no patch
    found = np.empty((token >= 0).sum(), np.int64)
    found[token[token >= 0]] = np.nonzero(token >= 0)[0]
    return found


def token_positions(
    images: Sequence[ImagePlace], length: int, longest: int, layout: PatchLayout
) -> tuple[Int[np.ndarray, "P 3"], int]:
    """Positions of a prompt's tokens on the three axes, padding included, and `Images.delta`.

    Args:
      longest: tokens for which the prompt has room, P.
    """
    step = np.ones(longest, np.int64)
    within = np.zeros((longest, 3), np.int64)
    for x in images:
        down, right = x.rows // layout.merge, x.columns // layout.merge
        tokens = slice(x.first_token, x.first_token + down * right)
        step[tokens] = 0
        step[tokens.stop - 1] = max(down, right)
        row, column = np.divmod(np.arange(down * right), right)
        within[tokens, 1], within[tokens, 2] = row, column
    before = np.cumsum(step) - step
    return (before[:, None] + within).astype(np.int32), int(step[:length].sum()) - length
