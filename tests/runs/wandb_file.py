"""Reads the file that wandb writes offline: records of its own protocol in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

_BLOCK, _HEADER = 32768, 7


def records(path: Path):
    """The records of a .wandb file, as messages of wandb's protocol."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if (room := _BLOCK - at % _BLOCK) < _HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        part, at = data[at + _HEADER : at + _HEADER + length], at + _HEADER + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def history(path: Path) -> list[dict]:
    """The rows that were logged, each with its _step."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in items})
    return rows
