"""Markdown tables from the lines of JSON that the benchmarks write.

    python scripts/bench_tables.py bench.jsonl... [--write docs/performance.md]

A later line for the same bench, case and contender replaces an earlier one. With --write, the text between
`<!-- table NAME -->` and `<!-- end NAME -->` in the document is replaced for every table that has lines; the rest of
the document stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pspo_jax.system.one_line_parser import OneLineParser

Line = dict[str, Any]


class Column(NamedTuple):
    heading: str
    path: str
    """Where the number stands in a line, with dots."""
    show: Callable[[float], str]
    ratio: str = ""
    """How a peer is compared: "up" = ours / peer, "down" = peer / ours, "share" = ours / peer in percent."""


def places(n: int) -> Callable[[float], str]:
    return lambda x: f"{x:,.{n}f}"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def gib(mib: float) -> str:
    return f"{mib / 1024:.2f}"


def tera(x: float) -> str:
    return f"{x / 1e12:.3g}"


def giga(x: float) -> str:
    return f"{x / 1e9:.3g}"


def milli(x: float) -> str:
    return f"{1e3 * x:,.0f}" if x >= 0.1 else f"{1e3 * x:.3g}"


def micro(x: float) -> str:
    return f"{1e6 * x:,.0f}"


_SPREAD = Column("spread", "seconds.spread", percent)
_RSS = Column("peak RSS GiB", "peak_rss_mib", gib, "share")
_COMMON = [Column("first call s, cold / cached", "first_call", str), _RSS]
_NOISE = [Column("foreign cores", "foreign_cores", places(2)), Column("quiet runs", "quiet_runs", str)]

COLUMNS: dict[str, list[Column]] = {
    "rollout": [
        Column("tokens/s, median", "values.tokens_per_s", places(0), "up"),
        Column("tokens/s, best", "values.best_tokens_per_s", places(0), "up"),
        _SPREAD,
        *_COMMON,
        *_NOISE,
    ],
    "step": [
        Column("s/step, median", "seconds.median", places(3), "down"),
        Column("s/step, best", "seconds.best", places(3), "down"),
        Column("rollout s", "values.rollout_s", places(3), "down"),
        Column("update s", "values.update_s", places(3), "down"),
        _SPREAD,
        *_COMMON,
        *_NOISE,
    ],
    "real": [
        Column("s/step, median", "seconds.median", places(2), "down"),
        Column("s/step, best", "seconds.best", places(2), "down"),
        Column("rollout s", "values.rollout_s", places(2), "down"),
        Column("update s", "values.update_s", places(2), "down"),
        Column("tokens/s", "values.tokens_per_s", places(1), "up"),
        _SPREAD,
        *_COMMON,
        *_NOISE,
    ],
    "ragged": [
        Column("s, median", "seconds.median", places(3), "down"),
        Column("s, best", "seconds.best", places(3), "down"),
        Column("tokens/s", "values.tokens_per_s", places(0)),
        Column("useful", "values.useful", places(2)),
        _SPREAD,
        *_COMMON,
        *_NOISE,
    ],
    "stages": [
        Column("s, median", "seconds.median", places(1), "down"),
        Column("s, best", "seconds.best", places(1), "down"),
        Column("CPU s", "values.cpu_seconds", places(1), "down"),
        Column("tokens/s", "values.tokens_per_s", places(0)),
        Column("useful tokens", "values.useful", places(2)),
        Column("useful columns", "values.useful_columns", places(2)),
        Column("cache read GB", "values.cache_read_gb", places(0), "down"),
        Column("temporary MiB", "values.temporary_mib", places(0)),
        Column("compile s", "values.compile_s", places(1)),
        Column("compile CPU s", "values.compile_cpu_s", places(1)),
        Column("foreign cores", "foreign_cores", places(2)),
        Column("quiet runs", "quiet_runs", str),
    ],
    "floors": [
        Column("GFLOP/s", "values.flops_per_s", giga),
        Column("GB/s", "values.bytes_per_s", giga),
        Column("tokens/s", "values.tokens_per_s", places(0)),
        Column("ms", "seconds.median", milli),
        Column("floor ms", "values.floor_s", milli),
        Column("share of the floor", "values.share", percent),
        _SPREAD,
        *_NOISE,
    ],
    "attention": [
        Column("us", "seconds.median", micro),
        _SPREAD,
        Column("temporary MiB", "values.temporary_mib", places(0)),
        Column("GB/s of live columns", "values.live_bytes_per_s", giga),
    ],
    "accelerator": [
        Column("ms", "seconds.median", milli, "down"),
        Column("tokens/s", "values.tokens_per_s", places(0), "up"),
        Column("floor ms", "values.floor_s", milli),
        Column("TFLOP/s", "values.flops_per_s", tera, "up"),
        Column("GB/s", "values.bytes_per_s", giga),
        Column("share of the floor", "values.share", percent),
        Column("share, cache read apart", "values.share_apart", percent),
        Column("rollout s", "values.rollout_s", places(2)),
        Column("reward s", "values.reward_s", places(3)),
        Column("update s", "values.update_s", places(2)),
        Column("peak device GiB", "values.peak_device_mib", gib, "share"),
        Column("largest gap", "values.gap_max", "{:.2g}".format),
        Column("mean gap", "values.gap_mean", "{:.2g}".format),
        Column("first call s", "first_call.cold", places(1)),
    ],
}
"""Columns of the benches' tables, which are named after them; a column that no line has is left out."""

ONE_MACHINE = ("rollout", "step", "ragged", "floors")
"""Benches whose machine the table `machine` describes; that of any other bench stands above its own table."""


def read(files: Iterable[Path]) -> list[Line]:
    """The lines of the files, reduced by `latest`."""
    found: list[Line] = []
    for file in files:
        for place, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                _ = line["bench"], line["case"], line["contender"]
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{file}:{place}: not a measurement ({error!r})") from error
            found.append(line)
    return latest(found)


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each bench, case and contender, at the place of its first one.

    A line that reports a skipped part is dropped if the part was measured later.
    """
    found: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        found.pop((line["bench"], line.get("part", ""), ""), None)
        found[line["bench"], line["case"], line["contender"]] = line
    return list(found.values())


def number(line: Line, path: str) -> Any:
    """The number at a path of a line; None if there is none."""
    value: Any = line
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def cell(line: Line, column: Column) -> str:
    value = number(line, column.path)
    if value is None:
        return ""
    if column.path == "first_call":
        return " / ".join(f"{value[k]:.1f}" for k in ("cold", "cached") if value.get(k) is not None)
    if column.path == "quiet_runs":
        return f"{value} of {line['runs']}" + ("" if value else " (NOISY)")
    return column.show(value)


def ratio(ours: Line, peer: Line, column: Column) -> str:
    a, b = number(ours, column.path), number(peer, column.path)
    if column.path == "quiet_runs":
        return "" if a and b else "NOISY"
    if not column.ratio or not a or not b:
        return ""
    if column.ratio == "share":
        return f"{a / b:.0%}"
    return f"**{a / b if column.ratio == 'up' else b / a:.2f}x**"


def label(line: Line) -> str:
    note = f" {line['note']}" if line.get("note") else ""
    who = f": {line['contender']}" if line["contender"] else ""
    skipped = f" skipped: {line['skipped']}" if line.get("skipped") else ""
    return f"{line['case']}{who}{note}{skipped}".replace("|", "/")


def table(bench: str, lines: Sequence[Line]) -> str:
    """The rows of a bench by case, each with the ratios of this package to every peer."""
    own = [line for line in lines if line["bench"] == bench]
    columns = [c for c in COLUMNS[bench] if any(cell(line, c) for line in own)]
    rows = [["", *(c.heading for c in columns)], ["---", *["---:"] * len(columns)]]
    for case in dict.fromkeys(line["case"] for line in own):
        group = [line for line in own if line["case"] == case]
        rows += [[label(line), *(cell(line, c) for c in columns)] for line in group]
        ours = [line for line in group if line.get("ours")]
        peers = [line for line in group if not line.get("ours") and not line.get("skipped")]
        for peer in peers if ours else []:
            cells = [ratio(ours[0], peer, c) for c in columns]
            if any(x.startswith("**") for x in cells):
                rows.append([f"{case}: ratio to {peer['contender']}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def machine_table(lines: Sequence[Line]) -> str:
    """Machines, versions and dates of the lines; where they differ, all are listed."""
    facts: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value is not None and str(value) not in facts.setdefault(name, []):
            facts[name].append(str(value))

    for line in lines:
        m = line.get("machine") or {}
        if m:
            add("Processor, cores, memory", f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB")
        add("Accelerator", m.get("accelerator"))
        add("Operating system kernel", m.get("kernel"))
        add("Date", m.get("date"))
        for name, version in (line.get("versions") or {}).items():
            add("Versions", f"{name} {version}")
    rows = [f"| {name} | {', '.join(values)} |" for name, values in facts.items() if values]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Name -> table, for every table that has lines."""
    unknown = {line["bench"] for line in lines} - set(COLUMNS)
    if unknown:
        raise SystemExit(f"no table for the bench {', '.join(sorted(unknown))}")
    benches = [b for b in COLUMNS if any(line["bench"] == b for line in lines)]
    found: dict[str, str] = {}
    if any(b in ONE_MACHINE for b in benches):
        found["machine"] = machine_table([line for line in lines if line["bench"] in ONE_MACHINE])
    for bench in benches:
        own = "" if bench in ONE_MACHINE else machine_table([x for x in lines if x["bench"] == bench]) + "\n\n"
        found[bench] = own + table(bench, lines)
    return found


def replaced(text: str, name: str, new: str, where: str) -> str:
    """A document in which the text between the markers of a table is replaced."""
    begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    if not re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL):
        raise SystemExit(f"{where}: no markers {begin} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of lines of JSON, the oldest first")
    parser.add_argument("--write", type=Path, help="document whose tables are replaced; without it they are printed")
    options = parser.parse_args(argv)
    found = tables(read(options.files))
    if not options.write:
        print("\n\n".join(f"### {name}\n\n{text}" for name, text in found.items()))
        return
    text = options.write.read_text()
    for name, new in found.items():
        text = replaced(text, name, new, str(options.write))
    options.write.write_text(text)
    print(f"{options.write}: {', '.join(found)}", file=sys.stderr)


if __name__ == "__main__":
    main()
