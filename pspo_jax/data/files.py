"""Rows of data sets, and JSON, JSONL and CSV files read as they stand: no number is rounded, no text becomes a date."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT = "1"
"""Version of the kept rows; to be raised when what a file's rows are changes."""
_COLUMN = "json"
_BATCH_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


class Literal(str):
    """A number as its file writes it."""

    __slots__ = ()


class Rows(Sequence[dict[str, Any]]):
    """Records of a data set, which stay on disk until they are indexed."""

    def __init__(
        self,
        table: Any,
        column_names: Sequence[str],
        plain: Callable[[dict[str, Any]], dict[str, Any]],
        exact: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        self.table = table
        """A datasets.Dataset."""
        self.column_names = list(column_names)
        self.plain = plain
        """A row of `table` as a record."""
        self.exact = exact
        """The same with numbers as text where only text is exact; ValueError for a row that names a key twice."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return self.plain(self.table[int(i)])

    def select(self, rows: Any) -> Rows:
        """Some of the rows, in the order that `rows` gives."""
        return Rows(self.table.select(rows), self.column_names, self.plain, self.exact)

    def values(self, name: str) -> list[Any]:
        """A column of all rows, `name` as `value_at` takes it."""
        head = next((n for n in heads(name) if n in self.table.column_names), None)
        table = self.table if head is None else self.table.select_columns([head])
        return [value_at(self.plain(row), name) for row in table]


def rows_of(table: Any) -> Rows:
    """A datasets.Dataset as rows. Its types stand; a 32-bit float is the shortest number that rounds to it."""
    if isinstance(table, Rows):
        return table
    narrow = [n for n, f in table.features.items() if getattr(f, "dtype", None) in ("float16", "float32")]

    def exact(row: dict[str, Any]) -> dict[str, Any]:
        return row | {n: Literal(np.float32(row[n])) for n in narrow if row[n] is not None and math.isfinite(row[n])}

    return Rows(table, table.column_names, lambda row: row, exact)


def joined(parts: Sequence[Rows]) -> Rows | None:
    """Rows of the same form, one after the other; None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    import datasets

    empty = dict.fromkeys(name for part in parts for name in part.column_names)
    first = parts[0]
    table = datasets.concatenate_datasets([part.table for part in parts])
    return Rows(table, list(empty), lambda row: empty | first.plain(row), lambda row: empty | first.exact(row))


def heads(name: str) -> list[str]:
    """A dotted name and its beginnings, longest first: "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def value_at(record: Any, name: str) -> Any:
    """The value of a column, or what a dotted name finds inside one; None if there is none.

    A key that has the dots in it goes before a path. A list is entered by a number, a JSON object in a text as itself.
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


def exact_json(text: str) -> Any:
    """JSON whose numbers are `Literal`s; NaN and Infinity are floats.

    Raises:
      ValueError: it is not JSON, is nested too deeply, or an object has a key twice.
    """
    return _loads(text, parse_int=Literal, parse_float=Literal, object_pairs_hook=_once)


def _loads(text: str, **how: Any) -> Any:
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return out


def _integer(text: str) -> Any:
    """An int of any size; one with more digits than Python converts stays text."""
    try:
        return int(text)
    except ValueError:
        return Literal(text)


def read_files(paths: Sequence[Path], form: str, folder: Path) -> Rows | None:
    """The rows of files, one after the other; None if there are none.

    They are kept in `folder`, as text in a memory-mapped table, and found again for the same contents.

    Args:
      form: "json" (a list of objects, or objects on lines or one after the other) or "csv" (with a header).
    Raises:
      ValueError: a file is not what its form says; the message has the line.
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
        _write(columns, json.dumps(names))
        table = datasets.Dataset.from_file(str(kept))
    empty = dict.fromkeys(names)
    return Rows(
        table,
        names,
        lambda row: empty | _loads(row[_COLUMN], parse_int=_integer),
        lambda row: empty | exact_json(row[_COLUMN]),
    )


def _keep(paths: Sequence[Path], form: str, kept: Path) -> dict[str, None]:
    """Write the rows of all files into one table; their keys in the order in which they appear, {} = no rows."""
    import pyarrow

    schema = pyarrow.schema([(_COLUMN, pyarrow.string())])
    names: dict[str, None] = {}
    batch: list[str] = []
    size = 0
    partial = _beside(kept)
    try:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as out:
            for path in paths:
                for text, keys in (_csv_rows if form == "csv" else _json_rows)(path):
                    names |= dict.fromkeys(keys)
                    batch.append(text)
                    size += len(text)
                    if size > _BATCH_BYTES:
                        out.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.string())], schema))
                        batch, size = [], 0
            if batch:
                out.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.string())], schema))
        if names:
            partial.rename(kept)
    finally:
        partial.unlink(missing_ok=True)
    return names


def _beside(path: Path) -> Path:
    """Where this process writes a file before it takes its name; the folder may be shared by machines."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def _write(path: Path, text: str) -> None:
    partial = _beside(path)
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


Found = Iterator[tuple[str, Sequence[str]]]
"""(a row as JSON, its keys)"""


def _json_rows(path: Path) -> Found:
    with path.open("rb") as file:
        head = file.read(2**16).removeprefix(_BOM).lstrip()
    return _documents(path) if path.suffix == ".json" or head[:1] == b"[" else _lines(path)


def _lines(path: Path) -> Found:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = (raw.removeprefix(_BOM) if number == 1 else raw).decode().strip(_SPACE)
            if line:
                yield line, _keys(line, f"line {number}")


def _keys(text: str, where: str) -> Sequence[str]:
    try:
        value = _loads(text, parse_int=str)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object: {text[:40]!r}")
    return list(value)


def _documents(path: Path) -> Found:
    """Objects of one list, or one after the other."""
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
    """Where the next element of a list begins, or its end is; in a file of objects, the next one."""
    if not listed or text[place : place + 1] in ("]", ""):
        return place
    if text[place] != ",":
        raise ValueError(f"line {text.count(chr(10), 0, place) + 1} is not JSON: a comma is missing between rows")
    return _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _csv_rows(path: Path) -> Found:
    """Every field as its text."""
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
    """Python's CSV reader refuses fields of more than 128 KiB; the limit is put back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
