"""Random valid configurations with random faults, in real runs of the command.

    python scripts/chaos.py --trials 100 --seed 1 --jobs 2

Each trial draws a configuration (algorithm, replay, selection, packing, slots, chunks, LoRA, iterations, mesh,
processes, data types) and a sequence of faults: signals at random moments and in the middle of saves, a full disk, a
quota, a read-only folder, no more open files, truncated, altered and deleted files of every kind that the run folder
holds, killed and stopped verifier workers, jumps of the clock, a second process in the folder. After the faults the
same command is started until it ends. Each trial must end in one of three ways:

    equal    metrics, dumps and the last checkpoint are those of an uninterrupted run, bit for bit
    refused  the command ends with one line because a file is damaged, and every undamaged checkpoint still exists; once
             the file is restored, the same command continues to an equal end
    said     the run differs from the uninterrupted one and reports why, such as completions without a verdict

Anything else is a finding; the exit code is then 1, and each finding is printed as a command that repeats it.
`--minimise` first drops the faults and fields that the finding does not need. Results are appended to
WORK/results.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import _chaos_configs as configs
import _chaos_faults as faults
import _chaos_runs as runs
from _chaos_faults import Fault, Finding, Trial

TRIALS_A_CONFIGURATION = 5
"""Trials that share a configuration, and so its uninterrupted run."""
TMPFS_MIB = 48


@dataclasses.dataclass
class Case:
    """A configuration and its faults, which together repeat a trial."""

    fields: configs.Fields
    faults: list[Fault]

    def command(self) -> str:
        """The shell command that repeats the trial, without the fields of the base configuration."""
        fields = {k: v for k, v in self.fields.items() if configs.BASE.get(k) != v}
        case = json.dumps({"fields": fields, "faults": self.faults})
        return "python scripts/chaos.py --case '" + case.replace("'", "'\\''") + "'"


def main() -> int:
    args = _arguments()
    if args.jobs > 1 and args.case is None:
        return _in_parallel(args)
    work = Path(args.work or tempfile.mkdtemp(prefix="chaos-")).absolute()
    world = work / "world"
    configs.write_world(world)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    mounts = _may_mount(work)
    if args.case is not None:
        given = json.loads(args.case)
        numbered = iter([(0, Case(configs.without_shape(configs.BASE | given["fields"]), given["faults"]))])
    else:
        # Trials of one configuration stay together, as they share its uninterrupted run.
        mine = [n for n in range(args.trials) if n // TRIALS_A_CONFIGURATION % args.shards == args.shard]
        numbered = ((number, _case(args.seed, number, work, mounts)) for number in mine)
    findings = 0
    for number, case in numbered:
        began = time.monotonic()
        outcome, detail = attempt(case, work, f"{args.seed}-{number}")
        line = {"trial": number, "outcome": outcome, "detail": detail, "seconds": round(time.monotonic() - began, 1)}
        findings += outcome not in ("equal", "refused", "said")
        with (work / "results.jsonl").open("a") as out:
            out.write(json.dumps(line | dataclasses.asdict(case)) + "\n")
        kinds = ", ".join(_named(fault) for fault in case.faults)
        print(
            f"{number:4d} {outcome:9s} {line['seconds']:6.1f} s  {kinds}{': ' + detail if detail else ''}", flush=True
        )
        if outcome not in ("equal", "refused", "said"):
            found = minimise(case, outcome, work) if args.minimise else case
            print(f"     {found.command()}", flush=True)
    if args.shards == 1:
        print(_table(work / "results.jsonl"))
    return 1 if findings else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--work", help="folder for runs and results; default: a new temporary one")
    parser.add_argument("--case", help="one case as JSON, as a finding prints it, in place of random ones")
    parser.add_argument("--minimise", action="store_true", help="drop what a finding does not need, then print it")
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_parallel(args: argparse.Namespace) -> int:
    """Run the campaign in several processes, each with every n-th trial."""
    work = Path(args.work or tempfile.mkdtemp(prefix="chaos-")).absolute()
    configs.write_world(work / "world")
    words = ["--trials", args.trials, "--seed", args.seed, "--work", work, "--shards", args.jobs]
    words += ["--minimise"] if args.minimise else []
    command = [sys.executable, __file__, *map(str, words)]
    jobs = [subprocess.Popen([*command, "--shard", str(i)]) for i in range(args.jobs)]
    codes = [job.wait() for job in jobs]
    print(_table(work / "results.jsonl"))
    return max(codes)


def _case(seed: int, number: int, work: Path, mounts: bool) -> Case:
    """The case of trial `number` of a campaign."""
    drawn = configs.draw(
        random.Random(f"{seed}/configuration/{number // TRIALS_A_CONFIGURATION}"),
        work / "world",
        lambda fields: _refused_at_start(fields, work),
    )
    return Case(drawn, faults.draw(random.Random(f"{seed}/faults/{number}"), drawn, mounts))


def _refused_at_start(fields: configs.Fields, work: Path) -> str | None:
    """Name of the field that a real start refuses, such as a mesh that does not divide the model; None = it runs, or
    fails in another way, which the trial then finds out."""
    path = _reference_folder(fields, work)
    if (path / "results.json").exists():
        return None
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    trial = Trial(fields, path, work / "world")
    run = trial.start()
    if run.wait() == 2:
        return configs.refused_field(faults.last_line(run.text()).partition("error: ")[2])
    if run.codes[run.pids[0]] == 0:
        (path / "results.json").write_text(json.dumps(runs.results(trial.folder)))
    return None


def attempt(case: Case, work: Path, name: str) -> tuple[str, str]:
    """The outcome of a case, and a detail. The folder is kept if there is something to inspect."""
    place = work / "trials" / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    small = any(fault["kind"] == "full" for fault in case.faults)
    folder = place / "run"
    if small:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "none", folder], check=True)
    try:
        reference = _reference(case.fields, work)
        outcome = _through(Trial(case.fields, place, work / "world"), case.faults, reference)
    except Finding as finding:
        if small:
            shutil.copytree(folder, place / "kept", dirs_exist_ok=True)
        return finding.kind, str(finding)
    finally:
        if small:
            subprocess.run(["umount", "-l", folder], check=True)
    shutil.rmtree(place, ignore_errors=True)
    return outcome


def _reference(fields: configs.Fields, work: Path) -> dict[str, Any]:
    """Results of the uninterrupted run of a configuration."""
    if named := _refused_at_start(fields, work):
        raise Finding("exit", f"the uninterrupted run refuses {named}")
    path = _reference_folder(fields, work)
    if not (path / "results.json").exists():
        last = faults.last_line((path / "output-1.txt").read_text(errors="replace"))
        raise Finding("uninterrupted", f"the run fails without any fault; {last}")
    return json.loads((_reference_folder(fields, work) / "results.json").read_text())


def _reference_folder(fields: configs.Fields, work: Path) -> Path:
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    return work / "references" / key


def _through(trial: Trial, drawn: list[Fault], reference: dict[str, Any]) -> tuple[str, str]:
    """Apply all faults in turn, then start the same command until it ends."""
    for fault in drawn:
        before = _undamaged(trial)
        faults.FAULTS[fault["kind"]](trial, fault)
        if fault["kind"] != "damage":
            _nothing_lost(trial, before)
    before = _undamaged(trial)
    run = trial.start()
    refused = trial.end(run, {0, 2} if trial.damaged else {0})
    _nothing_lost(trial, before)
    detail = ""
    if refused:
        detail = faults.last_line(run.text())
        if not _put_back(trial):
            return "refused", detail
        trial.end(trial.start(), {0})
    _check_begin(run.text(), before)
    ended = json.loads(json.dumps(runs.results(trial.folder)))
    lost = _lost_logs(trial)
    if found := runs.difference(ended, reference, lost):
        if not trial.said:
            raise Finding("silent", f"the run ended well and differs from the uninterrupted one: {found}")
        return "said", trial.said[0]
    if refused:
        return "refused", detail
    return ("said", f"{', '.join(sorted(lost))} lost") if runs.difference(ended, reference, set()) else ("equal", "")


def _undamaged(trial: Trial) -> set[int]:
    """Steps of the complete checkpoints in which no fault has altered a file."""
    touched = {p.relative_to(trial.folder).parts for p in trial.damaged}
    steps = {int(parts[1]) for parts in touched if parts[0] == "checkpoints" and parts[1].isdigit()}
    return set(runs.whole_checkpoints(trial.folder)) - steps


def _nothing_lost(trial: Trial, before: set[int]) -> None:
    """Check that the newest undamaged checkpoint, or a newer one, still exists; one moved aside does not count."""
    now = set(runs.whole_checkpoints(trial.folder))
    if before and not any(step >= max(before) for step in now):
        aside = runs.aside_checkpoints(trial.folder)
        raise Finding(
            "lost", f"checkpoint {max(before)} was whole before; there are {sorted(now)}, aside {sorted(aside)}"
        )


def _check_begin(text: str, before: set[int]) -> None:
    """Check that a run with a complete checkpoint resumes at that step or a later one."""
    if not before:
        return
    _, found, rest = text.partition("resuming at step ")
    if not found and "is finished" not in text and "error:" not in text:
        raise Finding("lost", f"the run began anew beside the whole checkpoint {max(before)}")
    if found and int(rest.split()[0]) < max(before):
        raise Finding("lost", f"the run resumed at step {rest.split()[0]} and not at {max(before)}")


def _lost_logs(trial: Trial) -> set[str]:
    """Names of the logs that a fault has altered and that the program has reported; their contents cannot come back."""
    said = "".join(path.read_text(errors="replace") for path in trial.place.glob("output-*.txt"))
    names = {path.relative_to(trial.folder).parts[0] for path in trial.damaged}
    logs = {"metrics.jsonl": "metrics", "strategy.jsonl": "strategy"}
    # Dumps of earlier steps are only for people to read; the program never reads them again.
    ignored = {"completions"} if "completions" in names else set()
    return ignored | {logs[name] for name in names & set(logs) if name in said}


def _put_back(trial: Trial) -> bool:
    """Restore the damaged files outside checkpoints; False if a damaged file belongs to a checkpoint, which may have
    moved."""
    if any("checkpoints" in path.relative_to(trial.folder).parts for path in trial.damaged):
        return False
    for path, data in trial.damaged.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return True


def minimise(case: Case, outcome: str, work: Path) -> Case:
    """A smaller case with the same kind of finding: first with fewer faults, then with fewer fields."""

    def same(smaller: Case) -> bool:
        return attempt(smaller, work, f"minimise-{os.getpid()}")[0] == outcome

    changed = True
    while changed:
        changed = False
        for i in range(len(case.faults)):
            smaller = Case(case.fields, case.faults[:i] + case.faults[i + 1 :])
            if smaller.faults and same(smaller):
                case, changed = smaller, True
                break
    for name in [name for name in case.fields if name not in configs.BASE and name != "algorithm.name"]:
        fields = {k: v for k, v in case.fields.items() if k != name}
        try:
            fields = configs.accepted(fields, work / "world", lambda _: None)
        except ValueError:
            continue
        if same(smaller := Case(fields, case.faults)):
            case = smaller
    return case


def _may_mount(work: Path) -> bool:
    """Whether this user may mount a small file system; if not, two kinds of faults are left out."""
    place = work / f"mount-{os.getpid()}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True)
    except OSError:
        return False
    if done.returncode == 0:
        subprocess.run(["umount", place], check=True)
    place.rmdir()
    return done.returncode == 0


def _named(fault: Fault) -> str:
    more = {
        "damage": lambda: f" {fault['way']} {fault['file']}",
        "stop": lambda: f" {signal.Signals(fault['signal']).name}",
        "workers": lambda: f" {signal.Signals(fault['signal']).name} {fault['who']}",
    }.get(fault["kind"], lambda: "")()
    moment = fault.get("moment")
    return fault["kind"] + more + (f" at {json.dumps(moment)}" if moment else "")


def _table(path: Path) -> str:
    """Number of trials by kind of fault and outcome."""
    if not path.exists():
        return "no trials"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    outcomes = sorted({line["outcome"] for line in lines}, key=lambda o: (o not in ("equal", "refused", "said"), o))
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        for kind in {fault["kind"] for fault in line["faults"]}:
            counts[kind][line["outcome"]] += 1
        counts["all trials"][line["outcome"]] += 1
    rows = [f"{'':12s}" + "".join(f"{o:>11s}" for o in outcomes)]
    for kind in sorted(counts, key=lambda k: (k == "all trials", k)):
        rows.append(f"{kind:12s}" + "".join(f"{counts[kind][o]:>11d}" for o in outcomes))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
