"""A study's plan, its statistics against independent ones, and tables that the committed data give."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
_study_plan = importlib.import_module("_study_plan")
_study_statistics = importlib.import_module("_study_statistics")
study_tables = importlib.import_module("study_tables")

PLAN = """
baseline: grpo
fields: {run.steps: 3}
seeds: {choice: [0], confirmation: [1, 2]}
regimes:
  even: {title: as it is}
  uneven: {title: most prompts solved, fields: {task.strata: "0=0.8, 3+=0.2"}}
arms:
  grpo: {fields: {algorithm.name: grpo}}
  popo: {fields: {algorithm.name: popo, eval.every: 1}, seeds: {confirmation: [1]}, regimes: [uneven]}
"""


@pytest.fixture
def script():
    return importlib.import_module("study")


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


def test_arms_run_in_order_and_keep_to_their_regimes_and_seeds(plan, tmp_path):
    found = _study_plan.load_plan(plan)
    runs = [tuple(run) for run in _study_plan.runs_of(found, "confirmation")]
    assert runs == [
        ("confirmation", "even", "grpo", 1),
        ("confirmation", "even", "grpo", 2),
        ("confirmation", "uneven", "grpo", 1),
        ("confirmation", "uneven", "grpo", 2),
        ("confirmation", "uneven", "popo", 1),
    ]
    words = _study_plan.flags_of(found, _study_plan.Run(*runs[-1]), tmp_path)
    assert words[:6] == ["--run.steps", "3", "--task.strata", "0=0.8, 3+=0.2", "--algorithm.name", "popo"]


def test_a_regime_keeps_all_arms_to_its_seeds_and_blocks_come_one_by_one(plan):
    one = PLAN.replace("{title: as it is}", "{title: as it is, seeds: {confirmation: [2]}}") + "block: 1\n"
    plan.write_text(one)
    runs = [tuple(run) for run in _study_plan.runs_of(_study_plan.load_plan(plan), "confirmation")]
    assert runs == [
        ("confirmation", "uneven", "grpo", 1),
        ("confirmation", "uneven", "popo", 1),
        ("confirmation", "even", "grpo", 2),
        ("confirmation", "uneven", "grpo", 2),
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("baseline: grpo", "baseline: gppo", "gppo"),
        ("eval.every: 1}", "eval.every: 1}, baseline: gppo", "gppo"),
        ("regimes: [uneven]", "regimes: [odd]", "odd"),
        ("title: as it is", "titel: as it is", "titel"),
        ("algorithm.name: popo", "algorithm.name: poppo", "poppo"),
        ("arms:", "groups: {few: [gppo]}\narms:", "gppo"),
        ("arms:", "groups: {even: [grpo]}\narms:", "even"),
        ("run.steps", "run.stepps", "stepps"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_in_one_line(plan, script, tmp_path, old, new, said):
    plan.write_text(PLAN.replace(old, new))
    with pytest.raises(SystemExit) as refused:
        script.run_plan(plan, "confirmation", tmp_path, 1, None)
    line = str(refused.value.code)
    assert line.startswith("study.py: error: --plan") and said in line and "\n" not in line


def test_jobs_divide_the_cores(script, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 4, 5})
    assert script.shares_of_cores(2) == [{0, 1}, {4, 5}] and script.shares_of_cores(1) == [{0, 1, 4, 5}]
    assert script.shares_of_cores(5) == [{0}, {1}, {4}, {5}, {0}]


def test_a_pinned_command_keeps_to_its_cores(script):
    core = min(os.sched_getaffinity(0))
    words = [*script.pinned({core}), sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == f"{{{core}}}"


curves = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@given(curves, st.floats(0, 1))
def test_the_first_crossing_is_that_of_a_fine_search(scores, level):
    points = [[step, 10.0 * step, 5.0 * step, 0.0, score] for step, score in enumerate(scores)]
    found = _study_statistics.reached(points, _study_statistics.ROLLOUTS, level)
    at = np.linspace(0, 10 * (len(scores) - 1), 10 * (len(scores) - 1) * 100 + 1)
    above = np.flatnonzero(np.interp(at, [p[1] for p in points], scores) >= level)
    if found is None:
        assert not len(above)
    else:
        assert abs(np.interp(found, [p[1] for p in points], scores) - max(level, scores[0])) < 1e-6 or found == 0
        assert not len(above) or found <= at[above[0]] + 1e-9


def test_the_area_is_the_mean_of_the_curve():
    points = [[0, 0, 0, 0, 0.2], [1, 10, 0, 0, 0.4], [2, 20, 0, 0, 0.8]]
    assert _study_statistics.area(points, 20) == pytest.approx((0.3 + 0.6) / 2)
    assert _study_statistics.area(points, 15) == pytest.approx((0.3 * 10 + 0.5 * 5) / 15)
    assert _study_statistics.area(points, 40) == pytest.approx((0.9 * 10 + 0.8 * 20) / 40)


def test_p_values_are_scipys_and_their_correction_is_holms_definition():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.3, 1, (6, 10))
    p_values = [_study_statistics.paired_p(row) for row in differences]
    assert p_values == pytest.approx([stats.ttest_rel(row, np.zeros(10)).pvalue for row in differences])
    # Holm's corrected value of p is the largest of (n - rank) p over the values that are no larger.
    ranked = sorted(p_values)
    expected = [min(1.0, max((len(ranked) - rank) * q for rank, q in enumerate(ranked) if q <= p)) for p in p_values]
    assert _study_statistics.holm(p_values) == pytest.approx(expected)
    assert _study_statistics.paired_p([0.1, 0.1, 0.1]) == 1.0


def test_an_interval_covers_the_mean_and_has_no_width_without_variation():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(12):
        low, high = _study_statistics.interval(rng.normal(size=10))[1:]
        covered += low <= 0 <= high
    assert covered >= 9
    assert _study_statistics.interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def line(arm, seed, scores, rollouts=100, **more):
    points = [[step, rollouts * step, 10 * rollouts * step, score, score / 2] for step, score in enumerate(scores)]
    run = {"part": "confirmation", "regime": "uneven", "arm": arm, "seed": seed, "points": points}
    run["fields"] = {"run.steps": 3, "task.strata": "0=0.8, 3+=0.2", "algorithm.name": arm}
    run["fields"] |= {"eval.every": 1} if arm == "popo" else {}
    return run | {"kinds": {}, "effective": 0.25} | more


def test_tables_pictures_and_their_check(plan, tmp_path, capsys):
    lines = [line("grpo", s, [0.2, 0.4, 0.6]) for s in (1, 2)] + [line("popo", 1, [0.2, 0.8, 1.0])]
    plan.with_suffix(".jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    study_tables.main([str(plan)])
    out = capsys.readouterr().out
    # 0.6 is passed at two thirds of the first step: 67 of the baseline's 200 rollouts.
    assert "| `popo` | `grpo` | 1 | 1.000 | 0.500 | +0.400 | +0.200 | 0.33 | 0.33 |" in out
    page = tmp_path / "page.md"
    names = ["confirmation summary", "confirmation summary gains", "confirmation uneven"]
    marked = "\n\n".join(f"<!-- table {name} -->\n<!-- end {name} -->" for name in names)
    page.write_text(f"{marked}\n\n![curves](pictures/confirmation_uneven.svg)\n")
    with pytest.raises(SystemExit, match="its tables are not"):
        study_tables.main([str(plan), "--write", str(page), "--check"])
    study_tables.main([str(plan), "--write", str(page)])
    with pytest.raises(SystemExit) as same:
        study_tables.main([str(plan), "--write", str(page), "--check"])
    assert not same.value.code
    assert "</svg>" in (tmp_path / "pictures" / "confirmation_uneven.svg").read_text()


def test_a_line_of_a_run_with_other_fields_is_refused(plan, script, tmp_path, capsys):
    one = line("popo", 1, [0.2, 0.8])
    one["fields"]["eval.every"] = 2
    plan.with_suffix(".jsonl").write_text(json.dumps(one) + "\n")
    with pytest.raises(SystemExit, match="popo, seed 1 has other fields than the plan"):
        script.run_plan(plan, "confirmation", tmp_path, 1, None)
    with pytest.raises(SystemExit):
        study_tables.main([str(plan)])
    assert "popo, seed 1 has other fields" in capsys.readouterr().err


def test_a_score_that_is_not_reached_makes_the_share_a_lower_bound():
    assert study_tables.share([0.5, None]) == "≥ 0.75, 1 of 2"
    assert study_tables.share([0.25, 0.5, 0.75]).startswith("0.50 [0.25")
    assert "≥" not in study_tables.share([0.5, 1.0])


def test_the_documents_tables_are_those_of_the_committed_runs():
    pages = {path: path.read_text() for path in (REPO / "docs").glob("*.md")}
    plans = sorted(path.with_suffix(".yaml") for path in (REPO / "docs" / "data").glob("*.jsonl"))
    assert plans
    for plan in plans:
        part = next(iter(_study_plan.read_summaries(plan.with_suffix(".jsonl")))).part
        (page,) = (path for path, text in pages.items() if f"<!-- table {part} " in text)
        with pytest.raises(SystemExit) as done:
            study_tables.main([str(plan), "--write", str(page), "--check"])
        assert not done.value.code, done.value.code


def test_a_control_stands_beside_the_accuracy_before_and_after(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    plan = _study_plan.load_plan(path)
    line = {"part": "confirmation", "regime": "even", "arm": "grpo", "fields": {}, "kinds": {}, "effective": 0.5}
    runs = [
        line | {"seed": seed, "points": [[0, 0, 0, 0.2, 0.3], [3, 9, 9, 0.6 + seed / 10, 0.5]], "control": [0.1, 0.12]}
        for seed in (1, 2)
    ]
    found = study_tables.tables(
        plan, {_study_plan.Run(**{k: run[k] for k in _study_plan.Run._fields}): run for run in runs}
    )
    row = found["confirmation even"].splitlines()[-1]
    assert row.split(" | ")[1:] == (
        ["2", "0.200 ± 0.000", "0.750 ± 0.050", "0.300 ± 0.000", "0.500 ± 0.000", "0.100 ± 0.000", "0.120 ± 0.000 |"]
    )


def test_seeds_that_choose_do_not_confirm():
    """Over all studies of selection, since a later one is chosen with what the earlier ones showed."""
    chosen, confirmed = set(), set()
    for path in set((REPO / "docs" / "data").glob("*.yaml")) - {REPO / "docs" / "data" / "segments.yaml"}:
        for arm in _study_plan.load_plan(path).arms.values():
            for part, seeds in arm.seeds.items():
                (chosen if part.endswith("choice") else confirmed).update(seeds)
    assert chosen and confirmed and not chosen & confirmed
