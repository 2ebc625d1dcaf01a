"""Folders in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER, beside local ones: the file operations of both.

A bucket has no folders, only objects whose names may hold slashes. An object cannot be appended to or renamed. It
appears whole, and it can be created on the condition that it does not exist yet. gcsfs sends the requests.
"""

from __future__ import annotations

import base64
import errno
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import fsspec
from etils import epath

from pspo_jax.system.storage import FORBIDDEN, BucketError, unread, unwritten, write_whole

Place: TypeAlias = Path | epath.Path
"""A file or folder: a Path on this machine, or an epath.Path in a bucket."""
_REFUSALS = (400, 401, 403, 404)
"""HTTP status codes of requests that the bucket would refuse again."""


class Object(NamedTuple):
    """Size and checksum of an object, as the bucket lists them."""

    size: int
    """Size in bytes."""
    crc: int
    """CRC-32C of the contents, as the bucket computed it."""


def is_url(text: str) -> bool:
    """Whether a text is a URL, and so no folder of this machine."""
    return "://" in text


def absolute(place: Place) -> Place:
    """The place itself in a bucket, or its absolute path on this machine."""
    return place if isinstance(place, epath.Path) else place.absolute()


def exists(place: Place) -> bool:
    """Whether a file or folder is there; a folder of a bucket is there if an object is in it.

    Raises:
      BucketError: the bucket does not answer, or refuses.
    """
    if isinstance(place, Path):
        return place.exists()
    try:
        with _asking(place):
            _client().info(str(place))
    except FileNotFoundError:
        return False
    return True


def children(folder: Place) -> list[Place]:
    """The files and folders in a folder, by name; an empty list if it is not there.

    Raises:
      BucketError: the bucket does not answer, or refuses.
    """
    if isinstance(folder, Path):
        return sorted(folder.glob("*"))
    try:
        with _asking(folder):
            found = _client().ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    names = {name.rstrip("/").rpartition("/")[2] for name in found}
    return [folder / name for name in sorted(names - {"", folder.name})]


def objects(folder: epath.Path) -> dict[str, Object]:
    """The objects under a folder of a bucket, by their names inside it.

    Raises:
      BucketError: the bucket does not answer, or refuses.
    """
    try:
        with _asking(folder):
            found = _client().find(str(folder), detail=True)
    except FileNotFoundError:
        return {}
    start = len(str(folder).removeprefix("gs://")) + 1
    return {name[start:]: _object(info) for name, info in sorted(found.items()) if not name.endswith("/")}


def object_of(place: epath.Path) -> Object:
    """Size and checksum of one object.

    Raises:
      FileNotFoundError: it is not there.
      BucketError: the bucket does not answer, or refuses.
    """
    with _asking(place):
        return _object(_client().info(str(place)))


def _object(info: Mapping[str, object]) -> Object:
    crc = int.from_bytes(base64.b64decode(str(info.get("crc32c", ""))), "big")
    return Object(int(str(info["size"])), crc)


def read_bytes(place: Place) -> bytes:
    """The contents of a file.

    Raises:
      FileNotFoundError: it is not there.
      OSError: it cannot be read.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    with _asking(place):
        return bytes(_client().cat_file(str(place)))


def get_files(folder: epath.Path, local: Path, names: Sequence[str]) -> None:
    """Copy objects, by their names inside a folder of a bucket, to files of a local folder.

    Raises:
      StorageError: the bucket does not give them, or they cannot be written.
    """
    if not names:
        return
    try:
        for parent in {(local / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        with _asking(folder):
            _client().get([f"{folder}/{name}" for name in names], [str(local / name) for name in names])
    except OSError as error:
        raise unread(folder, error) from error


def write(place: Place, data: bytes) -> None:
    """Write a file that replaces the old one only when it is complete.

    Raises:
      StorageError: it cannot be written.
    """
    if isinstance(place, Path):
        write_whole(place, data)
        return
    try:
        with _asking(place):
            _client().pipe_file(str(place), data)
    except OSError as error:
        raise unwritten(place, error, len(data)) from error


def put_files(local: Path, folder: epath.Path, names: Sequence[str]) -> None:
    """Copy files, by their names inside a local folder, to a folder of a bucket.

    Each object replaces the old one when it is complete.

    Raises:
      StorageError: one cannot be copied; others may have been.
    """
    if not names:
        return
    try:
        with _asking(folder):
            _client().put([str(local / name) for name in names], [f"{folder}/{name}" for name in names])
    except OSError as error:
        raise unwritten(folder, error, 0) from error


def create(place: epath.Path, data: bytes) -> bool:
    """Create an object; False if it exists already. If several processes try at once, exactly one succeeds.

    Raises:
      StorageError: it cannot be written.
    """
    try:
        with _asking(place):
            _client().pipe_file(str(place), data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        raise unwritten(place, error, len(data)) from error
    return True


def remove(place: Place) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens if it is not there.

    Raises:
      OSError: it cannot be removed.
    """
    if isinstance(place, Path):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        return
    try:
        with _asking(place):
            _client().rm(str(place), recursive=True)
    except FileNotFoundError:
        return


def move(place: Place, target: Place) -> None:
    """Move a file or folder to a target that is not there. In a bucket, all objects are copied and then removed.

    Raises:
      StorageError: it cannot be moved; in a bucket, some objects may have been.
    """
    try:
        if isinstance(place, Path):
            assert isinstance(target, Path)
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)
            return
        with _asking(place):
            client = _client()
            for name in client.find(str(place)):
                client.cp_file(f"gs://{name}", f"{target}{f'gs://{name}'[len(str(place)) :]}")
        remove(place)
    except OSError as error:
        raise unwritten(target, error, 0) from error


def check_reachable(folder: epath.Path) -> None:
    """Ask the bucket for a folder's objects.

    Raises:
      BucketError: the bucket is not there, does not answer, or refuses.
      ImportError: gcsfs is not installed.
    """
    with _asking(folder):
        try:
            _client().ls(str(folder), detail=False)
        except FileNotFoundError:
            _client().info(f"gs://{folder.parts[2]}")


def _client() -> fsspec.AbstractFileSystem:
    """The client of buckets, which this process shares with Orbax's.

    Listings are not cached, since TensorStore and other processes write objects that a cache here would miss.
    """
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # gcsfs logs the tracebacks of errors that it also raises
    fsspec.config.conf["gcs"] = {**fsspec.config.conf.get("gcs", {}), "use_listings_cache": False}
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextmanager
def _asking(place: epath.Path) -> Iterator[None]:
    """Raise errors of the bucket's client in this block as BucketError; FileNotFoundError and FileExistsError stay.

    Raises:
      BucketError: the bucket does not answer, or refuses.
    """
    import aiohttp
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (OSError, HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError) as error:
        if isinstance(error, BucketError):
            raise
        found = BucketError(errno.EIO, " ".join(str(error).split())[:200] or type(error).__name__, str(place))
        code = getattr(error, "code", None)
        found.refused = (str(code).isdecimal() and int(str(code)) in _REFUSALS) or str(error).startswith(FORBIDDEN)
        raise found from error
