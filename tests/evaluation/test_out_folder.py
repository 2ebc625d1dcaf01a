"""Folders that evaluation and export are given: what cannot be read or written there is one line."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from pspo_jax.commands.evaluate import _check_settings
from pspo_jax.config.command_line import to_yaml
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.evaluate import _steps
from pspo_jax.evaluation.runner import _recover
from pspo_jax.export import main as export
from pspo_jax.system.storage import StorageError

ARGUMENTS = Namespace(run=Path("runs/a"), model=None, temperature=0.6, top_p=0.95, samples=1, seed=0)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "config.yaml").write_text(to_yaml(Config()))
    return folder


@pytest.mark.parametrize("kept", ["[]", "{", "3"])
def test_damaged_settings_of_an_evaluation_are_one_line(tmp_path, kept):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3" / "a.jsonl").write_text("x\n")
    (tmp_path / "settings.json").write_text(kept)
    with pytest.raises(ConfigError, match=r"its settings\.json is damaged; name another folder"):
        _check_settings(tmp_path, Config(), ARGUMENTS)
    assert (tmp_path / "settings.json").read_text() == kept


def test_a_file_in_the_place_of_the_results_is_one_line(tmp_path):
    (tmp_path / "step_3").write_text("mine")
    with pytest.raises(StorageError, match=r"a\.jsonl: cannot be written \(File exists\)"):
        _recover(tmp_path / "step_3" / "a.jsonl", {"problems": 1, "samples": 1, "weights": "x"})
    assert (tmp_path / "step_3").read_text() == "mine"


def test_results_that_are_carried_on_are_not_mixed_with_a_file_of_their_name(tmp_path):
    header = {"weights": "w", "problems": 2, "samples": 1}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(header) + '\n{"problem": 0')
    (tmp_path / "a.partial").write_text("mine")
    assert _recover(path, header) == 0
    assert path.read_text() == json.dumps(header) + "\n" and (tmp_path / "a.partial").read_text() == "mine"


@pytest.mark.parametrize("step", ["²", "3,²", "٣x"])
def test_what_is_no_number_is_no_step(run, step):
    with pytest.raises(ConfigError, match="no such checkpoint"):
        _steps(Namespace(run=run, steps=step))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        export(["--run", str(run), "--out", str(run / "hf"), "--step", step])


def test_a_base_that_a_run_has_no_use_for_is_refused(run):
    with pytest.raises(ConfigError, match=r"--base m: this run started from random weights .*; leave it out"):
        export(["--run", str(run), "--out", str(run / "hf"), "--base", "m"])
