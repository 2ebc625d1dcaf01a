"""What a selector may know of prompts before the first step."""

import numpy as np
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.rewards.task import make_task
from pspo_jax.selection.metadata import load_metadata
from pspo_jax.training.setup import prepare
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def prompts():
    """Arithmetic has difficulties of its own: the number of carries."""
    return make_task(tiny_config(), TOKENIZER).train


def test_built_in_selectors_get_what_they_read(prompts):
    assert load_metadata(tiny_config(selection__name="pps"), prompts) == ((), None)
    _, metadata = load_metadata(tiny_config(selection__name="curriculum"), prompts)
    np.testing.assert_array_equal(metadata.difficulty, prompts.difficulty)


def test_a_selector_of_ones_own_gets_all_that_is_known(prompts):
    names, metadata = load_metadata(tiny_config(selection__name="mine:easy_first"), prompts)
    assert names == ("arithmetic",) and metadata.task_ids.tolist() == [0] * len(prompts.lengths)
    np.testing.assert_array_equal(metadata.difficulty, prompts.difficulty)
    assert len(set(metadata.difficulty.tolist())) > 1


def test_a_column_that_is_not_there_is_named(prompts):
    config = tiny_config(selection__name="mine:easy_first", selection__difficulty_column="level")
    with pytest.raises(ConfigError, match=r"selection\.difficulty_column=level: .* the data has none by that name"):
        load_metadata(config, prompts)


def test_bins_follow_tasks_or_difficulties(prompts):
    fields = {"algorithm__name": "posterior_mixed"}
    names, metadata = load_metadata(tiny_config(selection__bins="task", **fields), prompts)
    assert names == ("arithmetic",) and metadata.bins.tolist() == [0] * len(prompts.lengths)
    _, metadata = load_metadata(tiny_config(selection__bins="difficulty", **fields), prompts)
    carries = sorted(set(prompts.difficulty.tolist()))
    assert metadata.bins.tolist() == [carries.index(x) for x in prompts.difficulty.tolist()]
    assert metadata.difficulty is None


def test_automatic_bins_are_difficulties_else_tasks(prompts):
    config = tiny_config(algorithm__name="posterior_mixed", selection__bins="auto")
    by_difficulty = load_metadata(tiny_config(algorithm__name="posterior_mixed", selection__bins="difficulty"), prompts)
    np.testing.assert_array_equal(load_metadata(config, prompts)[1].bins, by_difficulty[1].bins)
    rows = len(prompts.lengths)
    levels = {"level": [f"Level {i % 3}" for i in range(rows)]}
    column = prompts._replace(difficulty=None, column=lambda name: levels.get(name, [None] * rows))
    assert load_metadata(config, column)[1].bins.tolist() == [i % 3 for i in range(rows)]
    bare = prompts._replace(difficulty=None, column=None)
    names, metadata = load_metadata(config, bare._replace(labels=["gsm8k", "math"] * (rows // 2)))
    assert names == ("gsm8k", "math") and metadata.bins.tolist() == [0, 1] * (rows // 2)
    names, metadata = load_metadata(config, bare)
    assert names == ("arithmetic",) and not metadata.bins.any()


def test_a_run_says_what_its_automatic_bins_are():
    lines: list[str] = []
    prepare(tiny_config(algorithm__name="posterior_mixed", selection__bins="auto"), say=lines.append)
    assert "selection.bins=auto: prompts of one difficulty share what is believed of their success" in lines


def test_more_tasks_than_bins_are_refused(prompts):
    labels = [f"task{i % 65}" for i in range(len(prompts.lengths) * 2)]
    many = prompts._replace(lengths=np.tile(prompts.lengths, 2), labels=labels)
    config = tiny_config(selection__bins="task", algorithm__name="mopps")
    with pytest.raises(ConfigError, match=r"selection\.bins=task: the data has 65 tasks, .* at most 64 bins; choose"):
        load_metadata(config, many)
