"""Records of data sets, and a reader of JSON, JSONL and CSV files that rounds no number and makes no text a date."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from pspo_jax.system.storage import own_partial, write_whole

if TYPE_CHECKING:
    import datasets
    import pyarrow

Record = dict[str, object]
"""A row of a data set: the values of its columns."""

_FORMAT = "2"
"""Version of the kept rows, to be raised when the same file would give other rows."""
_COLUMN = "json"
"""Column of the kept table: rows as JSON texts."""
_FILE = "file"
"""Column of the kept table: the index of each row's file among the files that were read."""
_BATCH_BYTES = 16 * 2**20
"""Size from which rows are written to the table."""
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


class Literal(str):
    """A number as its file writes it."""

    __slots__ = ()


class Records(Sequence[Record]):
    """Records of a data set, which stay on disk until they are indexed.

    Args:
      table: the rows as they are stored.
      column_names: the columns of all records.
      plain: a row of `table` -> its record.
      exact: a row of `table` -> its record, with numbers as text where only text is exact. ValueError for a row that
        has a key twice.
      folder: a row of `table` -> the folder to which paths in its record are relative; None = the working folder.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        column_names: Sequence[str],
        plain: Callable[[Record], Record],
        exact: Callable[[Record], Record],
        folder: Callable[[Record], Path | None] = lambda _: None,
    ):
        self.table = table
        self.column_names = list(column_names)
        self.plain = plain
        self.exact = exact
        self.folder = folder

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, i: int) -> Record: ...

    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...

    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return self.plain(self.table[int(i)])

    def select(self, rows: Iterable[int]) -> Records:
        """Some of the records, in the order that `rows` gives."""
        return Records(self.table.select(rows), self.column_names, self.plain, self.exact, self.folder)

    def without(self, name: str) -> Records:
        """The records without a column, which is then not read from disk either if the table has it apart.

        Args:
          name: the column's name as `value_at` takes it.
        """
        table = self.table.remove_columns(name) if name in self.table.column_names else self.table
        names = [column for column in self.column_names if column != name]

        def plain(row: Record) -> Record:
            return _without(self.plain(row), name)

        return Records(table, names, plain, lambda row: _without(self.exact(row), name), self.folder)

    def values(self, name: str) -> list[object]:
        """The values of a column in all records; `name` is a name as `value_at` takes it."""
        names = () if _COLUMN in self.table.column_names else self.table.column_names
        head = next((n for n in heads(name) if n in names), None)
        table = self.table if head is None else self.table.select_columns([head])
        return [value_at(self.plain(row), name) for row in table]


def as_records(table: datasets.Dataset | Records, folder: Path | None = None) -> Records:
    """The rows of a Dataset as records, with its types; a 32-bit float as the shortest number that rounds to it.

    Images stay as the files they are, undecoded.

    Args:
      folder: the folder to which paths in the records are relative.
    """
    if isinstance(table, Records):
        return table
    table = _undecoded(table)
    narrow = [n for n, f in table.features.items() if getattr(f, "dtype", None) in ("float16", "float32")]

    def exact(row: Record) -> Record:
        floats = {n: value for n in narrow if isinstance(value := row[n], float) and math.isfinite(value)}
        return row | {n: Literal(np.float32(value)) for n, value in floats.items()}

    return Records(table, table.column_names, lambda row: row, exact, lambda _: folder)


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """A Dataset whose images are read as bytes and path. Nothing is copied, since both forms are stored alike."""
    import datasets

    def plain(feature: object) -> object:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(plain(feature.feature))
        if isinstance(feature, dict):
            return {name: plain(inner) for name, inner in feature.items()}
        return feature

    features = datasets.Features({name: plain(feature) for name, feature in table.features.items()})
    if features == table.features:
        return table
    # Dataset.cast would write a copy of all images.
    info = table.info.copy()
    info.features = features
    return datasets.Dataset(table.data, info, table.split, table._indices, table._fingerprint)


def joined(parts: Sequence[Records]) -> Records | None:
    """Records of the same form, one after the other; None if there are none. The first ones have the folder of all."""
    if len(parts) < 2:
        return parts[0] if parts else None
    import datasets

    empty = dict.fromkeys(name for part in parts for name in part.column_names)
    first = parts[0]
    table = datasets.concatenate_datasets([part.table for part in parts])
    return Records(
        table, list(empty), lambda row: empty | first.plain(row), lambda row: empty | first.exact(row), first.folder
    )


def heads(name: str) -> list[str]:
    """A dotted name and its beginnings, longest first: "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _without(record: Record, name: str) -> Record:
    """A record without the value at a name, which may lead into objects as in `value_at`."""
    head = next((h for h in heads(name) if h in record), None)
    if head is None:
        return record
    rest = {column: value for column, value in record.items() if column != head}
    inner = record[head]
    return (
        rest if head == name or not isinstance(inner, dict) else rest | {head: _without(inner, name[len(head) + 1 :])}
    )


def value_at(record: object, name: str) -> object:
    """The value of a column, or the value inside it that a dotted name leads to; None if there is none.

    A key that has the dots in it goes before a path. A list is entered by a number; a text that holds a JSON object or
    list is entered like one.
    """
    if isinstance(record, str) and record.lstrip()[:1] in ("{", "["):
        try:
            record = exact_json(record)
        except ValueError:
            return None
    if isinstance(record, list) and name.partition(".")[0].isdecimal():
        record = {str(i): item for i, item in enumerate(record)}
    if not isinstance(record, dict):
        return None
    head = next((h for h in heads(name) if h in record), None)
    if head is None or head == name:
        return None if head is None else record[name]
    return value_at(record[head], name[len(head) + 1 :])


def exact_json(text: str) -> object:
    """The value of a JSON text, with numbers as `Literal`s; NaN and Infinity are floats.

    Raises:
      ValueError: the text is not JSON, is nested too deeply, or an object has a key twice.
    """
    with _no_recursion():
        return json.loads(text, parse_int=Literal, parse_float=Literal, object_pairs_hook=_without_repetition)


def _exact_record(text: str) -> Record:
    """A row from its JSON text, with numbers as `Literal`s."""
    return cast(Record, exact_json(text))


def _plain_record(text: str) -> Record:
    """A row from its JSON text, with whole numbers of any size."""
    with _no_recursion():
        return cast(Record, json.loads(text, parse_int=_integer))


@contextmanager
def _no_recursion() -> Iterator[None]:
    """Raises ValueError for JSON that is nested too deeply."""
    try:
        yield
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _without_repetition(pairs: list[tuple[str, object]]) -> Record:
    """An object, none of whose keys may stand twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return out


def _integer(text: str) -> int | Literal:
    """A whole number of any size; one with more digits than Python converts stays text."""
    try:
        return int(text)
    except ValueError:
        return Literal(text)


def read_files(paths: Sequence[Path], form: str, folder: Path) -> Records | None:
    """The records of files, one after the other; None if there are none.

    They are kept in `folder`, as text in a memory-mapped table, and found again for files of the same contents.

    Args:
      form: "json" (a list of objects, or objects on lines or one after the other), or "csv" (with a header).
      folder: the cache folder.
    Raises:
      ValueError: a file does not have its form; the message has the line.
      OSError: a file cannot be read.
    """
    import datasets
    import pyarrow

    digest = hashlib.sha256(f"{_FORMAT} {form}".encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    kept = folder / f"rows-{digest.hexdigest()[:24]}.arrow"
    columns = kept.with_suffix(".columns.json")
    try:
        names = json.loads(columns.read_text(encoding="utf-8"))
        table = datasets.Dataset.from_file(str(kept))
    except (OSError, ValueError, pyarrow.ArrowException):  # there is none yet, or a kill has cut it off
        found = _keep(paths, form, kept)
        if not found:
            return None
        names = list(found)
        write_whole(columns, json.dumps(names).encode(), shared=True)
        table = datasets.Dataset.from_file(str(kept))
    # By default the fingerprint depends on the time of the file, which differs from host to host.
    table = datasets.Dataset(table.data, table.info, table.split, fingerprint=digest.hexdigest()[:24])
    empty, parents = dict.fromkeys(names), [path.parent for path in paths]
    return Records(
        table,
        names,
        lambda row: empty | _plain_record(str(row[_COLUMN])),
        lambda row: empty | _exact_record(str(row[_COLUMN])),
        lambda row: parents[cast(int, row[_FILE])] if len({*parents}) > 1 else parents[0],
    )


def _keep(paths: Sequence[Path], form: str, kept: Path) -> dict[str, None]:
    """Writes the rows of all files into one table.

    Returns:
      The keys of the rows, in the order in which they first appear; empty if there are no rows.
    """
    import pyarrow

    schema = pyarrow.schema([(_COLUMN, pyarrow.string()), (_FILE, pyarrow.int32())])
    names: dict[str, None] = {}
    batch: list[tuple[str, int]] = []
    size = 0
    partial = own_partial(kept)
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as out:
            for number, path in enumerate(paths):
                for text, keys in (_csv_rows if form == "csv" else _json_rows)(path):
                    names |= dict.fromkeys(keys)
                    batch.append((text, number))
                    size += len(text)
                    if size > _BATCH_BYTES:
                        out.write_batch(_record_batch(batch, schema))
                        batch, size = [], 0
            if batch:
                out.write_batch(_record_batch(batch, schema))
        if names:
            partial.rename(kept)
    finally:
        partial.unlink(missing_ok=True)
    return names


def _record_batch(rows: list[tuple[str, int]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """Rows of the kept table: the JSON text and the index of the file of each."""
    import pyarrow

    columns = zip(*rows, strict=True)
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pyarrow.record_batch(arrays, schema)


FileRows = Iterator[tuple[str, Sequence[str]]]
"""For each row of a file: the row as JSON, and its keys."""


def _json_rows(path: Path) -> FileRows:
    with path.open("rb") as file:
        head = file.read(2**16).removeprefix(_BOM).lstrip()
    return _documents(path) if path.suffix == ".json" or head[:1] == b"[" else _lines(path)


def _lines(path: Path) -> FileRows:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = (raw.removeprefix(_BOM) if number == 1 else raw).decode().strip(_SPACE)
            if line:
                yield line, _keys(line, f"line {number}")


def _keys(text: str, where: str) -> Sequence[str]:
    try:
        with _no_recursion():
            value = json.loads(text, parse_int=str)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object: {text[:40]!r}")
    return list(value)


def _documents(path: Path) -> FileRows:
    """The objects of one list, or objects that follow one another."""
    text = path.read_bytes().removeprefix(_BOM).decode()
    decoder = json.JSONDecoder(parse_int=str)
    place = _skip(text, 0)
    listed = text[place : place + 1] == "["
    place = _skip(text, place + listed)
    found = 0
    while place < len(text) and not (listed and text[place] == "]"):
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None
        found += 1
        if not isinstance(value, dict):
            raise ValueError(f"row {found} is no JSON object: {text[place:end][:40]!r}")
        following = _skip(text, end)
        if found == 1 and following == len(text) and any(isinstance(v, list) for v in value.values()) and not listed:
            raise ValueError("the file is one JSON object of lists; write a list of rows, or one row a line")
        yield text[place:end], list(value)
        place = _after(text, following, listed)
    if listed and (place >= len(text) or _skip(text, place + 1) < len(text)):
        raise ValueError(f"the JSON list of {found} rows is not closed, or text follows it")


def _after(text: str, place: int, listed: bool) -> int:
    """The index of the next element of a list, or of its end; in a file of objects, the index of the next object."""
    if not listed or text[place : place + 1] in ("]", ""):
        return place
    if text[place] != ",":
        raise ValueError(f"line {text.count(chr(10), 0, place) + 1} is not JSON: a comma is missing between rows")
    return _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    """The index after white space."""
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _csv_rows(path: Path) -> FileRows:
    """Rows whose fields are texts."""
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.reader(file, strict=True)
        try:
            header = next((row for row in reader if row), [])
            if len(set(header)) < len(header):
                raise ValueError(f"the header names {next(n for n in header if header.count(n) > 1)!r} twice")
            for row in reader:
                if not row:
                    continue
                if len(row) > len(header):
                    raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)}")
                yield json.dumps(dict(zip(header, row, strict=False))), header
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the limit of 128 KiB on a field of Python's CSV reader, and restores it at the end."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
