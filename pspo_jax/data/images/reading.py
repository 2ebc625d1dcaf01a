"""Images as data sets hold them: bytes, paths, base64 texts and data URLs, alone or in lists and conversations."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pspo_jax.data.conversations import is_image_part
from pspo_jax.data.images.processor import ImageError, ImageProcessor, grid_of

_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
"""Text that is taken for base64 where it is no path. A path of 64 letters and slashes is looked for first."""
_LONGEST_PATH = 4096
_PAYLOADS = ("image", "image_url", "url", "path", "base64", "bytes")
"""Keys of a part of a conversation under which its image may be."""


class Loaded(NamedTuple):
    """An image whose header has been read."""

    key: str
    """SHA-256 of its bytes, in hexadecimal."""
    grid: tuple[int, int]
    """Rows and columns of its patches."""


def listed_images(value: object) -> list[object]:
    """The images in a column's value: the members of a list or of its JSON text, nothing for null, or the value."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return listed_images(json.loads(value))
        except ValueError:
            return [value]
    if isinstance(value, list | tuple):
        return [image for member in value for image in listed_images(member)]
    if isinstance(value, dict) and not any(value.get(name) is not None for name in _PAYLOADS):
        return []
    return [value]


def part_image(part: dict[str, object]) -> object:
    """The image that a part of a conversation holds; None if the part only marks an image's place."""
    for name in _PAYLOADS:
        found = part.get(name)
        if isinstance(found, dict) and "url" in found:  # {"image_url": {"url": ...}}
            found = found["url"]
        if found is not None:
            return {"base64": found} if name == "base64" else found
    return None


def image_bytes(value: object, folder: Path | None) -> bytes:
    """The bytes of an image file from a value of `listed_images`.

    Args:
      folder: the folder to which paths are relative; None = the working folder.
    Raises:
      ImageError: there is no such file, the text is neither a path nor base64, or the value is no image.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return image_bytes(value["bytes"], folder)
        if isinstance(value.get("base64"), str):
            return _decoded(str(value["base64"]))
        return image_bytes(part_image(value), folder)
    if not isinstance(value, str):
        raise ImageError(f"it is of type {type(value).__name__}; it must be bytes, a path or a data URL")
    path = file_of(value, folder)
    if path is None:
        return _from_text(value)
    if path.suffix.lower() in _VIDEOS:
        raise ImageError("it is a video, and only still images are read")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        base = f"; paths are relative to {folder}" if folder is not None else ""
        raise ImageError(f"its file cannot be read ({getattr(error, 'strerror', 'no valid path')}{base})") from error


def file_of(value: object, folder: Path | None) -> Path | None:
    """The path that a value names; None if it holds or encodes the image, or names no file of this machine."""
    if isinstance(value, dict):
        return None if value.get("bytes") is not None or "base64" in value else file_of(part_image(value), folder)
    if not isinstance(value, str) or len(value) > _LONGEST_PATH:
        return None
    if _ADDRESS.match(value) and not value.startswith("file://"):
        return None
    path = (folder or Path()) / Path(value.removeprefix("file://")).expanduser()
    return None if value.startswith("data:") or (_BASE64.fullmatch(value) and not path.is_file()) else path


def without_images(value: object) -> object:
    """A record, or a part of one, in which None stands for the bytes of images, and only a mark for those in turns."""
    if isinstance(value, bytes):
        return None
    if isinstance(value, list):
        return [without_images(member) for member in value]
    if not isinstance(value, dict):
        return value
    if value.keys() <= {"bytes", "path"}:
        return None
    if is_image_part(value):
        return {"type": "image"}
    return {name: without_images(member) for name, member in value.items()}


def load(value: object, folder: Path | None, processor: ImageProcessor) -> Loaded:
    """The key and grid of an image, without decoding a pixel.

    Raises:
      ImageError: it cannot be read, or is no image.
    """
    data = image_bytes(value, folder)
    return Loaded(hashlib.sha256(data).hexdigest(), grid_of(data, processor))


def files_stamp(values: Iterable[object], folder: Path | None) -> str:
    """A text that changes when a file changes that one of the values names; "" if none names a file.

    It depends on each file's path, size and time of change, so that no file is read.
    """
    digest, found = hashlib.sha256(), False
    for value in values:
        path = file_of(value, folder)
        if path is None:
            continue
        found = True
        try:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except (OSError, ValueError):
            digest.update(f"{path}\0missing\0".encode())
    return digest.hexdigest() if found else ""


def _from_text(value: str) -> bytes:
    """The bytes of a data URL, or of a text in base64."""
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if head.startswith("data:video"):
            raise ImageError("it is a video, and only still images are read")
        if not comma or not head.endswith(";base64"):
            raise ImageError("its data URL is not in base64")
        return _decoded(body)
    if _ADDRESS.match(value):
        raise ImageError("it is an address; download the file and name its path")
    return _decoded(value)


def _decoded(text: str) -> bytes:
    """The bytes of a text in base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("it is neither the path of a file nor base64") from error
