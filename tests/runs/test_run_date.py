"""The day that a run's chat template writes, and stop tokens in an export."""

from __future__ import annotations

import datetime
import json

import pytest

from pspo_jax.config import command_line
from pspo_jax.model.huggingface.save import set_stop_ids
from pspo_jax.runs.run_date import with_date
from tests.helpers import tiny_config

TEXT = {"task__name": "math", "task__train_data": "x", "model__tokenizer": "t"}


def test_a_run_keeps_the_day_on_which_it_began(tmp_path):
    kept, config = tmp_path / "config.yaml", tiny_config(**TEXT)
    today = with_date(config, kept)
    assert today.prompt.date == datetime.date.today().isoformat()
    kept.write_text(command_line.to_yaml(with_date(tiny_config(**TEXT, prompt__date="2020-02-29"), kept)))
    assert with_date(config, kept).prompt.date == "2020-02-29"  # the same command on another day
    assert with_date(tiny_config(**TEXT, prompt__date="2021-01-01"), kept).prompt.date == "2021-01-01"
    kept.write_text(command_line.to_yaml(config))  # of a run that began without one
    assert with_date(config, kept) == config


def test_an_evaluation_keeps_its_day_too(tmp_path):
    kept = tmp_path / "settings.json"
    kept.write_text(json.dumps({"prompt": {"date": "2020-02-29"}}))
    assert with_date(tiny_config(**TEXT), kept, joined=False).prompt.date == "2020-02-29"


@pytest.mark.parametrize("fields", [{}, TEXT | {"prompt__template": "none"}])
def test_prompts_without_a_chat_template_have_no_day(fields, tmp_path):
    config = tiny_config(**fields)
    assert with_date(config, tmp_path / "config.yaml") == config


def test_an_export_names_every_stop_token(tmp_path):
    path = tmp_path / "generation_config.json"
    set_stop_ids(tmp_path, (7, 2), 0)
    assert json.loads(path.read_text()) == {"eos_token_id": [7, 2], "pad_token_id": 0}
    path.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 5, "temperature": 0.6}))
    set_stop_ids(tmp_path, (7, 2), 0)
    assert json.loads(path.read_text()) == {"eos_token_id": [7, 2], "pad_token_id": 5, "temperature": 0.6}
