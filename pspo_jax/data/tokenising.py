"""Questions as token ids, in a table on disk that is made once for the same data, settings and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.conversations import Conversation
from pspo_jax.data.files import Record, Records, as_records
from pspo_jax.data.images.processor import ImageError, ImageProcessor
from pspo_jax.data.images.reading import Loaded, load
from pspo_jax.data.loading import Question, Source, quiet_datasets
from pspo_jax.data.rendering import PromptError
from pspo_jax.data.shared_table import readable, share_work
from pspo_jax.data.task import digest

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset as Table

_LAYOUT = "4"
"""Version of the cached rows, to be raised when their columns or the results of `Source.convert` change."""
_ANNOUNCED_FROM = 20_000
"""Rows from which on tokenising is announced."""
_BATCH, _BATCH_WITH_IMAGES = 1000, 32
"""Rows that are tokenised at a time, whose columns are in memory together."""


class Encode(Protocol):
    """The ids of a prompt, with rows and columns of patches of each of its images.

    Raises:
      PromptError: the template refuses it, or its images do not fit it.
    """

    def __call__(self, prompt: str | Conversation, grids: Sequence[tuple[int, int]] = (), /) -> list[int]: ...


def tokenised(
    source: Source,
    encode: Encode,
    identity: str,
    folder: Path,
    part: int,
    say: Callable[[str], None] = lambda _: None,
    processor: ImageProcessor | None = None,
) -> datasets.Dataset:
    """The questions of a source with their token ids, one row for each record.

    The columns are text, answer, kind, extra, reason, ids, length (of ids), largest (of ids), part, row, images (keys),
    grids (rows and columns of patches of each image, one after the other), digest (a hash of kind, prompt and answer)
    and question (a hash of the prompt, with the bytes of its images). The table is kept in `folder`, and found again
    when data, settings and tokenizer are the same.

    Args:
      encode: the ids of a prompt.
      identity: hash of the tokenizer and template behind `encode`.
      folder: the cache folder.
      part: value of the column part.
      say: told of what takes long.
      processor: the checkpoint's image processor; None = the model reads text alone.
    """
    datasets = quiet_datasets()
    features, records = _features(datasets), as_records(source.records)
    if source.note:
        say(source.note)

    def prepare(batch: dict[str, list[object]], indices: list[int]) -> dict[str, object]:
        """The columns of some records."""
        out: dict[str, list[object]] = {name: [] for name in features}
        for place, index in enumerate(indices):
            row = {name: column[place] for name, column in batch.items()}
            items = (*_tokenised_row(source, records, row, encode, processor), part, index)
            for name, item in zip(features, items, strict=True):
                out[name].append(item)
        return {**out, **{name: np.array(out[name], np.uint64) for name in ("digest", "question")}}

    key = _key(records.table._fingerprint, source.settings, source.kind, identity, str(part))
    path = folder / f"prompts-{key}.arrow"

    def make(path: Path, rows: range) -> Table:
        """The table of some rows, found in the file or written to it."""
        return records.table.select(rows).map(
            lambda batch, indices: prepare(batch, [rows.start + i for i in indices]),
            batched=True,
            batch_size=_BATCH if source.images is None or processor is None else _BATCH_WITH_IMAGES,
            with_indices=True,
            remove_columns=records.table.column_names,
            features=features,
            new_fingerprint=key,
            cache_file_name=str(path),
            load_from_cache_file=True,
        )

    _make_room(path, len(records), source.name, say)
    with _utf8(source.field, source.name):
        share_work(path, len(records), lambda path, rows: len(make(path, rows)), say)
        return make(path, range(len(records)))


def _make_room(path: Path, rows: int, name: str, say: Callable[[str], None]) -> None:
    """Make the folder of a table, remove the table if it is damaged, and say if making it will take long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not readable(path):
        path.unlink()
    if not path.exists() and rows >= _ANNOUNCED_FROM:
        say(f"tokenising {rows:,} prompts of {name} (once; they are kept in {path.parent})")


def _key(*parts: str) -> str:
    """The name of a table, by what its contents follow from."""
    return hashlib.sha256("\0".join([_LAYOUT, *parts]).encode()).hexdigest()[:24]


def _features(datasets: ModuleType) -> datasets.Features:
    """The columns of `tokenised` and their types, in their order."""
    texts = dict.fromkeys(("text", "answer", "kind", "extra", "reason"), "string")
    hashes = dict.fromkeys(("digest", "question"), "uint64")
    columns = {name: datasets.Value(dtype) for name, dtype in (texts | hashes).items()}
    columns |= {name: datasets.Value("int32") for name in ("length", "largest")}
    columns |= {name: datasets.Sequence(datasets.Value("int32")) for name in ("ids", "grids")}
    columns["images"] = datasets.Sequence(datasets.Value("string"))
    return datasets.Features(**columns, part=datasets.Value("int32"), row=datasets.Value("int64"))


class _Encoded(NamedTuple):
    """A row's question, and the model's prompt for it."""

    question: Question
    prompt: str | Conversation = ""
    ids: Sequence[int] = ()
    """Ids of the prompt; none if the row is left out."""
    images: Sequence[Loaded] = ()


def _tokenised_row(
    source: Source, records: Records, row: Record, encode: Encode, processor: ImageProcessor | None
) -> tuple[object, ...]:
    """The columns of `_features` for one row, in their order, without part and row."""
    q, prompt, ids, images = _encoded(source, records, row, encode, processor)
    written = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    keys = [image.key for image in images]
    whole = "\0".join([written, *keys])
    texts = (q.text, q.answer, source.kind, json.dumps(q.extra, default=str), q.reason)
    hashes = (digest(f"{source.kind}\0{whole}".encode(), q.answer), digest(whole.encode(), ""))
    grids = [side for image in images for side in image.grid]
    return (*texts, *hashes, len(ids), max(ids, default=-1), list(ids), grids, keys)


def _encoded(
    source: Source, records: Records, row: Record, encode: Encode, processor: ImageProcessor | None
) -> _Encoded:
    """A row's question, prompt, ids and images."""
    try:
        plain, exact = records.plain(row), records.exact(row)
    except ValueError as error:
        return _Encoded(Question("", "", {}, f"the row is ambiguous: {error}"))
    q = source.convert(plain, exact)
    try:
        (q.text + q.answer).encode()
    except UnicodeEncodeError:
        return _Encoded(Question("", "", {}, q.reason or "half a surrogate pair in the question or the answer"))
    if q.reason:
        return _Encoded(q, q.text)
    prompt = source.prompt(plain, q) if source.prompt else q.text
    images: list[Loaded] = []
    try:
        if source.images is not None and processor is not None:
            images = [load(image, records.folder(row), processor) for image in source.images(plain)]
        return _Encoded(q, prompt, encode(prompt, [image.grid for image in images]), images)
    except ImageError as error:
        return _Encoded(q._replace(reason=unusable(error)), prompt)
    except PromptError as error:
        return _Encoded(q._replace(reason=str(error)), prompt)


def unusable(error: ImageError) -> str:
    """The reason to leave out a row with an image that cannot be used."""
    return f"an image cannot be used: {error}"


@contextmanager
def _utf8(field: str, data: str) -> Iterator[None]:
    """Names the data in the error about text that is not UTF-8, which datasets decodes late, where it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}={data}: is not UTF-8 ({error}); convert it") from error


def column_array(rows: datasets.Dataset, name: str) -> np.ndarray:
    """A numeric column as one array, without a Python object per row."""
    return np.asarray(rows.with_format("numpy")[name][:])
