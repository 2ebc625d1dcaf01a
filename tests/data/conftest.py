"""What the tests of data share."""

from __future__ import annotations

import pytest

from pspo_jax.data.loading import quiet_datasets


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep the files that the datasets library writes out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        quiet_datasets()
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
