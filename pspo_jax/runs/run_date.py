"""The date that a run's chat template is given as today's."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np

from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.schema import Config
from pspo_jax.distributed import processes
from pspo_jax.runs.access import read_settings
from pspo_jax.system.storage import StorageError


def with_date(config: Config, kept: Path, joined: bool = True) -> Config:
    """`config` with prompt.date: as it is given, else as it stands in the file of settings `kept`, else today.

    Args:
      kept: a run's config.yaml or an evaluation's settings.json; without the file, the run begins.
      joined: the processes of the run have joined, and all take what the leading one finds; False = there is one.
    """
    if uses_char_tokenizer(config) or config.prompt.template != "chat" or config.prompt.date is not None:
        return config
    own = _ordinal(kept) if not joined or processes.is_primary() else 0
    ordinal = int(processes.sum_over_processes(np.array([own]))[0]) if joined else own
    return replace(config, {"prompt.date": datetime.date.fromordinal(ordinal).isoformat()}) if ordinal else config


def _ordinal(kept: Path) -> int:
    """The date in a file of settings as an ordinal; today's without the file, 0 for a run that began without one."""
    try:
        date = read_settings(kept)["prompt"].get("date")
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError):
        return datetime.date.today().toordinal()  # no run has begun here; a damaged file is refused elsewhere
    return datetime.date.fromisoformat(str(date)).toordinal() if date else 0
