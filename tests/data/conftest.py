"""What the tests of data share."""

from __future__ import annotations

import pytest

from pspo_jax.data.loading import quiet_datasets
from pspo_jax.data.tokenizer import load_tokenizer
from tests.data.visual_tokenizer import checkpoint_folder, write_visual
from tests.helpers import tiny_config


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep the files that the datasets library writes out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        quiet_datasets()
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def visual_folder(tmp_path_factory):
    """The name of a visual checkpoint's folder, without weights."""
    return write_visual(tmp_path_factory.mktemp("visual"))


@pytest.fixture(scope="module")
def visual_tokenizer(visual_folder):
    config = tiny_config(task__name="math", model__source=visual_folder)
    return load_tokenizer(config, checkpoint_folder(config), None)
