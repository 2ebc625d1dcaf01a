"""Random faults on random configurations: fixed campaigns, and what the campaign takes for a loss."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO


def campaign(work, trials, seed, jobs=1):
    words = ["--trials", trials, "--seed", seed, "--jobs", jobs, "--work", work]
    return subprocess.run(
        [sys.executable, REPO / "scripts" / "chaos.py", *map(str, words)], cwd=REPO, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "trials"), [(3, 2), (4, 4)])
def test_random_faults_lose_nothing_and_are_never_silent(tmp_path, seed, trials):
    done = campaign(tmp_path, trials=trials, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == trials and {line["outcome"] for line in lines} <= {"equal", "refused", "said"}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_random_faults_lose_nothing(tmp_path):
    done = campaign(tmp_path, trials=100, seed=100, jobs=2)
    assert done.returncode == 0, done.stdout + done.stderr


FINDINGS = """
import json, sys
sys.path.insert(0, "scripts")
import _chaos_faults as faults, _chaos_runs as runs, chaos
from pathlib import Path

same = {"metrics": [{"step": "0"}, {"step": "1", "reward": "0.5"}], "checksums": {"2": {"params": 7}}, "eval": {}}
other = json.loads(json.dumps(same)) | {"metrics": [{"step": "0"}, {"step": "1", "reward": "0.6"}]}
assert runs.difference(same, json.loads(json.dumps(same)), set()) is None
assert runs.difference(same, other, set()) == "metrics of step 1: reward"
assert runs.difference(same, other, {"metrics"}) is None
trial = faults.Trial({}, Path(sys.argv[1]), Path(sys.argv[1]))
for work, text in ((lambda: chaos._nothing_lost(trial, {2}), "lost: checkpoint 2"),
                   (lambda: chaos._check_begin("step 1/6", {2}), "lost: the run began anew"),
                   (lambda: chaos._check_begin("resuming at step 1 of 6", {2}), "lost: the run resumed at step 1")):
    try:
        work()
    except faults.Finding as finding:
        assert str(finding).startswith(text), finding
    else:
        raise AssertionError(text)
chaos._check_begin("resuming at step 4 of 6", {2})
case = chaos.Case({"run.steps": 6, "algorithm.name": "popo"}, [{"kind": "kill", "moment": {"step": 1, "then": 0.0}}])
again = json.loads(case.command().split("--case ")[1].strip("'"))
assert again == {"fields": {"algorithm.name": "popo"}, "faults": case.faults}
"""


def test_what_is_lost_or_differs_is_a_finding(tmp_path):
    done = subprocess.run([sys.executable, "-c", FINDINGS, tmp_path], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
