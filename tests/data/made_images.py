"""Image files made by Pillow: of any size, mode and format."""

from __future__ import annotations

import io
from typing import Any

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
