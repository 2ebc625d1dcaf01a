"""Scripts start and say what they should; what they measure is not tested."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict

import jax
import pytest

from pspo_jax.config.schema import ModelConfig
from pspo_jax.model import built_in, transformer
from scripts import bench_tables
from scripts._bench import SHAPES, Work
from tests.conftest import REPO


@pytest.fixture
def script(monkeypatch):
    """A script's module by its name; scripts import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    return importlib.import_module


def run(child_env, *argv, **more):
    done = subprocess.run(
        [sys.executable, *argv],
        env=child_env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_least_times_of_two_targets(child_env):
    out = run(child_env, "scripts/roofline.py", "v5e-4", "h100x2", "--", "--mesh.fsdp", "2")
    head, _, tpu, gpu = out.strip().splitlines()
    assert "bound by" in head and tpu.startswith("| v5e-4 | 2 x 2 x 1 x 1 |") and gpu.startswith("| h100x2 | 1 x 2 x")
    done = subprocess.run(
        [sys.executable, "scripts/roofline.py"], env=child_env, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "name at least one target" in done.stderr


@pytest.mark.parametrize("role", ["rollout", pytest.param("update", marks=pytest.mark.slow)])
def test_a_ragged_contender_answers(child_env, role):
    work = Work(SHAPES["tiny"], "float32", 2, 4, 8, 32, 4, slots=2, packing=True, mean_tokens=10)
    out = run(child_env, "scripts/bench_ragged.py", "--worker", role, json.dumps(asdict(work)), input="1\n")
    about, calls = (json.loads(line) for line in out.splitlines())
    assert "jax" in about["about"]
    assert 0 < calls["calls"][0]["useful"] <= 1


def measured(contender, median, ours=False, case="tiny float32"):
    """A line as bench_step.py prints it."""
    return {
        "bench": "step",
        "case": case,
        "contender": contender,
        "note": "(4 rows)" if ours else "",
        "ours": ours,
        "seconds": {"median": median, "best": median / 2, "spread": 0.1},
        "values": {"rollout_s": median / 4, "update_s": median * 3 / 4},
        "first_call": {"cold": 9.0, "cached": 3.0 if ours else None},
        "peak_rss_mib": 1024 * median,
        "foreign_cores": 0.01,
        "quiet_runs": 3,
        "runs": 4,
        "machine": {"cpu": "A", "cores": 2, "memory_gib": 8, "kernel": "6", "date": "2026-01-01"},
        "versions": {"jax": "1"},
    }


def written(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tables_from_lines_of_json(tmp_path, capsys):
    lines = [measured("ours", 9.0, ours=True), measured("peer", 4.0), measured("ours", 2.0, ours=True)]
    bench_tables.main([str(written(tmp_path / "a.jsonl", *lines))])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| tiny float32")]
    assert rows[0].startswith(
        "| tiny float32: ours (4 rows) | 2.000 | 1.000 | 0.500 | 1.500 | 10 % | 9.0 / 3.0 | 2.00 |"
    )
    assert rows[1].startswith("| tiny float32: peer | 4.000 |") and rows[1].endswith("| 3 of 4 |")
    ratio = "| **2.00x** | **2.00x** | **2.00x** | **2.00x** |  |  | 50% |  |  |"
    assert rows[2] == f"| tiny float32: ratio to peer {ratio}"
    assert len(rows) == 3 and "9.000" not in out and "| Versions | jax 1 |" in out


def test_a_later_file_wins_and_a_noisy_run_is_marked(tmp_path):
    first = written(tmp_path / "a.jsonl", measured("ours", 2.0, ours=True), measured("peer", 4.0))
    second = written(tmp_path / "b.jsonl", measured("peer", 8.0) | {"quiet_runs": 0})
    found = bench_tables.tables(bench_tables.read([first, second]))["step"]
    assert "**4.00x**" in found and "**2.00x**" not in found
    assert "0 of 4 (NOISY)" in found and found.endswith("| NOISY |")


def test_a_skipped_part_is_listed_until_it_is_measured():
    skipped = {"bench": "accelerator", "case": "decode", "contender": "", "skipped": "no GPU"}
    later = measured("ours", 2.0, ours=True, case="decode, 8 rows") | {"bench": "accelerator", "part": "decode"}
    assert "| decode skipped: no GPU |" in bench_tables.tables(bench_tables.latest([skipped]))["accelerator"]
    assert bench_tables.latest([skipped, later]) == [later]
    assert bench_tables.latest([later, skipped]) == [later, skipped]


def test_shares_of_the_accelerators_floor(script):
    bench_accelerator = script("bench_accelerator")
    found = [{"flops_per_s": 100.0}, {"bytes_per_s": 10.0}, {"flops_per_s": 50.0}]
    rates = bench_accelerator.rates_of([{"case": "ceilings", "values": values} for values in found])
    assert rates == {"flops_per_s": 100.0, "bytes_per_s": 10.0}
    work = {"flops": 200.0, "weight_bytes": 10.0, "cache_bytes": 20.0}
    line = {"case": "decode", "seconds": {"median": 6.0}, "values": {}, "work": work}
    values = bench_accelerator.complete(line, rates)["values"]
    assert values["floor_s"] == 3 and values["share"] == 0.5  # 2 s of products beside 3 s of reads
    assert values["share_apart"] == pytest.approx(4 / 6)  # the cache's 2 s after the products' 2 s
    assert bench_accelerator.complete(line, {}) == line


def test_arithmetic_counts_the_weights_that_there_are(script):
    shape = asdict(SHAPES["tiny"])
    vocab = shape.pop("vocab")
    model = transformer(built_in(ModelConfig(**shape, tied=True), vocab))
    weights = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    norms = (2 * shape["layers"] + 1) * shape["width"]
    arithmetic = script("_arithmetic")
    counted = arithmetic.block_weights(SHAPES["tiny"]) + arithmetic.head_weights(SHAPES["tiny"])
    assert sum(x.size for x in weights) == counted + norms


def test_tables_go_between_their_markers(tmp_path):
    lines = written(tmp_path / "a.jsonl", measured("ours", 2.0, ours=True))
    page = tmp_path / "page.md"
    marked = {n: f"<!-- table {n} -->\nold {n}\n<!-- end {n} -->" for n in ("machine", "step", "rollout")}
    page.write_text(f"# Title\n\n{marked['machine']}\n\ntext\n\n{marked['step']}\n\n{marked['rollout']}\n\nend\n")
    for _ in range(2):  # a second time changes nothing
        bench_tables.main([str(lines), "--write", str(page)])
        text = page.read_text()
        assert (
            "old step" not in text and "old machine" not in text and text.count("| tiny float32: ours (4 rows) |") == 1
        )
        assert marked["rollout"] in text and text.startswith("# Title\n") and text.endswith("\n\nend\n")
        assert "\n\ntext\n\n" in text


def test_a_missing_marker_is_one_clear_error(tmp_path):
    lines = written(tmp_path / "a.jsonl", measured("ours", 2.0, ours=True))
    page = tmp_path / "page.md"
    page.write_text("<!-- table machine -->\n<!-- end machine -->\n<!-- end step -->\n<!-- table step -->\n")
    before = page.read_text()
    with pytest.raises(SystemExit, match="no markers <!-- table step -->"):
        bench_tables.main([str(lines), "--write", str(page)])
    assert page.read_text() == before


def test_performance_page_has_all_markers():
    text = (REPO / "docs" / "performance.md").read_text()
    for name in ("machine", *bench_tables.COLUMNS):
        assert bench_tables.replaced(text, name, "new", "page").count(f"<!-- table {name} -->") == 1


def test_what_is_no_measurement_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"a\.jsonl:1: not a measurement"):
        bench_tables.read([tmp_path / "a.jsonl"])


def test_a_study_of_recipes_has_a_table_of_kinds(script, tmp_path):
    study = script("study")
    arms = [
        "configs/smollm2_135m_grpo.yaml",
        "configs/smollm2_135m_popo.yaml loss.off_policy=coupled",
    ]
    assert study.flags(tmp_path, arms[0], 3, None)[:2] == ["--config", arms[0]]
    assert "--run.steps" not in study.flags(tmp_path, arms[0], 3, None)
    for arm, end in zip(arms, (0.5, 0.75), strict=True):
        for seed in (0, 1):
            folder = study.folder_of(tmp_path, arm, seed)
            folder.mkdir()
            lines = [
                {"step": step, "rollouts/total": 64 * step, "eval/greedy": right, "eval/sampled": right / 2}
                | {"eval/greedy/add": right + seed / 10, "eval/greedy/compare": 1.0}
                for step, right in ((0, 0.25), (2, end))
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| 0.250 ± 0.000 |" in study.table(tmp_path, arms, [0, 1])
    rows = study.table_of_kinds(tmp_path, arms, [0, 1]).splitlines()
    assert rows[3:] == [
        "| add | 0.300 ± 0.050 | 0.550 ± 0.050 | 0.800 ± 0.050 |",
        "| compare | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 |",
    ]
