"""The patches of an image for a vision tower, as transformers' Qwen2VLImageProcessor makes them with Pillow.

An image is turned as its EXIF orientation says, its transparent parts are laid on white, and both of its sides are
rounded to whole units, squares of merge_size x merge_size patches, which become one token each. transformers' processor
takes decoded images and does not look at the orientation; its `load_image`, and the images of the datasets package, are
turned by then.
"""

from __future__ import annotations

import io
import json
import math
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps

MAX_RATIO = 200
"""Largest ratio of an image's longer side to its shorter one."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, Image.DecompressionBombError)
"""Errors that Pillow raises for files which are no images, are cut off, or are too large."""
_TURNED = (5, 6, 7, 8)
"""Values of the EXIF orientation that exchange an image's sides."""


class ImageError(ValueError):
    """An image that cannot be used. The message is a clause that says why, in the same words for all such images."""


class ImageProcessor(NamedTuple):
    """Settings of an image processor. Defaults are those of transformers' Qwen2VLImageProcessor."""

    min_pixels: int = 3_136
    """Smallest number of pixels of a resized image."""
    max_pixels: int = 1_003_520
    """Largest number of pixels of a resized image."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    merge_size: int = 2
    """Patches along each side of a unit."""
    rescale_factor: float = 1 / 255
    """Factor that brings grey values to 0..1."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each channel, which is subtracted from rescaled values."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each channel, by which the differences are divided."""

    def unit(self) -> int:
        """Side of a unit in pixels."""
        return self.patch_size * self.merge_size

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Number of tokens of an image of so many rows and columns of patches."""
        return grid[0] * grid[1] // self.merge_size**2

    def patches_identity(self) -> str:
        """A text that changes with every setting on which the patches of an image depend."""
        return json.dumps([self.min_pixels, self.max_pixels, self.patch_size, self.merge_size])

    def identity(self) -> str:
        """A text that changes with every setting on which the tower's input depends."""
        return json.dumps([self.patches_identity(), self.rescale_factor, self.mean, self.std])


def resized(height: int, width: int, processor: ImageProcessor) -> tuple[int, int]:
    """Height and width in pixels to which an image is resized.

    Both are multiples of a unit. A half is rounded to the even multiple, as Python rounds.

    Raises:
      ImageError: one side is more than MAX_RATIO times as long as the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ImageError(f"its sides have a ratio above {MAX_RATIO}")
    unit, area = processor.unit(), height * width
    rows, columns = round(height / unit), round(width / unit)
    # Sides are divided in this order because another one rounds differently.
    if rows * columns * unit**2 > processor.max_pixels:
        shrink = math.sqrt(area / processor.max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < processor.min_pixels:
        grow = math.sqrt(processor.min_pixels / area)
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return rows * unit, columns * unit


def grid_of(data: bytes, processor: ImageProcessor) -> tuple[int, int]:
    """Rows and columns of patches of an image, from its header alone: no pixel is decoded.

    Raises:
      ImageError: the bytes do not begin an image, or its sides have a ratio above MAX_RATIO.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # Pillow gives the size of a TIFF as it is after turning.
            if image.format != "TIFF" and _orientation(image, data) in _TURNED:
                width, height = height, width
    except _BROKEN as error:
        raise _unreadable(error) from error
    rows, columns = resized(height, width, processor)
    return rows // processor.patch_size, columns // processor.patch_size


def patches_of(data: bytes, processor: ImageProcessor) -> tuple[UInt8[np.ndarray, "n c"], tuple[int, int]]:
    """The patches of an image, and how many rows and columns of patches it has.

    The patches of a unit follow one another, row by row, and so do the units. A patch holds its grey values by channel,
    row and column. The second frame of a patch, which the tower's weights have, equals the first.

    Raises:
      ImageError: the bytes are no image, or a broken one, or its sides have a ratio above MAX_RATIO.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if _orientation(image, data) != 1 else image
            rgb = _on_white(turned)
    except _BROKEN as error:
        raise _unreadable(error) from error
    height, width = resized(rgb.height, rgb.width, processor)
    pixels = np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))
    return cut(pixels, processor), (height // processor.patch_size, width // processor.patch_size)


def cut(pixels: UInt8[np.ndarray, "h w ch"], processor: ImageProcessor) -> UInt8[np.ndarray, "n c"]:
    """The patches of an image whose sides are whole units, in the order of `patches_of`."""
    (height, width, channels), p, m = pixels.shape, processor.patch_size, processor.merge_size
    blocks = pixels.reshape(height // (m * p), m, p, width // (m * p), m, p, channels)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, channels * p * p)


def png(patches: UInt8[np.ndarray, "n c"], grid: tuple[int, int], processor: ImageProcessor) -> bytes:
    """The PNG file of the image that was cut into these patches, of one channel or three.

    Args:
      grid: rows and columns of patches.
    """
    p, m = processor.patch_size, processor.merge_size
    channels = patches.shape[1] // p**2
    blocks = patches.reshape(grid[0] // m, grid[1] // m, m, m, channels, p, p).transpose(0, 2, 5, 1, 3, 6, 4)
    pixels = blocks.reshape(grid[0] * p, grid[1] * p, channels)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(out, "PNG")
    return out.getvalue()


def normalised(patches: UInt8[np.ndarray, "n c"], processor: ImageProcessor) -> Float[np.ndarray, "n c"]:
    """The float32 values of patches as the tower reads them: (value x rescale_factor - mean) / std by channel."""
    channel = np.arange(patches.shape[1]) // processor.patch_size**2
    mean, std = (np.array(x, np.float32)[channel] for x in (processor.mean, processor.std))
    return (patches.astype(np.float32) * np.float32(processor.rescale_factor) - mean) / std


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation of an opened image; 1 = as it is stored.

    Pillow decodes a PNG to look for its EXIF data, so it is asked only where the bytes have some.
    """
    marks = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
    if image.format == "PNG" and "exif" not in image.info and not any(mark in data for mark in marks):
        return 1
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _on_white(image: Image.Image) -> Image.Image:
    """An image in RGB, its transparent parts on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _unreadable(error: Exception) -> ImageError:
    """The error of bytes that Pillow cannot read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError("it is no image of a known format")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("it has more pixels than Pillow decodes")
    return ImageError("it is broken or cut off")
