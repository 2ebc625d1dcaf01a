"""Bytes that a compiled program sends between devices, and its matrix products, counted in its HLO text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^\n]*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]+)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_DEVICE_IDS = re.compile(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")
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
    groups: tuple[tuple[int, ...], ...]
    """Positions in the mesh of the devices of each group, or source and target of each pair; empty = none is named."""
    scope: str
    """Path of the operation in the traced program."""

    def crossing(self, per_slice: int) -> int:
        """Bytes of the arrays of all groups with devices of several slices, which hold `per_slice` devices each."""
        spanning = [group for group in self.groups if len({i // per_slice for i in group}) > 1]
        return self.times * self.bytes * len(spanning)

    def sent(self) -> float:
        """Bytes that each device sends with a ring algorithm."""
        share = (self.group - 1) / max(self.group, 1)
        if self.kind == "collective-permute":
            share = 1.0
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Product(NamedTuple):
    """One matrix product of the program."""

    scope: str
    """Path of the operation in the traced program, with its named scopes."""
    flops: int
    """Multiplications and additions of one run."""
    times: int
    """Number of times that the program runs it; of a conditional, every branch is counted."""


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program's text (`compiled.as_text()`).

    An operand's size is looked up by its name. An asynchronous pair counts once, at its start.
    """
    found_all = []
    for instruction, times, shapes in _instructions(hlo):
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        operands = [_bytes(shape) for shape in shapes]
        # A start's result is a tuple of operands and results.
        result = _bytes(instruction.shape) - (sum(operands) if instruction.op != kind else 0)
        whole = sum(operands) if kind == "reduce-scatter" else result
        scope = _SCOPE.search(instruction.rest)
        found_all.append(
            Collective(
                kind,
                whole,
                _group(instruction.rest),
                times,
                _members(instruction.rest),
                scope[1] if scope else "",
            )
        )
    return found_all


def sent_to_slices(hlo: str) -> list[int]:
    """Bytes that one device sends to other slices with each send of a program that a TPU's compiler made.

    That compiler turns the part of a collective that crosses slices into messages of its runtime for several slices.
    """
    return [
        times * _bytes(shapes[0])
        for instruction, times, shapes in _instructions(hlo)
        if instruction.op == "send" and "megascale" in instruction.rest
    ]


def products(hlo: str, unknown: int = 1) -> list[Product]:
    """Every matrix product of a compiled program's text.

    Args:
      unknown: number of runs that a loop without a known count is taken for.
    """
    found_all = []
    for instruction, times, shapes in _instructions(hlo, unknown):
        if instruction.op == "dot":
            left = _dims(shapes[0])
            contracted = math.prod(left[int(i)] for i in _CONTRACTED.search(instruction.rest)[1].split(","))
            scope = _SCOPE.search(instruction.rest)
            flops = 2 * math.prod(_dims(instruction.shape)) * contracted
            found_all.append(Product(scope[1] if scope else "", flops, times))
    return found_all


class _Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    op: str
    rest: str


def _instructions(hlo: str, unknown: int = 1) -> Iterator[tuple[_Instruction, int, list[str]]]:
    """Each instruction that runs, how often it runs, and the shapes of its operands."""
    bodies: dict[str, list[_Instruction]] = defaultdict(list)
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            entry = current if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            bodies[current].append(_Instruction(*found.groups()))
    times = _times(bodies, entry, unknown)
    for computation, instructions in bodies.items():
        shapes = {x.name: x.shape for x in instructions}
        for x in instructions:
            if times[computation]:
                names = re.findall(r"%([\w.\-]+)", x.rest.partition(")")[0])
                yield x, times[computation], [shapes.get(name, "") for name in names]


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _SHAPE.search(shape)[2].split(",") if d]


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


def _members(rest: str) -> tuple[tuple[int, ...], ...]:
    """The devices of each group of a collective; empty if the text names none."""
    if found := _LISTED.search(rest) or _PAIRS.search(rest):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"[\d,]+(?=\})", found[1]))
    if found := _IOTA.search(rest):
        return _rows_of(_iota(found[3], found[4]).reshape(int(found[1]), int(found[2])))
    if found := _NAMED.search(rest):
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
        ids = _DEVICE_IDS.search(rest)
        order = _iota(ids[1], ids[2]) if ids else np.arange(math.prod(sizes.values()))
        parts, named = [], []
        for name, size in sizes.items():
            part = re.search(rf"{re.escape(name)}:\((\d+)\)(\d+)", found[2])
            cut = [int(part[1]), int(part[2]), size // int(part[1]) // int(part[2])] if part else [size]
            if part or name in found[2].split(","):
                named.append(len(parts) + (1 if part else 0))
            parts += cut
        others = [i for i in range(len(parts)) if i not in named]
        group = math.prod(parts[i] for i in named)
        return _rows_of(order.reshape(parts).transpose(others + named).reshape(-1, group))
    return ()


def _iota(dims: str, transposed: str | None) -> np.ndarray:
    """The numbers of devices in the order that the text describes."""
    shape = [int(d) for d in dims.split(",")]
    order = np.arange(math.prod(shape)).reshape(shape)
    return (order.transpose([int(d) for d in transposed.split(",")]) if transposed else order).reshape(-1)


def _rows_of(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())


def _times(bodies: dict[str, list[_Instruction]], entry: str, unknown: int) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, number: int) -> None:
        times[name] += number
        for _, _, op, rest in bodies[name]:
            trips = _TRIPS.search(rest)
            inner = number * (int(trips[1]) if trips else unknown) if op == "while" else number
            called = _CALLED.findall(rest)
            for group in _BRANCHES.findall(rest):
                called += [c.strip().lstrip("%") for c in group.split(",")]
            for callee in called:
                if callee in bodies:
                    visit(callee, inner)

    visit(entry, 1)
    return times
