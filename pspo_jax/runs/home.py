"""Where a run lives: its own folder, or a folder of a bucket that a working folder of this machine stands for.

A run writes its logs line by line, but an object of a bucket cannot be appended to. A run whose run.dir is
gs://BUCKET/FOLDER therefore has a working folder on this machine. Its small files lie there and are copied to the
bucket (`runs/mirror.py`); checkpoints and cold starts are written to the bucket itself. A file in that folder names the
bucket, so that every function needs only the path of the run.
"""

from __future__ import annotations

import importlib.util
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from etils import epath

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.buckets import Place, check_reachable, is_url
from pspo_jax.system.storage import BucketError, StorageError, unanswered, unread, write_whole

HOME = "home.json"
"""File of a working folder that names its bucket."""
_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[^/#?*\[\]\s]+)+")


class Home(NamedTuple):
    """The contents of home.json."""

    url: str
    id: str
    """Random text that identifies the working folder."""


def home_of(folder: Path) -> Place:
    """The place of a run's checkpoints and cold start: its folder, or the folder of a bucket that this stands for."""
    found = bucket_of(folder)
    return folder if found is None else epath.Path(found.url)


def bucket_of(folder: Path) -> Home | None:
    """The bucket that a working folder stands for; None for a run's own folder.

    Raises:
      StorageError: home.json cannot be read.
    """
    try:
        found = json.loads((folder / HOME).read_bytes())
        return Home(found["url"], found["id"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unread(folder / HOME, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / HOME}: is damaged; remove {folder}, whose files are in the bucket") from error


def checked_url(url: str, flag: str = "run.dir") -> str:
    """The URL of a run in a bucket, without a slash at its end; its bucket has answered.

    Raises:
      ConfigError: it is no gs://BUCKET/FOLDER, gcsfs is not installed, or the bucket refuses.
      StorageError: the bucket does not answer.
    """
    found = url.rstrip("/")
    shown = f"{flag}={url}" if "." in flag else f"{flag} {url}"
    if not found.startswith("gs://"):
        raise ConfigError(f"{shown}: must be a folder, or gs://BUCKET/FOLDER of Google Cloud Storage")
    if not _URL.fullmatch(found) or any(part in (".", "..") for part in found.split("/")):
        raise ConfigError(f"{shown}: must name a folder in a bucket, as gs://BUCKET/FOLDER does")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{shown}: needs the package gcsfs; pip install 'pspo-jax[gcs]'")
    try:
        check_reachable(epath.Path(found))
    except FileNotFoundError as error:
        raise ConfigError(f"{shown}: there is no such bucket; make it, or name another one") from error
    except BucketError as error:
        if not error.refused:
            raise StorageError(
                f"{shown}: the bucket does not answer ({error.strerror}); once it does, the same command carries on"
            ) from error
        raise ConfigError(
            f"{shown}: the bucket refuses ({error.strerror}); give this machine's account the roles "
            "storage.objectUser and storage.legacyBucketReader, or run gcloud auth application-default login"
        ) from error
    return found


def working_folder(url: str) -> Path:
    """The folder of this machine that stands for a run in a bucket."""
    return Path.home() / ".cache" / "pspo_jax" / "runs" / quote(url.removeprefix("gs://"), safe="")


def stand_for(folder: Path, url: str) -> None:
    """Make a folder stand for a run in a bucket, unless it does already.

    Raises:
      StorageError: home.json cannot be written.
    """
    if not (folder / HOME).exists():
        write_whole(folder / HOME, json.dumps(Home(url, uuid.uuid4().hex)._asdict()).encode(), shared=True)


def shown(path: Path, folder: Path) -> str:
    """A path inside a run's folder as its user knows it: by the URL, if the folder stands for one in a bucket."""
    found = bucket_of(folder)
    return str(path) if found is None else str(path).replace(str(folder), found.url)


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """In this block, errors of a run in a bucket name its URL instead of its working folder.

    Raises:
      StorageError: the bucket does not answer, or refuses.
    """
    try:
        yield
    except BucketError as error:
        raise unanswered(error) from error
    except (ConfigError, StorageError) as error:
        found = bucket_of(folder) if folder.is_dir() else None
        if found is None or str(folder) not in str(error):
            raise
        raise type(error)(str(error).replace(str(folder), found.url)) from error


def local_path(flag: str, path: Path | None) -> Path | None:
    """The path of an output, which must be on this machine.

    Raises:
      ConfigError: it is a URL.
    """
    text = "" if path is None else str(path)
    if path is not None and (is_url(text) or re.match(r"[a-z0-9]+:/", text)):
        raise ConfigError(f"{flag} {path}: must be on this machine; write it here, then copy it")
    return path
