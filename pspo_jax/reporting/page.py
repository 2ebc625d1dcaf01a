"""Run folders -> the data of a report -> one HTML page.

A report is often asked for while a run is still going or after it died, so only metrics.jsonl is required. Any other
file that is missing, cut off or unreadable becomes a note on the page. The page is report.html (structure and style)
with the data put in as JSON, followed by report_script.html; the reader's browser draws the charts.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TypedDict, TypeVar
from urllib.parse import quote

import yaml

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.storage import REFUSED, StorageError, write_whole

MAX_POINTS = 2000
"""Points kept of one curve."""
MAX_HISTOGRAMS = 200
"""Priority histograms kept of one run."""
MAX_DUMPS = 60
"""Completion dumps kept of one run."""
MAX_TEXT = 8000
"""Characters kept of one prompt or completion."""
MAX_PICTURE = 400_000
"""Characters of the data URL of an image above which a page leaves it out."""
_PNG = "data:image/png;base64,"

_AXES = {"step": "step", "rollouts": "rollouts/total", "tokens": "num_tokens"}
_PHASES = ("select", "rollout", "verify", "update")
T = TypeVar("T")


class Histogram(TypedDict):
    """A histogram over all prompts at a step."""

    step: int | float
    edges: list[int | float]
    counts: list[int | float]
    """Prompts between neighbouring edges."""


class _Group(TypedDict):
    """The completions of one prompt in a dump."""

    prompt: str
    answer: str
    images: list[str]
    """Data URLs of the prompt's images."""
    rows: list[dict[str, object]]


def read_runs(folders: Sequence[Path], beside: Path) -> dict[str, object]:
    """The report's data. A folder that is named twice counts once.

    Args:
      beside: folder of the page, from which links to files of a run lead.
    Raises:
      ConfigError: a folder does not exist or holds no metrics.jsonl.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    names = _names([folder.resolve() for folder in unique])
    return {
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "runs": [_read_run(folder, name, beside) for folder, name in zip(unique, names, strict=True)],
    }


def render(data: dict[str, object]) -> str:
    """The page. Data can hold any text, so `<`, `>` and `&` are written as JSON escapes: no completion can
    end the script element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page, script = (
        resources.files("pspo_jax.reporting").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.html", "report_script.html")
    )
    # The data goes in last: it may spell the other marker.
    return page.replace("__PSPO_SCRIPT__", script, 1).replace("__PSPO_DATA__", text, 1)


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Indices of at most `limit` values: the ends, and both extremes of each of equal stretches, so that a
    spike of one step stays in sight however long the run was."""
    n = len(values)
    if n <= limit:
        return list(range(n))
    stretches = limit // 2 - 1
    kept = {0, n - 1}
    for i in range(stretches):
        stretch = range(i * n // stretches, (i + 1) * n // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _read_run(folder: Path, name: str, beside: Path) -> dict[str, object]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the run.dir of a training run")
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: holds no metrics.jsonl; name the run.dir of a run whose training has begun")
    notes: list[str] = []
    lines = _read_metrics(folder, notes)
    rows, metrics = _columns(lines)
    return {
        "name": name,
        "config": _read_config(folder, notes),
        "rows": rows,
        "metrics": metrics,
        "summary": _read_summary(folder, lines, notes),
        "priorities": read_histograms(folder, "priority", notes),
        "visits": read_histograms(folder, "visits", []),
        "completions": _read_completions(folder, notes),
        "profiles": _profiles(folder, beside),
        "notes": notes,
    }


def _profiles(folder: Path, beside: Path) -> list[dict[str, str]]:
    """A text and a link for each trace and each profile of memory of a run."""
    found = [
        *(("trace", path) for path in sorted(folder.glob("profile/plugins/profile/*/*.trace.json.gz"))),
        *(("memory", path) for path in sorted(folder.glob("profile/*.prof"))),
    ]
    return [
        {
            "text": f"{kind}: {path.relative_to(folder).as_posix()}",
            "href": quote(os.path.relpath(path.resolve(), beside.resolve()).replace(os.sep, "/")),
        }
        for kind, path in found
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's shortest trailing path that no other folder shares."""
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_metrics(folder: Path, notes: list[str]) -> list[dict[str, object]]:
    """Lines in the order of their steps; where a resumed run repeated a step, its last line."""
    by_step = {
        step: line
        for line in _lines(folder / "metrics.jsonl", notes)
        if (step := _number(line.get("step"))) is not None
    }
    return [by_step[step] for step in sorted(by_step)]


def _columns(lines: list[dict[str, object]]) -> tuple[dict[str, list[int | float | None]], dict[str, object]]:
    """The x axes of the rows in use, and the values of every metric with the rows where they stand.

    Metrics are thinned one by one, as each has its own extremes; fingerprints (crc/...) are no quantities.
    """
    picked: dict[str, tuple[list[int], list[float]]] = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        if key == "step" or key.startswith("crc/"):
            continue
        found = [(i, v) for i, line in enumerate(lines) if (v := _number(line.get(key))) is not None]
        kept = [found[i] for i in thin([v for _, v in found], MAX_POINTS)]
        if kept:
            picked[key] = ([i for i, _ in kept], [_rounded(v) for _, v in kept])
    used = sorted({i for indices, _ in picked.values() for i in indices})
    place = {row: i for i, row in enumerate(used)}
    rows = {axis: [_number(lines[i].get(key)) for i in used] for axis, key in _AXES.items()}
    return rows, {key: {"at": [place[i] for i in at], "values": values} for key, (at, values) in picked.items()}


def _read_config(folder: Path, notes: list[str]) -> dict[str, dict[str, object]]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = None
    except (OSError, ValueError, yaml.YAMLError):
        config = "unreadable"
    if not isinstance(config, dict):
        notes.append(f"config.yaml is {'missing' if config is None else 'not readable'}.")
        return {}
    return {
        str(stage): {str(field): _plain(value) for field, value in fields.items()}
        for stage, fields in config.items()
        if isinstance(fields, dict)
    }


def _read_summary(folder: Path, lines: list[dict[str, object]], notes: list[str]) -> dict[str, object]:
    """summary.json; for a run that has not written one, the same numbers from its metrics so far."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    reached = _last(lines, "step")
    # A finished run that was resumed with more steps leaves its old summary until the new end.
    if isinstance(summary, dict) and (_number(summary.get("steps")) or 0) < (reached or 0):
        summary = None
    if not isinstance(summary, dict):
        notes.append("No current summary.json: the run is still going or was stopped. Its numbers are those so far.")
        summary = {
            "eval": {kind: _last(lines, f"eval/{kind}") for kind in ("greedy", "sampled")},
            "steps": reached,
            "rollouts": _last(lines, "rollouts/total"),
            "tokens": _last(lines, "num_tokens"),
            "seconds": {p: sum(_number(line.get(f"time/{p}")) or 0 for line in lines) for p in _PHASES},
        }
        finished = False
    else:
        finished = True
    return {
        "finished": finished,
        "eval": _numbers(summary.get("eval")),
        "seconds": _numbers(summary.get("seconds")),
        **{key: _number(summary.get(key)) for key in ("steps", "rollouts", "tokens")},
    }


def read_histograms(folder: Path, name: str, notes: list[str]) -> list[Histogram]:
    """Histograms over all prompts, of the selector's priorities or of visits; none if it keeps none."""
    path = folder / "strategy.jsonl"
    found: dict[float, Histogram] = {}
    for line in _lines(path, notes) if path.is_file() else []:
        step, found_here = _number(line.get("step")), line.get(name)
        if step is None or not isinstance(found_here, dict):
            continue
        edges, counts = _list(found_here.get("edges")), _list(found_here.get("counts"))
        known = [[x for x in numbers if x is not None] for numbers in (edges, counts)]
        if counts and len(edges) == len(counts) + 1 and known == [edges, counts]:
            found[step] = Histogram(step=step, edges=known[0], counts=known[1])
    return _evenly([found[step] for step in sorted(found)], MAX_HISTOGRAMS, f"{name} histograms", notes)


def _read_completions(folder: Path, notes: list[str]) -> list[dict[str, object]]:
    """One entry a dump: its step, and its groups of completions in the order of the file."""
    dumps = []
    paths = sorted(p for p in (folder / "completions").glob("step_*") if p.suffix in (".jsonl", ".parquet"))
    for path in _evenly(paths, MAX_DUMPS, "completion dumps", notes):
        groups: dict[str, _Group] = {}
        for i, line in enumerate(_parquet(path, notes) if path.suffix == ".parquet" else _lines(path, notes)):
            key = str(line.get("prompt_id", i))
            if key not in groups:
                groups[key] = _Group(
                    prompt=_text(line.get("prompt")),
                    answer=_text(line.get("answer")),
                    images=_pictures(line.get("images")),
                    rows=[],
                )
            groups[key]["rows"].append(
                {
                    "completion": _text(line.get("completion")),
                    # A dump that has no verdict of its own may have accuracy, which is the same.
                    "verdict": _number(line.get("verdict", line.get("rewards/accuracy"))),
                    **{key: _number(line.get(key)) for key in ("reward", "advantage", "length")},
                    "ended": line["end"] == "stop" if "end" in line else bool(line.get("ended")),
                }
            )
        step = re.search(r"\d+", path.stem)
        if groups and step:
            dumps.append({"step": int(step.group()), "groups": list(groups.values())})
    return dumps


def _pictures(value: object) -> list[str]:
    """The images that a line holds: PNG files as data URLs, of which a page shows those that are not too large."""
    found = value if isinstance(value, list) else []
    return [x for x in found if isinstance(x, str) and x.startswith(_PNG) and len(x) <= MAX_PICTURE]


def _parquet(path: Path, notes: list[str]) -> list[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        notes.append(f"{path.name} could not be read: {' '.join(str(error).split())[:100]}.")
        return []


def _lines(path: Path, notes: list[str]) -> list[dict[str, object]]:
    """The JSON objects of a file; any other line, as when a writer was cut off, becomes a note."""
    objects, broken = [], 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}.")
        return []
    for line in filter(str.strip, text.split("\n")):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} unreadable line{'s'[: broken > 1]} left out, as when a writer is cut off.")
    return objects


def _evenly(items: list[T], limit: int, what: str, notes: list[str]) -> list[T]:
    """At most `limit` items, the first and the last among them."""
    if len(items) <= limit:
        return items
    notes.append(f"{limit} of {len(items)} {what} are shown, evenly spaced.")
    return [items[i * (len(items) - 1) // (limit - 1)] for i in range(limit)]


def _number(value: object) -> int | float | None:
    """`value` if it is a finite number: JSON in a page has no NaN, and a chart no place for it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _numbers(values: object) -> dict[str, int | float]:
    items = values.items() if isinstance(values, dict) else ()
    return {str(key): number for key, value in items if (number := _number(value)) is not None}


def _list(values: object) -> list[int | float | None]:
    return [_number(value) for value in values] if isinstance(values, list) else []


def _rounded(value: float) -> int | float:
    """The value with six digits: no chart shows more, and floats are most of the page's bytes."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _last(lines: list[dict[str, object]], key: str) -> int | float | None:
    return next((v for line in reversed(lines) if (v := _number(line.get(key))) is not None), None)


def _text(value: object) -> str:
    """`value` as text; a very long text is cut in the middle, as question and answer stand at its ends."""
    text = "" if value is None else str(value)
    # Half an emoji, as a tokenizer can leave behind, is a lone surrogate: no text that UTF-8 can carry on.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _plain(value: object) -> object:
    """A config value as JSON can hold it: YAML also has dates, NaN and nested values."""
    if value is None or isinstance(value, bool | str) or _number(value) is not None:
        return value
    return str(value)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report on `runs` to `out`, whose folder is made if need be, and return `out`.

    Raises:
      ConfigError: a folder is no run folder, or `out` is no file that may be written.
      StorageError: `out` cannot be written now, as on a full disk.
    """
    page = render(read_runs(runs, out.parent))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_whole(out, page.encode())
    except (OSError, StorageError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if isinstance(reason, OSError) and reason.errno in (*REFUSED, errno.EEXIST):
            raise ConfigError(f"--out {out}: {reason.strerror}; name a file that can be written") from error
        raise
    return out
