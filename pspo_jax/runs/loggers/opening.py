"""From log.to to senders: packages are found, imported and asked for their keys before a run begins."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path

from pspo_jax.config.defaults import flatten
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.config.text_fields import REMOTE_LOGGERS, parse_loggers
from pspo_jax.runs.home import bucket_of
from pspo_jax.runs.loggers.interface import OpenRun, RunInfo
from pspo_jax.runs.loggers.sender import Sender
from pspo_jax.system.storage import unread, write_whole

ID = "logger_id.json"
"""File of a run folder that holds the id of the run in its loggers."""


def check_packages(config: Config) -> None:
    """Raise ConfigError for a logger of log.to whose package is not installed."""
    for name in _remote(config):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.to={config.log.to}: needs the package {name}; pip install 'pspo-jax[{name}]'")


def check_loggers(config: Config) -> None:
    """Import the packages of log.to; ConfigError for one that cannot be imported, or that has no key."""
    for name in _remote(config):
        try:
            missing = _logger(name).check()
        except ImportError as error:
            raise ConfigError(
                f"log.to={config.log.to}: the package {name} cannot be imported ({error}); "
                f"pip install --upgrade 'pspo-jax[{name}]'"
            ) from error
        if missing is not None:
            raise ConfigError(f"log.to={config.log.to}: {name} {missing}")


def senders(config: Config, folder: Path, say: Callable[[str], None]) -> list[Sender]:
    """A sender for each logger of log.to beside tensorboard, not yet started.

    Args:
      folder: the run folder, or the working folder of a run in a bucket.
    Raises:
      StorageError: the run's id cannot be read or written.
    """
    names = _remote(config)
    if not names:
        return []
    bucket = bucket_of(folder)
    place = folder.resolve().name if bucket is None else bucket.url.rpartition("/")[2]
    info = RunInfo(config.log.project, config.log.name or place, _id(folder, say), folder, flatten(config))
    return [Sender(name, functools.partial(_logger(name).open, info), folder / "metrics.jsonl", say) for name in names]


def _remote(config: Config) -> list[str]:
    return [name for name in parse_loggers(config.log.to) if name in REMOTE_LOGGERS]


def _logger(name: str) -> OpenRun:
    """The functions of a logger, whose package is imported now."""
    found: OpenRun = importlib.import_module(f"pspo_jax.runs.loggers.{name}_run").LOGGER
    return found


def _id(folder: Path, say: Callable[[str], None]) -> str:
    """The run's id in its loggers; a new one where the folder has none."""
    path = folder / ID
    try:
        found = str(json.loads(path.read_bytes())["id"])
        if found.isalnum():
            return found
        raise ValueError("no id")
    except FileNotFoundError:
        found = uuid.uuid4().hex[:8]
    except OSError as error:
        raise unread(path, error) from error
    except (ValueError, KeyError, TypeError):
        found = uuid.uuid4().hex[:8]
        say(f"{path}: is damaged; the run begins anew in its loggers, as {found}")
    write_whole(path, json.dumps({"id": found}).encode())
    return found
