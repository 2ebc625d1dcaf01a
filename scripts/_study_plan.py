"""A registered study: a YAML file of regimes, arms and seeds, and one line of JSON for each run that has finished.

    baseline: grpo                  the arm that the others are compared with; an arm may name another one
    fields: {run.steps: 60}         fields of every run
    seeds: {choice: [0, 1], confirmation: [10, 11]}
    regimes:
      uneven: {title: "most prompts solved", fields: {task.strata: "0=0.8, 3+=0.2"}}
    arms:
      grpo: {fields: {algorithm.name: grpo}}
      popo: {fields: {algorithm.name: popo}, seeds: {confirmation: [10]}, regimes: [uneven]}

`config: FILE.yaml` beside a regime's fields names its recipe. `seeds` of an arm replaces the study's, part by part;
`seeds` of a regime keeps all arms to these, and `regimes` of an arm keeps it to these. Arms run in the order of the
file, so the most important ones come first; `block` (5 if absent) is the number of seeds of every arm that run before
the arms' next seeds. `groups` (a name -> arms) are those that tables show together; without it, all arms are one group
named summary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import yaml

Scalar = str | int | float | bool


BLOCK = 5
"""Seeds in a block of a plan that does not say how many."""


class Regime(NamedTuple):
    """One setting of the task."""

    title: str
    config: str | None
    """Recipe that it starts from; None = the defaults."""
    fields: dict[str, Scalar]
    seeds: dict[str, list[int]] | None
    """Seeds of each part that it is kept to; None = an arm's seeds."""


class Arm(NamedTuple):
    """One algorithm."""

    fields: dict[str, Scalar]
    seeds: dict[str, list[int]]
    """Seeds of each part of the study."""
    regimes: list[str]
    """Regimes in which it runs."""
    baseline: str
    """The arm that it is compared with."""


class Plan(NamedTuple):
    """A whole study."""

    fields: dict[str, Scalar]
    regimes: dict[str, Regime]
    arms: dict[str, Arm]
    block: int
    """Seeds of every arm that run before the arms' next seeds."""
    groups: dict[str, list[str]]
    """Arms that one table shows together, by the table's name."""


class Run(NamedTuple):
    """One run of a study."""

    part: str
    regime: str
    arm: str
    seed: int


class Summary(TypedDict):
    """What the tables take from one run."""

    part: str
    regime: str
    arm: str
    seed: int
    fields: dict[str, Scalar]
    """Fields of the run that differ from the defaults or the recipe."""
    points: list[list[float]]
    """Evaluations, each as step, rollouts, generated tokens, greedy accuracy and sampled accuracy."""
    kinds: dict[str, list[float]]
    """Kind or stratum -> greedy and sampled accuracy at the end."""
    effective: float
    """Share of the rollouts in groups that carried a gradient."""
    control: NotRequired[list[float]]
    """Greedy accuracy with the images of other prompts before and after the run; absent where it was not measured."""


def load_plan(path: Path) -> Plan:
    """The study that a file describes.

    Raises:
      ValueError: the file has an entry that is not known, or an arm names a regime that is not there.
    """
    data = yaml.safe_load(path.read_text())
    _check(path, "study", data, {"title", "baseline", "fields", "seeds", "regimes", "arms", "block", "groups"})
    regimes = {}
    for name, entry in data["regimes"].items():
        _check(path, f"regime {name}", entry, {"title", "config", "fields", "seeds"})
        regimes[name] = Regime(entry["title"], entry.get("config"), entry.get("fields", {}), entry.get("seeds"))
    arms = {}
    for name, entry in data["arms"].items():
        _check(path, f"arm {name}", entry, {"fields", "seeds", "regimes", "baseline"})
        chosen, baseline = entry.get("regimes", list(regimes)), entry.get("baseline", data["baseline"])
        if unknown := set(chosen) - regimes.keys():
            raise ValueError(f"{path}: arm {name}: no regime {', '.join(sorted(unknown))}")
        if baseline not in data["arms"]:
            raise ValueError(f"{path}: arm {name}: its baseline {baseline!r} is none of the arms")
        arms[name] = Arm(entry["fields"], data["seeds"] | entry.get("seeds", {}), chosen, baseline)
    groups = data.get("groups", {"summary": list(arms)})
    for name, members in groups.items():
        if unknown := set(members) - arms.keys():
            raise ValueError(f"{path}: group {name}: no arm {', '.join(sorted(unknown))}")
        if name in regimes:
            raise ValueError(f"{path}: group {name}: a regime has this name, and so its table; choose another")
    return Plan(data.get("fields", {}), regimes, arms, data.get("block", BLOCK), groups)


def _check(path: Path, where: str, entry: Mapping[str, object], known: set[str]) -> None:
    if unknown := entry.keys() - known:
        raise ValueError(f"{path}: {where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")


def runs_of(plan: Plan, part: str) -> list[Run]:
    """The runs of one part, in blocks of `plan.block` seeds.

    In a block they go arm by arm in the order of the plan, and within an arm regime by regime, so that a study that
    ends early has whole comparisons."""
    found = [
        (place // plan.block, Run(part, name, arm, seed))
        for arm, entry in plan.arms.items()
        for name, regime in plan.regimes.items()
        if name in entry.regimes
        for place, seed in enumerate(entry.seeds.get(part, []))
        if regime.seeds is None or seed in regime.seeds.get(part, [])
    ]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def fields_of(plan: Plan, run: Run) -> dict[str, Scalar]:
    """The fields of a run that its study sets; an arm's come after its regime's."""
    return plan.fields | plan.regimes[run.regime].fields | plan.arms[run.arm].fields


def folder_of(out: Path, run: Run) -> Path:
    """The run's folder. All runs are siblings, so that those of one seed share their cold start."""
    return out / f"{run.regime}_{run.arm}_seed{run.seed}"


def flags_of(plan: Plan, run: Run, out: Path) -> list[str]:
    """Command-line arguments of pspo_jax.train for one run."""
    config = plan.regimes[run.regime].config
    words = [] if config is None else ["--config", config]
    for name, value in fields_of(plan, run).items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    words += ["--run.dir", str(folder_of(out, run)), "--run.seed", str(run.seed)]
    return [*words, "--log.report", "false", "--log.progress", "false", "--log.to", "none"]


def summarise(plan: Plan, run: Run, out: Path) -> Summary:
    """The line of a run that has finished."""
    folder = folder_of(out, run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/greedy" in line]
    last = evaluated[-1]
    points = [
        [
            line["step"],
            line["rollouts/total"],
            line.get("tokens/generated", 0),
            round(line["eval/greedy"], 4),
            round(line["eval/sampled"], 4),
        ]
        for line in evaluated
    ]
    prefix = "eval/greedy/"
    kinds = {
        key.removeprefix(prefix): [round(last[key], 4), round(last[key.replace("greedy", "sampled")], 4)]
        for key in last
        if key.startswith(prefix)
    }
    found: Summary = {
        "part": run.part,
        "regime": run.regime,
        "arm": run.arm,
        "seed": run.seed,
        "fields": fields_of(plan, run),
        "points": points,
        "kinds": kinds,
        "effective": round(last["rollouts/effective"] / last["rollouts/total"], 4),
    }
    control = "eval/greedy_other_images"
    if control in last:
        found["control"] = [round(line[control], 4) for line in (evaluated[0], last)]
    return found


def read_summaries(path: Path) -> dict[Run, Summary]:
    """The lines of a file of finished runs; empty if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: list[Summary] = [json.loads(line) for line in lines]
    return {Run(line["part"], line["regime"], line["arm"], line["seed"]): line for line in found}


def other_fields(plan: Plan, summaries: Mapping[Run, Summary]) -> list[str]:
    """What is wrong with lines of runs that the plan does not have, or has with other fields; empty = nothing."""
    wrong = []
    for run, line in summaries.items():
        known = run.regime in plan.regimes and run.arm in plan.arms
        if not known or fields_of(plan, run) != line["fields"]:
            name = f"{run.part}, {run.regime}, {run.arm}, seed {run.seed}"
            wrong.append(f"the line of {name} has other fields than the plan; remove it, or name the arm anew")
    return wrong


def write_summaries(path: Path, summaries: Mapping[Run, Summary]) -> None:
    """Write the lines in a fixed order, so that a file does not depend on which run ended first."""
    lines = [json.dumps(summaries[run], separators=(",", ":")) + "\n" for run in sorted(summaries)]
    part = path.with_suffix(".part")
    part.write_text("".join(lines))
    part.replace(path)
