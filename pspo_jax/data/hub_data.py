"""Data sets of the hub: which files hold each split, and these files in the hub client's cache.

What the files are is kept beside the tokenised prompts, so that a machine without a network finds them again.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError
from pspo_jax.model.huggingface.hub import Repository, check_access, commit_of, download, incomplete
from pspo_jax.system.storage import write_whole

_FORMAT = 1
"""Version of the kept layouts, to be raised when they get other entries."""


class Layout(NamedTuple):
    """The files of a data set at one commit."""

    commit: str
    reader: str
    """Name of the packaged reader of `datasets`, such as json or parquet."""
    files: dict[str, list[str]]
    """Paths within the repository, by split."""
    features: dict[str, object] | None
    """Types of the columns that the data set declares, as `Features.to_dict` writes them; None = those of the files."""
    records_field: str | None
    """Key under which a JSON file holds its rows; None = the file holds nothing else."""


def read_layout(datasets: ModuleType, repo: Repository, subset: str | None, cache: Path) -> Layout:
    """The layout of a data set; without the hub, the one that was kept when the hub was last asked.

    Args:
      subset: name of the data set's configuration; None = its only one.
      cache: folder of kept layouts.
    Raises:
      ConfigError: the hub refuses, or must not be asked and no layout is kept.
      StorageError: the hub does not answer, and no layout is kept.
      ValueError, OSError, datasets.exceptions.DatasetsError: the data set has no files that can be read.
    """
    from huggingface_hub import constants

    key = json.dumps([_FORMAT, str(constants.ENDPOINT), repo.id, subset, repo.revision])
    kept = cache / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    found = _kept(kept)
    commit = commit_of(repo)
    if not isinstance(commit, str):
        if found is None:
            raise commit
        return found
    if found is not None and found.commit == commit:
        return found
    try:
        builder = datasets.load_dataset_builder(repo.id, subset, revision=commit)
    except datasets.exceptions.DatasetNotFoundError:
        check_access(repo)
        raise
    except ValueError as error:
        names = datasets.get_dataset_config_names(repo.id, revision=commit)
        if subset in names or (subset is None and len(names) == 1):
            raise
        raise ConfigError(
            f"task.subset={subset}: {repo.id} has configurations of other names; choose among {', '.join(names)}"
        ) from error
    start = f"hf://datasets/{repo.id}@{commit}/"
    files = {
        str(part): [str(f).removeprefix(start) for f in names] for part, names in builder.config.data_files.items()
    }
    features = None if builder.info.features is None else builder.info.features.to_dict()
    layout = Layout(commit, builder.name, files, features, getattr(builder.config, "field", None))
    write_whole(kept, json.dumps(layout._asdict()).encode(), shared=True)
    return layout


def _kept(path: Path) -> Layout | None:
    """A layout that was kept; None if there is none, or a kill has cut it off."""
    try:
        return Layout(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def split_parts(split: str, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the splits that an expression such as train, train[:100] or train+test reads.

    Raises:
      ValueError: it names none of the splits.
    """
    names = [split] if split in files else [part for part in files if part in split]
    if not names:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(files)}.')  # as `datasets` says it
    return names


def local_files(repo: Repository, layout: Layout, parts: Sequence[str]) -> dict[str, list[str]]:
    """Local paths of the files of some splits; those that the cache lacks are downloaded.

    Raises:
      ConfigError: the hub refuses, or must not be asked and the cache lacks files.
      StorageError: the hub does not answer.
    """
    wanted = [glob.escape(file) for part in parts for file in layout.files[part]]
    folder = download(repo._replace(revision=layout.commit), wanted)
    found = {part: [folder / file for file in layout.files[part]] for part in parts}
    if not all(path.exists() for paths in found.values() for path in paths):
        raise incomplete(repo)
    return {part: [str(path) for path in paths] for part, paths in found.items()}
