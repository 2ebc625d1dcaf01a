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
    v: Vision, rng: np.random.Generator, parts: Sequence[Sequence[Part]], windows: int = 0, longest: int = 0
) -> VisualPrompts:
    """Prompts of these parts; `windows` and `longest` ask for more room than they need."""
    tokens: list[list[int]] = []
    placed: list[list[PlacedImage]] = []
    for of_prompt in parts:
        ids: list[int] = []
        images: list[PlacedImage] = []
        for part in of_prompt:
            if isinstance(part, int):
                ids += rng.integers(3, TEXT, part).tolist()
                continue
            ids.append(START)
            images.append(PlacedImage(len(ids), part.rows, part.columns, part.patches))
            ids += [IMAGE] * v.layout.num_tokens(part.rows, part.columns) + [END]
        tokens.append(ids)
        placed.append(images)
    lengths = [len(ids) for ids in tokens]
    longest = max(longest, *lengths) + 3
    needed = max(sum(v.layout.num_windows(x.rows, x.columns) for x in of_prompt) for of_prompt in placed)
    laid_out = lay_out(placed, lengths, longest, max(windows, needed, 1), v.patch_numbers, v.layout)
    padded = np.zeros((len(tokens), longest), np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    count = len(tokens)
    arrays = np.arange(count), padded, np.asarray(lengths, np.int32), np.ones(count, np.float32)
    prompts = Prompts(*(cast(Array, x) for x in arrays))
    return VisualPrompts(tokens, [[x for x in of if isinstance(x, Picture)] for of in parts], prompts, laid_out)
