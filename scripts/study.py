"""Compare algorithms over seeds at equal rollouts: a table of held-out accuracy with standard errors.

    python scripts/study.py --out runs/study --steps 40 --seeds 0 1 2 3 4 \\
        --arm grpo --arm dr_grpo --arm ers --arm pps --arm pspo --arm "pspo selection.floor=1e-6"

An arm is an algorithm with overrides of fields. Runs follow one another, each in its own folder; finished runs are not
repeated, and runs of one seed share their cold start. The first arm is the baseline of the paired differences: the same
seed has the same cold start and the same problems. An arm that rolls out more than the baseline (dapo) is also read at
its last evaluation within the baseline's rollouts, so give it a small eval.every.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.system.one_line_parser import OneLineParser


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(' ', '_').replace('=', '-')}_seed{seed}"


def flags(folder: Path, arm: str, seed: int, steps: int) -> list[str]:
    """Command-line arguments of pspo_jax.train for one run."""
    algorithm, *overrides = arm.split()
    words = [
        "--run.dir",
        str(folder),
        "--algorithm.name",
        algorithm,
        "--run.seed",
        str(seed),
        "--run.steps",
        str(steps),
    ]
    return [*words, "--log.report", "false", "--log.progress", "false", *(f"--{override}" for override in overrides)]


def run(out: Path, arm: str, seed: int, steps: int) -> None:
    folder = folder_of(out, arm, seed)
    if (folder / "summary.json").exists():
        return
    done = subprocess.run([sys.executable, "-m", "pspo_jax.train", *flags(folder, arm, seed, steps)], check=False)
    if done.returncode or not (folder / "summary.json").exists():
        print(f"study.py: {arm}, seed {seed}: did not finish (exit code {done.returncode})", file=sys.stderr)
        sys.exit(done.returncode or 1)
    print(f"{arm}, seed {seed}: {json.loads((folder / 'summary.json').read_text())['eval']}", flush=True)


def read(folder: Path, budget: float = float("inf")) -> dict[str, float]:
    """Figures of one run for the table, at its last evaluation within `budget` rollouts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/greedy" in line]
    last = [line for line in evaluated if line["rollouts/total"] <= budget][-1]
    return {
        "before": evaluated[0]["eval/greedy"],
        "greedy": last["eval/greedy"],
        "sampled": last["eval/sampled"],
        "effective": last.get("rollouts/effective", 0) / max(last["rollouts/total"], 1),
        "rollouts": last["rollouts/total"],
        "step": last["step"],
    }


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def table(out: Path, arms: list[str], seeds: list[int]) -> str:
    results = {arm: [read(folder_of(out, arm, seed)) for seed in seeds] for arm in arms}
    base = results[arms[0]]
    for arm in arms:
        if any(run["rollouts"] > budget["rollouts"] for run, budget in zip(results[arm], base, strict=True)):
            results[f"{arm}, equal rollouts"] = [
                read(folder_of(out, arm, seed), budget["rollouts"]) for seed, budget in zip(seeds, base, strict=True)
            ]
    rows = [
        "| arm | greedy | sampled | greedy less baseline | sampled less baseline | effective | rollouts | step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        pairs = list(zip(runs, base, strict=True))
        differences = [
            "" if arm == arms[0] else mean_and_error([a[k] - b[k] for a, b in pairs]) for k in ("greedy", "sampled")
        ]
        cells = [mean_and_error([r[k] for r in runs]) for k in ("greedy", "sampled")]
        effective = mean_and_error([r["effective"] for r in runs])
        spent, step = (round(statistics.fmean(r[k] for r in runs)) for k in ("rollouts", "step"))
        rows.append(
            f"| {arm} | {cells[0]} | {cells[1]} | {differences[0]} | {differences[1]} | {effective} "
            f"| {spent:,} | {step} |"
        )
    before = mean_and_error([r["before"] for r in base])
    note = f"{len(seeds)} seeds; greedy before RL {before}."
    return "\n".join([note, "", *rows])


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, help='"ALGORITHM [stage.field=value ...]", repeatable')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40, help="training steps a run")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    for arm in args.arm:
        if not arm.strip():
            parser.error("--arm '': needs an algorithm")
        try:
            command_line.parse(flags(folder_of(args.out, arm, 0), arm, 0, args.steps), parser.prog, "")
        except ConfigError as error:
            parser.error(f"--arm {arm!r}: {error}")
    if len(set(args.seeds)) < len(args.seeds) or len(set(args.arm)) < len(args.arm):
        parser.error("--seeds, --arm: name each one once")
    for seed in args.seeds:
        for arm in args.arm:
            run(args.out, arm, seed, args.steps)
    print(table(args.out, args.arm, args.seeds))


if __name__ == "__main__":
    main()
