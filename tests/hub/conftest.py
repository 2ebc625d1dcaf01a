"""A hub on localhost, and the real clients, which have an empty cache and no token."""

from __future__ import annotations

import pytest

from pspo_jax.data.loading import quiet_datasets
from pspo_jax.model.huggingface import hub as hub_client
from tests.hub.server import serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that the clients of this process ask; `monkeypatch.setenv("HF_TOKEN", ...)` logs in."""
    quiet_datasets()
    with serving() as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(
            f"{constants}.HF_HUB_DISABLE_XET", True
        )  # large files go by LFS, which needs no other service
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
        monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def offline(monkeypatch):
    """A call after which the clients ask nobody, as with HF_HUB_OFFLINE=1."""

    def go() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    return go
