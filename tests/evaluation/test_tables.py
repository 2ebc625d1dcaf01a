"""The exact text of the tables, a picture that opens, and summaries through JSON."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pspo_jax.commands.evaluate import _write
from pspo_jax.evaluation import tables
from pspo_jax.evaluation.statistics import Summary, TaskAccuracy, summarise
from pspo_jax.evaluation.tables import curve, from_json, markdown, to_json

pytestmark = pytest.mark.filterwarnings("error")
NAN = math.nan


def summary(accuracy=0.5, se=0.03, **fields):
    base = Summary(30, 8, accuracy, se, 0.0125, {1: accuracy, 8: 0.9}, {8: 0.61}, 1234.4, 0.125, 0.0)
    return base._replace(**fields)


ROWS = {
    "base": {"aime": summary(0.5266, 0.0234)},
    "step 10 | a": {
        "aime": summary(0.55, 0.03, problems=28, pass_at={1: 0.55}, truncated=0),
        "math": summary(0.75, 0.04, pass_at={}, majority_at={}),
    },
    "broken": {"aime": summary(NAN, NAN, se_samples=NAN, mean_length=NAN), "math": summary(0.2, NAN, problems=1)},
}
TEXT = """\
| checkpoint | aime | math | average of 2 |
|---|---:|---:|---:|
| base | 52.7 ± 2.3 | – | – |
| step 10 \\| a | 55.0 ± 3.0 | 75.0 ± 4.0 | 65.0 ± 2.5 |
| broken | – | 20.0 ± – | – |

Accuracy (avg@n) in percent. ± is one standard error, the problems taken as a sample of a population; that of an \
average takes the benchmarks as independent.

### aime

Problems: 28 to 30; n, samples of each: 8. In percent, the mean length in tokens.

| checkpoint | avg@n | SE over problems | SE over samples | pass@1 | pass@8 | maj@8 | mean length | truncated % | \
no verdict % |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| base | 52.7 | 2.34 | 1.25 | 52.7 | 90.0 | 61.0 | 1234 | 12.5 | 0.0 |
| step 10 \\| a | 55.0 | 3.00 | 1.25 | 55.0 | – | 61.0 | 1234 | 0.0 | 0.0 |
| broken | – | – | – | – | 90.0 | 61.0 | – | 12.5 | 0.0 |

### math

Problems: 1 to 30; n, samples of each: 8. In percent, the mean length in tokens.

| checkpoint | avg@n | SE over problems | SE over samples | pass@1 | pass@8 | maj@8 | mean length | truncated % | \
no verdict % |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| step 10 \\| a | 75.0 | 4.00 | 1.25 | – | – | – | 1234 | 12.5 | 0.0 |
| broken | 20.0 | – | 1.25 | 20.0 | 90.0 | 61.0 | 1234 | 12.5 | 0.0 |
"""


def summary_strategy():
    number = st.floats(0, 1) | st.just(NAN)
    at = st.dictionaries(st.integers(1, 1024), number, max_size=3)
    count = st.integers(0, 1000)
    tasks = st.lists(st.builds(TaskAccuracy, st.text(max_size=3), count, number, number), max_size=3).map(tuple)
    return st.builds(Summary, count, count, number, number, number, at, at, number, number, number, tasks)


def test_markdown():
    assert markdown(ROWS, ["aime", "math"]) == TEXT


def test_no_average_where_no_row_has_all_of_them():
    for five in ([], ["aime", "math", "other"]):
        head = markdown(ROWS, five).splitlines()
        assert head[:2] == ["| checkpoint | aime | math |", "|---|---:|---:|"]


def test_labels_cannot_break_a_table():
    lines = markdown({"a\\|b\nc": {"x|y": summary()}}, []).splitlines()
    assert lines[0] == r"| checkpoint | x\|y |"
    assert lines[2] == r"| a\\\|b c | 50.0 ± 3.0 |"


def test_nothing_to_show():
    assert markdown({}, ["aime"]).startswith("| checkpoint |\n|---|\n\n")


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert len(data) > 1000
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    "steps", [{"base": 0, "step 10 | a": 10, "broken": 20}, {"base": 0}, {"step 10 | a": 7}, {"broken": 3}, {}]
)
def test_curve_is_a_picture_and_nothing_else_is_left(tmp_path, steps):
    path = tmp_path / "curve.png"
    path.write_text("an older one")
    curve(path, ROWS, steps, "AIME $5, MATH $6")
    width, height = png_size(path)
    assert width > 500 and height > 300
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_without_matplotlib_everything_but_the_curve_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "can_draw", lambda: False)
    _write(tmp_path, {"base": ROWS["base"]}, {"base": 0})
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md"}


def drawn(monkeypatch, tmp_path, steps, **options):
    """What `curve` draws: legend label -> [(step, percent, error)]."""
    from matplotlib.axes import Axes

    lines = {}
    plain = Axes.errorbar

    def errorbar(self, x, y, yerr, label, **style):
        lines[label] = list(zip(x, y, yerr, strict=True))
        return plain(self, x, y, yerr=yerr, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    curve(tmp_path / "curve.png", ROWS, steps, "title", **options)
    return lines


def test_curve_draws_the_numbers_in_order_of_step(monkeypatch, tmp_path):
    lines = drawn(monkeypatch, tmp_path, {"step 10 | a": 10, "base": 0, "broken": 20})
    assert lines == {
        "aime": [pytest.approx((0, 52.66, 2.34)), pytest.approx((10, 55, 3))],
        "math": [pytest.approx((10, 75, 4)), pytest.approx((20, 20, 0))],
        "average of 2": [pytest.approx((10, 65, 2.5))],
    }


def test_curve_leaves_out_checkpoints_without_a_step_and_an_average_of_one(monkeypatch, tmp_path):
    lines = drawn(monkeypatch, tmp_path, {"step 10 | a": 10}, five=["aime"])
    assert lines == {"aime": [pytest.approx((10, 55, 3))], "math": [pytest.approx((10, 75, 4))]}


def test_tasks_of_a_benchmark_have_a_table():
    right = np.array([[1, 0], [1, 1], [0, NAN], [NAN, NAN]])
    shape = right.shape
    tasks = ["b", "b", "a | c", "a | c"]
    found = summarise(right, [["1"] * 2] * 4, np.ones(shape, int), np.zeros(shape, bool), [1], tasks)
    assert [tuple(part) for part in found.by_task] == [
        ("a | c", 2, 0, pytest.approx(NAN, nan_ok=True)),
        ("b", 2, 0.75, 0.25),
    ]
    old = summary(by_task=(TaskAccuracy("b", 2, 0.5, 0.1),))
    text = markdown({"new": {"suite": found}, "old": {"suite": old}, "none": {"suite": summary()}}, [])
    assert text.endswith(
        "\n| task | problems | new | old | none |\n|---|---:|---:|---:|---:|\n"
        "| a \\| c | 2 | 0.0 ± – | – | – |\n| b | 2 | 75.0 ± 25.0 | 50.0 ± 10.0 | – |\n"
    )
    assert "| task |" not in markdown({"x": {"suite": summary()}}, [])


@given(summary_strategy())
def test_json_round_trip(before):
    saved = json.dumps(to_json(before), allow_nan=False)
    after = from_json(json.loads(saved))
    assert repr(after) == repr(before)


def test_json_of_nan_and_of_keys():
    saved = to_json(summary(NAN))
    assert saved["accuracy"] is None
    assert saved["pass_at"] == {"1": None, "8": 0.9}
