"""Bytes that a compiled program sends between devices, counted in its HLO text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^\n]*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^ ]*\))? \{([^}]*)\}")


class Collective(NamedTuple):
    """One collective instruction of the program."""

    kind: str
    """One of KINDS."""
    bytes: int
    """Bytes of the whole array on one device: the result of an all-gather, the operand of a reduce-scatter."""
    group: int
    """Number of devices that take part."""
    times: int
    """Number of times that the program runs it; a loop without a known count is counted as one run."""

    def sent(self) -> float:
        """Bytes that each device sends with a ring algorithm."""
        share = (self.group - 1) / max(self.group, 1)
        if self.kind == "collective-permute":
            share = 1.0
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program's text (`compiled.as_text()`).

    An operand's size is looked up by its name. An asynchronous pair counts once, at its start.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            entry = current if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, op, rest = found.groups()
            bodies[current].append((shape, op, rest))
            sizes[current, name] = _bytes(shape)
    times = _times(bodies, entry)
    found_all = []
    for computation, instructions in bodies.items():
        for shape, op, rest in instructions:
            kind = op.removesuffix("-start")
            if kind not in KINDS or not times[computation]:
                continue
            operands = [sizes.get((computation, n), 0) for n in re.findall(r"%([\w.\-]+)", rest.partition(")")[0])]
            # A start's result is a tuple of operands and results.
            result = _bytes(shape) - (sum(operands) if op != kind else 0)
            whole = sum(operands) if kind == "reduce-scatter" else result
            found_all.append(Collective(kind, whole, _group(rest), times[computation]))
    return found_all


def _bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        bits = _BITS.get(dtype) or next(iter(map(int, re.findall(r"^[su](\d+)$", dtype))), 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _group(rest: str) -> int:
    if named := _NAMED.search(rest):
        axes = dict(axis.split("=") for axis in named[1].split(","))
        # A part of an axis is written 'axis':(what is before it)its size.
        return math.prod(int(axis.rpartition(")")[2] if ":" in axis else axes[axis]) for axis in named[2].split(","))
    found = _GROUPS.search(rest)
    if found is None:
        return 1
    return len(found[1].split(",")) if found[1] else int(found[2])


def _times(bodies: dict[str, list[tuple[str, str, str]]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, number: int) -> None:
        times[name] += number
        for _, op, rest in bodies[name]:
            trips = _TRIPS.search(rest)
            inner = number * (int(trips[1]) if op == "while" and trips else 1)
            called = _CALLED.findall(rest)
            for group in _BRANCHES.findall(rest):
                called += [c.strip().lstrip("%") for c in group.split(",")]
            for callee in called:
                if callee in bodies:
                    visit(callee, inner)

    visit(entry, 1)
    return times
