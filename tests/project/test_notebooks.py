"""The notebooks of examples/ are kept without outputs, and run from the first cell to the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO

NOTEBOOKS = sorted((REPO / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def executed(name: str, folder: Path, env: dict[str, str]) -> str:
    """Run a notebook in a folder; returns the text that its cells print and show."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[test]'")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[test]'")
    book = nbformat.read(REPO / "examples" / name, as_version=4)
    client = nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env | {"PYTHONPATH": str(REPO), "MPLBACKEND": "agg"})
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def evaluated(run: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics with held-out accuracies."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("eval/greedy") is not None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_run_learns_and_is_carried_on(child_env, tmp_path):
    said = executed("first_run.ipynb", tmp_path, child_env)
    assert "there is no such field" in said and "30 -> 32" in said
    first, *_, last = (line["eval/greedy"] for line in evaluated(tmp_path / "runs" / "first"))
    assert last > first + 0.02


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_algorithms_begin_alike_and_roll_out_equally_much(child_env, tmp_path):
    said = executed("compare_algorithms.ipynb", tmp_path, child_env)
    assert "grpo" in said and "popo" in said
    for name in ("grpo", "popo"):
        assert [line["step"] for line in evaluated(tmp_path / "runs" / "compare" / f"{name}_0")] == [0, 5, 10, 15, 20]
