"""Summaries -> markdown tables, a learning curve, JSON. Shares are shown in percent, lengths in tokens."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pspo_jax.evaluation.statistics import Summary, TaskAccuracy, average
from pspo_jax.system.storage import write_whole

Rows = Mapping[str, Mapping[str, Summary]]
"""Checkpoint label -> benchmark name -> summary."""

DASH = "–"
LEGEND = (
    "Accuracy (avg@n) in percent. ± is one standard error, the problems taken as a sample of a population; "
    "that of an average takes the benchmarks as independent."
)


def markdown(rows: Rows, five: Sequence[str]) -> str:
    """A table of checkpoints against benchmarks, then one table of details for each benchmark.

    The last column of the first is the average over the benchmarks `five`, given where a row has them all; it is left
    out if no row has.
    """
    names = _benchmarks(rows.values())
    with_average = any(_average(of, five) for of in rows.values())
    header = ["checkpoint", *names] + [f"average of {len(five)}"] * with_average
    body = []
    for label, of in rows.items():
        cells = [_score(of[name].accuracy, of[name].se_problems) if name in of else DASH for name in names]
        if with_average:
            mean = _average(of, five)
            cells.append(_score(*mean) if mean else DASH)
        body.append([label, *cells])
    parts = [_table(header, body), LEGEND]
    for name in names:
        parts += _details(name, {label: of[name] for label, of in rows.items() if name in of})
    return "\n\n".join(parts) + "\n"


def can_draw() -> bool:
    """Whether matplotlib, which `curve` needs, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curve(path: Path, rows: Rows, steps: Mapping[str, int], title: str, five: Sequence[str] | None = None) -> None:
    """Write a PNG of accuracy (percent, ± `se_problems`) against training step, a line for each benchmark.

    A thicker line is the average over `five` (every benchmark if None), if that is two or more, at the checkpoints
    that have them all. Checkpoints that `steps` lacks, such as another model to compare with, are left out.
    """
    # Only the host that draws needs it, and it is slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    placed = sorted(((steps[label], of) for label, of in rows.items() if label in steps), key=lambda item: item[0])
    names = _benchmarks(of for _, of in placed)
    lines = {
        name: [(step, of[name].accuracy, of[name].se_problems) for step, of in placed if name in of] for name in names
    }
    of_five = names if five is None else five
    averages = [(step, *mean) for step, of in placed if (mean := _average(of, of_five))]
    if len(of_five) > 1 and averages:
        lines[f"average of {len(of_five)}"] = averages

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line in lines.items():
        known = [(step, mean, se) for step, mean, se in line if not math.isnan(mean)]
        if not known:
            continue
        points = [(step, 100 * mean, 0 if math.isnan(se) else 100 * se) for step, mean, se in known]
        x, y, error = zip(*points, strict=True)
        color, width = ("black", 2.5) if line is averages else (None, 1.2)
        axes.errorbar(x, y, yerr=error, label=name, marker="o", markersize=4, capsize=3, color=color, linewidth=width)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy (percent)")
    distinct = sorted({step for step, _ in placed})
    # Around a single step the locator would mark fractions of one.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if len(distinct) > 1 else FixedLocator(distinct))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def to_json(summary: Summary) -> dict[str, object]:
    """The summary as JSON holds it: nan becomes None, and keys become strings."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: plain(value) for name, value in summary._asdict().items()}


def from_json(saved: Mapping[str, Any]) -> Summary:
    """The inverse of `to_json`."""

    def back(value: Any) -> Any:
        if isinstance(value, dict):
            return {int(k): back(v) for k, v in value.items()}
        return math.nan if value is None else value

    by_task = tuple(TaskAccuracy(*map(back, row)) for row in saved["by_task"])
    return Summary(**{name: back(value) for name, value in saved.items()} | {"by_task": by_task})


def _benchmarks(rows: Iterable[Mapping[str, Summary]]) -> list[str]:
    """Every benchmark's name once, in the order of first appearance."""
    return list(dict.fromkeys(name for of in rows for name in of))


def _average(of: Mapping[str, Summary], five: Sequence[str]) -> tuple[float, float] | None:
    if not five or any(name not in of for name in five):
        return None
    return average([(of[name].accuracy, of[name].se_problems) for name in five])


def _details(name: str, of: Mapping[str, Summary]) -> list[str]:
    every = list(of.values())
    passes = sorted({k for s in every for k in s.pass_at})
    majorities = sorted({k for s in every for k in s.majority_at})
    header = [
        "checkpoint",
        "avg@n",
        "SE over problems",
        "SE over samples",
        *(f"pass@{k}" for k in passes),
        *(f"maj@{k}" for k in majorities),
        "mean length",
        "truncated %",
        "no verdict %",
    ]
    body = [
        [
            label,
            _percent(s.accuracy),
            _percent(s.se_problems, 2),
            _percent(s.se_samples, 2),
            *(_percent(s.pass_at.get(k, math.nan)) for k in passes),
            *(_percent(s.majority_at.get(k, math.nan)) for k in majorities),
            DASH if math.isnan(s.mean_length) else f"{s.mean_length:.0f}",
            _percent(s.truncated),
            _percent(s.no_verdict),
        ]
        for label, s in of.items()
    ]
    problems, samples = _range(s.problems for s in every), _range(s.samples for s in every)
    size = f"Problems: {problems}; n, samples of each: {samples}. In percent, the mean length in tokens."
    return [f"### {_escape(name)}", size, _table(header, body), *_by_task(of)]


def _by_task(of: Mapping[str, Summary]) -> list[str]:
    """A table of the tasks, or kinds, of a benchmark's problems against checkpoints; nothing if there is only one."""
    found = {label: {part.task: part for part in s.by_task} for label, s in of.items()}
    problems = {part.task: part.problems for s in of.values() for part in s.by_task}
    if not problems:
        return []
    body = [
        [
            task,
            str(count),
            *(_score(p[task].accuracy, p[task].se_problems) if task in p else DASH for p in found.values()),
        ]
        for task, count in problems.items()
    ]
    return [_table(["task", "problems", *found], body)]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * (len(header) - 1)
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in (header, *body)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _escape(text: str) -> str:
    # A backslash before a bar would otherwise undo the bar's own.
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _score(mean: float, se: float) -> str:
    return DASH if math.isnan(mean) else f"{_percent(mean)} ± {_percent(se)}"


def _percent(share: float, digits: int = 1) -> str:
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f}"


def _range(counts: Iterable[int]) -> str:
    distinct = set(counts)
    return f"{min(distinct)}" if len(distinct) == 1 else f"{min(distinct)} to {max(distinct)}"
