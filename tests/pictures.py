"""Prompts with random images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Array

from pspo_jax.arrays.images import Images, PlacedImage, lay_out
from pspo_jax.arrays.state import Prompts
from pspo_jax.model.architecture import Vision

IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Ids of an image's tokens, of a video's, and of those around an image."""
TEXT = 80
"""Ids below this are text."""


class Picture(NamedTuple):
    """An image as an image processor gives it."""

    patches: np.ndarray
    """uint8, [rows x columns, numbers of a patch], by units."""
    rows: int
    columns: int


def picture(v: Vision, rng: np.random.Generator, rows: int, columns: int) -> Picture:
    """A random image."""
    return Picture(rng.integers(0, 256, (rows * columns, v.patch_numbers), np.uint8), rows, columns)


Part = int | Picture
"""A number of text tokens, or an image."""


class VisualPrompts(NamedTuple):
    """A batch of prompts in both forms."""

    tokens: list[list[int]]
    """Ids of each prompt."""
    pictures: list[list[Picture]]
    prompts: Prompts
    images: Images


def prompts_of(
    v: Vision,
    rng: np.random.Generator,
    parts: Sequence[Sequence[Part]],
    windows: int = 0,
    longest: int = 0,
    ids: tuple[int, int, int, int] = (IMAGE, VIDEO, START, END),
) -> VisualPrompts:
    """Prompts of these parts; `windows` and `longest` ask for more room than they need.

    Args:
      ids: ids of an image's tokens, of a video's, and of those around an image.
    """
    image_id, _, start, end = ids
    tokens: list[list[int]] = []
    placed: list[list[PlacedImage]] = []
    for of_prompt in parts:
        row: list[int] = []
        images: list[PlacedImage] = []
        for part in of_prompt:
            if isinstance(part, int):
                row += rng.integers(3, TEXT, part).tolist()
                continue
            row.append(start)
            images.append(PlacedImage(len(row), part.rows, part.columns, part.patches))
            row += [image_id] * v.layout.num_tokens(part.rows, part.columns) + [end]
        tokens.append(row)
        placed.append(images)
    lengths = [len(row) for row in tokens]
    longest = max(longest, *lengths) + 3
    needed = max(sum(v.layout.num_windows(x.rows, x.columns) for x in of_prompt) for of_prompt in placed)
    laid_out = lay_out(placed, lengths, longest, max(windows, needed, 1), v.patch_numbers, v.layout)
    padded = np.zeros((len(tokens), longest), np.int32)
    for i, row in enumerate(tokens):
        padded[i, : len(row)] = row
    count = len(tokens)
    arrays = np.arange(count), padded, np.asarray(lengths, np.int32), np.ones(count, np.float32)
    prompts = Prompts(*(cast(Array, x) for x in arrays))
    return VisualPrompts(tokens, [[x for x in of if isinstance(x, Picture)] for of in parts], prompts, laid_out)
