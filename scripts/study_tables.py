"""Tables and pictures of a registered study, from its plan and the lines of its finished runs.

    python scripts/study_tables.py docs/data/uneven_pools.yaml --write docs/results.md [--check]

The text between `<!-- table NAME -->` and `<!-- end NAME -->` in the document is replaced. The tables are, for each
group of arms (all of them are `summary` if the plan names no groups), `PART GROUP` with the share of rollouts by regime
and `PART GROUP gains` with the difference in sampled accuracy, and `PART REGIME` with all figures of a regime. Where
the document shows `pictures/PART_REGIME.svg`, the curves are drawn. With --check nothing is written, and a table that
is not as the data say is an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import _study_plan
from _study_plan import Plan, Run, Summary
from _study_statistics import (
    GREEDY,
    ROLLOUTS,
    SAMPLED,
    TOKENS,
    area,
    holm,
    interval,
    paired_p,
    reached,
    score_at,
)
from bench_tables import replaced

from pspo_jax.system.one_line_parser import OneLineParser

Summaries = Mapping[Run, Summary]
FEWEST = 5
"""Seeds that a comparison needs for a p-value."""


class Comparison(NamedTuple):
    """One arm beside the baseline in one regime; every list has a figure for each seed that both have finished."""

    seeds: list[int]
    greedy: list[float]
    """Greedy accuracy at the last evaluation within the baseline's rollouts."""
    sampled: list[float]
    greedy_gain: list[float]
    """The same less the baseline's, of the same seed."""
    sampled_gain: list[float]
    area_gain: list[float]
    """Sampled accuracy, averaged over the baseline's rollouts, less the baseline's."""
    rollouts: list[float | None]
    """Share of the baseline's rollouts until its final sampled accuracy is reached; None = it is not."""
    tokens: list[float | None]
    """The same share of the baseline's generated tokens."""
    effective: list[float]


def compare(plan: Plan, summaries: Summaries, part: str, regime: str, arm: str) -> Comparison:
    """The arm's figures from the runs that have finished."""
    pairs = []
    for run in _study_plan.runs_of(plan, part):
        base = run._replace(arm=plan.arms[arm].baseline)
        if (run.regime, run.arm) == (regime, arm) and run in summaries and base in summaries:
            pairs.append((summaries[run], summaries[base]))
    points = [(own["points"], base["points"]) for own, base in pairs]
    limits = [base[-1][ROLLOUTS] for _, base in points]
    greedy, sampled = (
        [score_at(own, limit, score) for (own, _), limit in zip(points, limits, strict=True)]
        for score in (GREEDY, SAMPLED)
    )
    return Comparison(
        seeds=[own["seed"] for own, _ in pairs],
        greedy=greedy,
        sampled=sampled,
        greedy_gain=[a - base[-1][GREEDY] for a, (_, base) in zip(greedy, points, strict=True)],
        sampled_gain=[a - base[-1][SAMPLED] for a, (_, base) in zip(sampled, points, strict=True)],
        area_gain=[area(own, limit) - area(base, limit) for (own, base), limit in zip(points, limits, strict=True)],
        rollouts=[_share(own, base, ROLLOUTS) for own, base in points],
        tokens=[_share(own, base, TOKENS) for own, base in points],
        effective=[own["effective"] for own, _ in pairs],
    )


def _share(own: list[list[float]], base: list[list[float]], axis: int) -> float | None:
    """What the arm spent until it had the baseline's final sampled accuracy, as a share of the baseline's cost."""
    spent = reached(own, axis, base[-1][SAMPLED])
    total = base[-1][axis]
    return None if spent is None or spent > total else spent / total


def comparisons(plan: Plan, summaries: Summaries, part: str) -> dict[str, dict[str, Comparison]]:
    """Regime -> arm -> comparison, for what has finished."""
    found: dict[str, dict[str, Comparison]] = {}
    for regime in plan.regimes:
        for arm, settings in plan.arms.items():
            if regime in settings.regimes:
                one = compare(plan, summaries, part, regime, arm)
                if one.seeds:
                    found.setdefault(regime, {})[arm] = one
    return found


def signed(values: Sequence[float]) -> str:
    """Mean with its interval, with signs; one or two seeds have no interval."""
    found = interval(values)
    width = f" [{found.low:+.3f}, {found.high:+.3f}]" if len(values) > 2 else ""
    return f"{found.mean:+.3f}{width}"


def share(shares: Iterable[float | None]) -> str:
    """Mean share with its interval. Runs that never reached the score count as 1: the mean is then a lower bound."""
    known = list(shares)
    found = interval([1.0 if one is None else one for one in known])
    missed = sum(one is None for one in known)
    text = f"{found.mean:.2f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if len(known) > 2 else "")
    return text if not missed else f"≥ {text}, {len(known) - missed} of {len(known)}"


def group_table(
    plan: Plan,
    members: Sequence[str],
    found: Mapping[str, Mapping[str, Comparison]],
    cell: Callable[[Comparison], str],
) -> str:
    """A group's arms by the regimes in which one of them beside its baseline has runs."""
    others = [arm for arm in members if plan.arms[arm].baseline != arm]
    columns = [regime for regime in found if any(arm in found[regime] for arm in others or members)]
    rows = [f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in members:
        cells = [cell(found[regime][arm]) if arm in found[regime] else "" for regime in columns]
        if any(cells):
            rows.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def regime_table(plan: Plan, arms: Mapping[str, Comparison], corrected: Mapping[str, float]) -> str:
    """All figures of one regime."""
    rows = [
        "| arm | beside | seeds | greedy | sampled | greedy less its | sampled less its | rollouts to its score "
        "| tokens to it | area less its | p | effective |",
        "|---" * 12 + "|",
    ]
    for arm, one in arms.items():
        gains, base = ["", "", "", ""], plan.arms[arm].baseline
        if arm != base:
            p = corrected.get(arm)
            gains = [signed(x) for x in (one.greedy_gain, one.sampled_gain, one.area_gain)]
            gains.append("" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}")
        cells = [
            f"`{arm}`",
            "" if arm == base else f"`{base}`",
            str(len(one.seeds)),
            *(f"{interval(x).mean:.3f}" for x in (one.greedy, one.sampled)),
            *gains[:2],
            *(share(x) for x in (one.rollouts, one.tokens)),
            *gains[2:],
            f"{interval(one.effective).mean:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def control_table(plan: Plan, runs: Sequence[Summary]) -> str:
    """Accuracy before and after the runs of one regime beside that of the control: means and standard errors."""

    def cell(values: Sequence[float]) -> str:
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{error}"

    head = ("arm", "seeds", "greedy before", "greedy", "sampled before", "sampled", "control before", "control")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in plan.arms:
        of_arm = [line for line in runs if line["arm"] == arm]
        ends = [(line["points"][0], line["points"][-1]) for line in of_arm]
        scores = [[point[score] for point in side] for score in (GREEDY, SAMPLED) for side in zip(*ends, strict=True)]
        scores += [list(side) for side in zip(*(line["control"] for line in of_arm), strict=True)]
        if of_arm:
            rows.append(f"| `{arm}` | {len(of_arm)} | {' | '.join(map(cell, scores))} |")
    return "\n".join(rows)


def tables(plan: Plan, summaries: Summaries) -> dict[str, str]:
    """Name -> table, for all parts that have runs."""
    out = {}
    for part in sorted({run.part for run in summaries}):
        found = comparisons(plan, summaries, part)
        p_values = {
            (regime, arm): paired_p(one.area_gain)
            for regime, arms in found.items()
            for arm, one in arms.items()
            if arm != plan.arms[arm].baseline and len(one.seeds) >= FEWEST
        }
        corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
        for name, members in plan.groups.items():
            others = [arm for arm in members if plan.arms[arm].baseline != arm]
            if not any(arm in arms for arms in found.values() for arm in others or members):
                continue
            out[f"{part} {name}"] = group_table(plan, members, found, lambda one: share(one.rollouts))
            out[f"{part} {name} gains"] = group_table(plan, others, found, lambda one: signed(one.sampled_gain))
        for regime, arms in found.items():
            of_regime = {arm: p for (where, arm), p in corrected.items() if where == regime}
            runs = [line for run, line in summaries.items() if (run.part, run.regime) == (part, regime)]
            controlled = all("control" in line for line in runs)
            out[f"{part} {regime}"] = control_table(plan, runs) if controlled else regime_table(plan, arms, of_regime)
    return out


def draw(plan: Plan, summaries: Summaries, part: str, regime: str, path: Path) -> None:
    """Sampled accuracy against rollouts, as mean and standard error over seeds, of the arms that have most seeds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    matplotlib.rcParams["svg.hashsalt"] = "study"
    by_arm: dict[str, list[list[list[float]]]] = {}
    for run, line in summaries.items():
        if (run.part, run.regime) == (part, regime):
            by_arm.setdefault(run.arm, []).append(line["points"])
    most = max(len(runs) for runs in by_arm.values())
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    first = next(arm for arm in plan.arms if arm in by_arm)
    limit = min(points[-1][ROLLOUTS] for points in by_arm[first])
    for arm in plan.arms:
        runs = by_arm.get(arm, [])
        if len(runs) < most:
            continue
        at = np.linspace(0, limit, 61)
        curves = np.array([np.interp(at, [p[ROLLOUTS] for p in run], [p[SAMPLED] for p in run]) for run in runs])
        mean = curves.mean(axis=0)
        error = curves.std(axis=0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.zeros_like(mean)
        (line,) = axes.plot(at, mean, label=arm, color="black" if arm == first else None)
        axes.fill_between(at, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(
        xlabel="rollouts", ylabel="held-out accuracy, sampled", title=f"{plan.regimes[regime].title} ({most} seeds)"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--write", type=Path, help="document whose tables are replaced; else they are printed")
    parser.add_argument("--check", action="store_true", help="compare with the document in place of writing it")
    args = parser.parse_args(argv)
    plan = _study_plan.load_plan(args.plan)
    summaries = _study_plan.read_summaries(args.plan.with_suffix(".jsonl"))
    for line in _study_plan.other_fields(plan, summaries):
        parser.error(f"{args.plan.with_suffix('.jsonl')}: {line}")
    found = tables(plan, summaries)
    if args.write is None:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in found.items()))
        return
    text = old = args.write.read_text()
    for name, table in found.items():
        text = replaced(text, name, table, str(args.write))
    if args.check:
        sys.exit(0 if text == old else f"{args.write}: its tables are not those of {args.plan}")
    args.write.write_text(text)
    for part, regime in sorted({(run.part, run.regime) for run in summaries}):
        picture = f"pictures/{part}_{regime}.svg"
        if picture in text:
            draw(plan, summaries, part, regime, args.write.parent / picture)


if __name__ == "__main__":
    main()
