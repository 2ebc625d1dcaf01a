"""The picture of priorities has a column for each histogram, and puts each prompt where its priority is."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pspo_jax.reporting.priorities import _shares, write_priorities


def write(folder, *histograms):
    lines = [{"step": 10 * i, "priority": {"edges": e, "counts": c}} for i, (e, c) in enumerate(histograms)]
    (folder / "strategy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_columns_are_steps_and_rows_are_priorities(tmp_path):
    write(tmp_path, ([0.0, 0.5, 1.0], [10, 0]), ([0.0, 0.5, 1.0], [0, 10]))
    assert write_priorities(tmp_path, tmp_path / "p.png")
    image = np.asarray(Image.open(tmp_path / "p.png").convert("L"), float)
    middle = image[100:400, 100:680]
    height, width = middle.shape
    quarters = [middle[v * height // 2 : (v + 1) * height // 2, h * width // 2 : (h + 1) * width // 2].mean()
                for v in (0, 1) for h in (0, 1)]  # fmt: skip
    assert max(quarters[1], quarters[2]) < min(quarters[0], quarters[3]) - 50


def test_no_picture_without_histograms(tmp_path):
    assert not write_priorities(tmp_path, tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(-5, 5), st.floats(0.01, 10))
def test_shares_sum_to_one_and_keep_the_mean(counts, low, width):
    edges = np.linspace(low, low + width, len(counts) + 1)
    rows = np.linspace(low - 1, low + width + 1, 65)
    shares = _shares(np.asarray(counts, float), edges, rows)
    total = sum(counts)
    np.testing.assert_allclose(shares.sum(), 1.0 if total else 0.0, atol=1e-9)
    if total:
        middles, wanted = (rows[1:] + rows[:-1])[::-1] / 2, (edges[1:] + edges[:-1]) / 2
        mean = np.dot(wanted, counts) / total
        assert abs(np.dot(middles, shares) - mean) <= (rows[1] - rows[0])


def test_one_priority_of_all_prompts(tmp_path):
    write(tmp_path, ([0.1, 0.1, 0.1], [40, 0]))
    assert write_priorities(tmp_path, tmp_path / "p.png")
