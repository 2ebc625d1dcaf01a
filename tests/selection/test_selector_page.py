"""The code of docs/extending/selector.md runs as it stands, and each example does what the page says."""

import re
import sys

import numpy as np
import pytest

from pspo_jax.selection import Scorer
from tests.conftest import REPO
from tests.helpers import slow_except

MODULE = "my_selectors"
PAGE = REPO / "docs" / "extending" / "selector.md"
EXAMPLES = ["spread", "pps", "in_order", "thompson", "optimistic", "unsolved_first"]
OPTIONS = {"selection.cooldown": 2, "selection.exploration": 0.25}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's code as one module, which is importable under the name that the page uses."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / f"{MODULE}.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield __import__(MODULE)
    sys.modules.pop(MODULE, None)


def some_success(page):
    return np.where(np.arange(page.PROMPTS) < 10, 0.5, 1.0)


def test_the_test_to_copy_passes(page):
    tests = [value for name, value in vars(page).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("name", slow_except(["pps", "thompson"], EXAMPLES))
@pytest.mark.parametrize("fields", slow_except([OPTIONS], [{}, OPTIONS]))
def test_every_example_draws_full_batches(page, name, fields):
    ids, _ = page.run_selector(f"{MODULE}:{name}", some_success(page), steps=6, **fields)
    assert ids.shape == (6, page.BATCH)


def test_the_annotated_pps_is_the_one_of_the_package(page):
    success = some_success(page)
    theirs, ours = (
        page.run_selector(name, success, steps=12) for name in (f"{MODULE}:pps", "pspo_jax.selection.pps:pps")
    )
    np.testing.assert_array_equal(theirs[0], ours[0])
    np.testing.assert_array_equal(theirs[1].score, ours[1].score)


def test_in_order_goes_through_the_data(page):
    epoch = page.PROMPTS // page.BATCH
    ids, _ = page.run_selector(f"{MODULE}:in_order", some_success(page), steps=2 * epoch)
    for half in (ids[:epoch], ids[epoch:]):
        np.testing.assert_array_equal(np.sort(half, axis=1).ravel(), np.arange(page.PROMPTS))


@pytest.mark.parametrize("name", ["thompson", "optimistic"])
def test_examples_prefer_prompts_that_are_sometimes_solved(page, name):
    ids, _ = page.run_selector(f"{MODULE}:{name}", some_success(page), steps=30)
    assert (ids[15:] < 10).mean() > 0.3  # a quarter of the prompts


def test_solved_prompts_come_last(page):
    success = np.where(np.arange(page.PROMPTS) < 2 * page.BATCH, 0.0, 1.0)
    ids, _ = page.run_selector(f"{MODULE}:unsolved_first", success, steps=12)
    first_epoch = page.PROMPTS // page.BATCH
    assert sorted(ids[:first_epoch].ravel()) == list(range(page.PROMPTS))
    assert (ids[first_epoch:] < 2 * page.BATCH).all()


def test_the_page_names_every_slot():
    text = PAGE.read_text()
    assert all(f"| `{slot}` |" in text for slot in Scorer._fields)
