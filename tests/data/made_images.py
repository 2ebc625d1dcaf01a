"""Image files made by Pillow: of any size, mode and format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

FORMATS = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "TIFF"}
"""Format of the modes that PNG does not have."""


def noise(mode: str, height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of random grey values, with random transparency if its mode has any."""
    rng = np.random.default_rng([seed, height, width])
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    whole = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "RGBA":
        return whole
    if mode == "LA":
        return Image.merge("LA", (whole.getchannel(0), whole.getchannel(3)))
    return whole.convert("RGB").convert(mode)


def encoded(image: Image.Image, form: str | None = None, **options: Any) -> bytes:
    """The file of an image; None = PNG, or another format if its mode needs it."""
    out = io.BytesIO()
    image.save(out, form or FORMATS.get(image.mode, "PNG"), **options)
    return out.getvalue()


def picture(height: int, width: int, seed: int = 0) -> bytes:
    """The PNG file of random RGB pixels."""
    return encoded(noise("RGB", height, width, seed))


FILES = [picture(60 + 20 * i, 130 - 9 * i, i) for i in range(5)]
"""PNG files of five sizes."""


def problem_picture(number: int) -> bytes:
    """The image of a problem of `write_problems`; two problems each have images of one size."""
    return picture(60 + 14 * (number // 2 % 5), 150 - 17 * (number // 2 % 4), number)


def write_problems(path: Path, count: int, first: int = 0) -> str:
    """A parquet file of problems with images in the columns of Geometry3k; returns its name.

    There are two images of each size, so that a control can exchange them.

    Args:
      first: number of the first problem; problems of other numbers have other images.
    """
    rows = []
    for i in range(first, first + count):
        image = {"bytes": problem_picture(i), "path": None}
        rows.append({"images": [image], "problem": f"<image>Find x{i % 3}.", "answer": str(i % 7)})
    table = datasets.Dataset.from_list(rows)
    features = table.features.copy()
    features["images"] = datasets.List(datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    table.cast(features).to_parquet(str(path))
    return str(path)


def write_splits(folder: Path, train: int, validation: int, test: int) -> str:
    """A data set of so many such problems in three splits, in files as the hub has them; returns its name."""
    first = 0
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        write_problems(folder / "data" / f"{name}-00000-of-00001.parquet", count, first)
        first += count
    return str(folder)
