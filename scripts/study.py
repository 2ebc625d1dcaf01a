"""Compare algorithms over seeds at equal rollouts: a table of held-out accuracy with standard errors.

    python scripts/study.py --out runs/study --steps 40 --seeds 0 1 2 3 4 \\
        --arm grpo --arm dr_grpo --arm ers --arm pps --arm pspo --arm "pspo selection.floor=1e-6"
    python scripts/study.py --out runs/smollm2 --arm configs/smollm2_135m_grpo.yaml \\
        --arm configs/smollm2_135m_pspo.yaml --arm configs/smollm2_135m_popo.yaml

    python scripts/study.py --plan docs/data/uneven_pools.yaml --part confirmation --jobs 2

An arm is an algorithm or a recipe, with overrides of fields. Runs follow one another, or `--jobs` at a time, each in
its own folder; finished runs are not repeated. Runs of one seed share their cold start if one has finished it before
the other begins; with `--jobs` above 1, each may make the same one anew. The first arm is the
baseline of the paired differences: the same seed has the same cold start and the same problems. An arm that rolls out
more than the baseline (dapo) is also read at its last evaluation within the baseline's rollouts, so give it a small
eval.every. A second table has the greedy accuracy of each kind of problem, where a task has kinds.

With --plan, regimes, arms and seeds come from a file (scripts/_study_plan.py describes it). Each run that finishes adds
its line to the file of the same name that ends in .jsonl, from which scripts/study_tables.py makes tables and pictures;
runs that have a line are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import _study_plan
import yaml

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.system.one_line_parser import OneLineParser

STEPS = 40
"""Training steps of a run where no recipe says how many."""


def folder_of(out: Path, arm: str, seed: int) -> Path:
    algorithm, *overrides = arm.split()
    words = [Path(algorithm).stem if is_recipe(algorithm) else algorithm, *overrides]
    return out / f"{'_'.join(words).replace('=', '-')}_seed{seed}"


def is_recipe(algorithm: str) -> bool:
    """Whether the first word of an arm is a file of settings and no algorithm's name."""
    return algorithm.endswith((".yaml", ".yml"))


def flags(folder: Path, arm: str, seed: int, steps: int | None) -> list[str]:
    """Command-line arguments of pspo_jax.train for one run."""
    algorithm, *overrides = arm.split()
    words = ["--config" if is_recipe(algorithm) else "--algorithm.name", algorithm]
    words += ["--run.dir", str(folder), "--run.seed", str(seed)]
    words += [] if steps is None else ["--run.steps", str(steps)]
    return [*words, "--log.report", "false", "--log.progress", "false", *(f"--{override}" for override in overrides)]


def run(out: Path, arm: str, seed: int, steps: int | None) -> None:
    """Run an arm with a seed, unless it has finished before.

    Raises:
      SystemExit: the run failed, with its exit code.
    """
    folder = folder_of(out, arm, seed)
    if (folder / "summary.json").exists():
        return
    done = subprocess.run([sys.executable, "-m", "pspo_jax.train", *flags(folder, arm, seed, steps)], check=False)
    if done.returncode or not (folder / "summary.json").exists():
        print(f"study.py: {arm}, seed {seed}: did not finish (exit code {done.returncode})", file=sys.stderr)
        sys.exit(done.returncode or 1)
    print(f"{arm}, seed {seed}: {json.loads((folder / 'summary.json').read_text())['eval']}", flush=True)


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The metrics of the steps of a run after which it was evaluated."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/greedy" in line]


def read(folder: Path, budget: float = float("inf")) -> dict[str, float]:
    """Figures of one run for the table, at its last evaluation within `budget` rollouts."""
    evaluated = evaluations(folder)
    last = [line for line in evaluated if line["rollouts/total"] <= budget][-1]
    return {
        "before": evaluated[0]["eval/greedy"],
        "sampled before": evaluated[0]["eval/sampled"],
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
    before, sampled = (mean_and_error([r[key] for r in base]) for key in ("before", "sampled before"))
    note = f"{len(seeds)} seeds; greedy before RL {before}, sampled {sampled}."
    return "\n".join([note, "", *rows])


def table_of_kinds(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Greedy accuracy of each kind of problem before and after training; empty if the task has no kinds."""
    ends = {arm: [evaluations(folder_of(out, arm, seed)) for seed in seeds] for arm in arms}
    kinds = sorted(key for key in ends[arms[0]][0][-1] if key.startswith("eval/greedy/"))
    if not kinds:
        return ""
    rows = [f"| kind | before | {' | '.join(arms)} |", "|---" * (len(arms) + 2) + "|"]
    for kind in kinds:
        cells = [mean_and_error([found[0][kind] for found in ends[arms[0]]])]
        cells += [mean_and_error([found[-1][kind] for found in ends[arm]]) for arm in arms]
        rows.append(f"| {kind.removeprefix('eval/greedy/')} | {' | '.join(cells)} |")
    return "\n".join(["", *rows])


def shares_of_cores(jobs: int) -> list[set[int]]:
    """The processor cores of each job. Jobs that share cores slow each other down by more than their share of them."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // jobs, 1)
    return [{cores[(job * each + i) % len(cores)] for i in range(each)} for job in range(jobs)]


def pinned(cores: set[int]) -> list[str]:
    """The beginning of a command that keeps to these cores; empty = any core."""
    code = f"import os, sys; os.sched_setaffinity(0, {sorted(cores)}); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code] if cores else []


def run_plan(path: Path, part: str, out: Path, jobs: int, limit: int | None) -> None:
    """Run what is left of one part of a registered study, `jobs` runs at a time.

    Raises:
      SystemExit: the plan cannot be read or run, or a run failed.
    """
    try:
        plan = _study_plan.load_plan(path)
        runs = _study_plan.runs_of(plan, part)
        for one in {(one.regime, one.arm): one for one in runs}.values():
            command_line.parse(_study_plan.flags_of(plan, one, out), "study.py", "")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, ConfigError) as error:
        sys.exit(f"study.py: error: --plan {path}: {error}")
    if not runs:
        sys.exit(f"study.py: error: --part {part}: {path} has no such seeds")
    data = path.with_suffix(".jsonl")
    finished = _study_plan.read_summaries(data)
    for line in _study_plan.other_fields(plan, finished):
        sys.exit(f"study.py: error: {data}: {line}")
    left = [one for one in runs if one not in finished][:limit]
    print(f"{len(left)} of {len(runs)} runs are left", flush=True)
    lock = threading.Lock()
    shares: SimpleQueue[set[int]] = SimpleQueue()
    for share in shares_of_cores(jobs):
        shares.put(share)

    def finish(one: _study_plan.Run) -> None:
        words = [sys.executable, "-m", "pspo_jax.train", *_study_plan.flags_of(plan, one, out)]
        cores = shares.get()
        # A run that has ended in its folder ends at once here, and is refused if its settings are not the plan's.
        done = subprocess.run([*pinned(cores), *words], check=False, capture_output=True, text=True)
        shares.put(cores)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            sys.exit(f"study.py: error: {one.regime}, {one.arm}, seed {one.seed}: exit code {done.returncode}: {last}")
        with lock:
            summary = _study_plan.summarise(plan, one, out)
            _study_plan.write_summaries(data, _study_plan.read_summaries(data) | {one: summary})
            print(f"{one.regime}, {one.arm}, seed {one.seed}: {summary['points'][-1]}", flush=True)

    with ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(finish, one) for one in left]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arm", action="append", default=[], help='"ALGORITHM|RECIPE.yaml [stage.field=value ...]", repeatable'
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="training steps a run (default 40, or the recipe's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--plan", type=Path, help="file of a registered study, in place of --arm, --seeds and --steps")
    parser.add_argument("--part", default="confirmation", help="the plan's part to run (default confirmation)")
    parser.add_argument("--limit", type=int, help="largest number of the plan's runs to make now")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: needs a number of at least 1")
    if (args.plan is None) == (not args.arm):
        parser.error("--plan, --arm: give one of them")
    if args.plan is not None:
        run_plan(args.plan, args.part, args.out, args.jobs, args.limit)
        return
    if not all(arm.strip() for arm in args.arm):
        parser.error("--arm '': needs an algorithm or a recipe")
    if len(set(args.seeds)) < len(args.seeds) or len({folder_of(args.out, arm, 0) for arm in args.arm}) < len(args.arm):
        parser.error("--seeds, --arm: name each one once")
    steps: dict[str, int | None] = {}
    for arm in args.arm:
        steps[arm] = args.steps or (None if is_recipe(arm.split()[0]) else STEPS)
        try:
            command_line.parse(flags(folder_of(args.out, arm, 0), arm, 0, steps[arm]), parser.prog, "")
        except ConfigError as error:
            parser.error(f"--arm {arm!r}: {error}")
    pairs = [(arm, seed) for seed in args.seeds for arm in args.arm]
    with ThreadPoolExecutor(args.jobs) as executor:
        list(executor.map(lambda pair: run(args.out, *pair, steps[pair[0]]), pairs))
    print(table(args.out, args.arm, args.seeds))
    print(table_of_kinds(args.out, args.arm, args.seeds))


if __name__ == "__main__":
    main()
