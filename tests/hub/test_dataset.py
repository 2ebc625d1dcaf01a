"""Data sets from a hub: rows, splits, revisions, types, the cache, and what each refusal says."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import TaskConfig
from pspo_jax.data.loading import read
from pspo_jax.system.storage import StorageError

ROWS = [{"problem": f"{i} + 0.10 = ?", "answer": i} for i in range(6)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: hard
  data_files:
  - {split: train, path: hard/*.jsonl}
---
"""
TYPED = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/*.parquet}
dataset_info:
- config_name: main
  features:
  - {name: problem, dtype: string}
  - {name: answer, dtype: string}
---
"""
FILES = {
    "README.md": CARD,
    "main/train.jsonl": lines(ROWS[:4]),
    "main/test.jsonl": lines(ROWS[4:]),
    "hard/train-00000-of-00001.jsonl": lines(ROWS[:3]),
    "hard/other.txt": b"not read",
}
TYPED_FILE = "main/train-00000-of-00001.parquet"


@pytest.fixture
def rows(hub, tmp_path):
    """The rows of a data set, by the fields of its task."""
    hub.add("datasets", "org/rows", FILES)
    hub.add("datasets", "org/typed", {"README.md": TYPED, TYPED_FILE: parquet(ROWS[:3])})

    def of(name="org/rows", split="train", **fields):
        fields = {"subset": "main", "cache": str(tmp_path / "cache")} | fields
        found = read(name, "task.train_data", split, TaskConfig(**fields))
        return [found[i] for i in range(len(found))]

    return of


def complaint(rows, *args, **fields):
    with pytest.raises((ConfigError, StorageError)) as error:
        rows(*args, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_split_of_text_files_comes_alone(hub, rows):
    assert rows() == ROWS[:4]
    assert hub.downloads("main/train.jsonl") and not hub.downloads("main/test.jsonl") and not hub.downloads(".txt")
    assert rows(subset="hard") == ROWS[:3]
    assert rows(split="train[1:3]") == ROWS[1:3] and rows(split="train+test") == ROWS


def test_typed_files_have_the_types_that_the_card_declares(rows):
    wanted = [{"problem": row["problem"], "answer": str(row["answer"])} for row in ROWS[:3]]
    assert rows("org/typed") == wanted and rows("org/typed", split="train[:2]") == wanted[:2]


def test_packed_files_without_a_card(hub, rows):
    hub.add("datasets", "org/packed", {"train.jsonl.gz": gzip.compress(lines(ROWS))})
    assert rows("org/packed", subset=None) == ROWS


def test_a_revision_stays_what_it_was(hub, rows):
    repo = hub.repos["datasets", "org/rows"]
    repo.refs["v1"] = repo.refs["main"]
    repo.commit(FILES | {"main/train.jsonl": lines(ROWS[::-1])})
    assert rows() == ROWS[::-1]
    assert rows(revision="v1") == rows(revision=repo.refs["v1"]) == ROWS[:4]


@pytest.mark.parametrize("name", ["org/rows", "org/typed"])
def test_without_a_network_the_cache_is_enough(hub, rows, offline, name):
    """Each revision is found again, and no other one takes its place."""
    repo = hub.repos["datasets", name]
    repo.refs["v1"] = repo.refs["main"]
    old = rows(name, revision="v1")
    changed = {"main/train.jsonl": lines(ROWS[::-1]), TYPED_FILE: parquet(ROWS[3:])}
    repo.commit({path: changed.get(path, data) for path, data in repo.commits[repo.refs["main"]].items()})
    new = rows(name)
    offline()
    hub.requests.clear()
    assert rows(name) == new != old == rows(name, revision="v1")
    assert hub.requests == []
    assert "HF_HUB_OFFLINE forbids to ask the hub, whose cache" in complaint(rows, name, revision="v2")


def test_a_second_start_fetches_nothing(hub, rows):
    rows()
    hub.requests.clear()
    assert rows() == ROWS[:4]
    assert hub.downloads() == [] and len(hub.requests) == 1  # the question which commit it is


def test_files_that_are_missing_from_the_cache_are_not_overlooked(rows, offline):
    rows()
    offline()
    assert "lacks files of it" in complaint(rows, split="test")


def test_refusals(hub, rows, monkeypatch, offline):
    hub.add("datasets", "org/gated", FILES, gated=True)
    start = "task.train_data=org/"
    assert complaint(rows, "org/none").startswith(
        f"{start}none: no such file or folder, and the hub shows no dataset of this id; check the spelling"
    )
    assert complaint(rows, "org/gated").startswith(
        f"{start}gated: is gated, and this machine is not logged in; accept its terms at {hub.url}/datasets/org/gated"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert complaint(rows, "org/gated").startswith(f"{start}gated: is gated, and the account of this machine's token")
    assert complaint(rows, revision="v9") == (
        "task.revision=v9: org/rows has no such branch, tag or commit; choose among main, or drop it for the main "
        "branch"
    )
    assert 'Unknown split "dev". Should be one of' in complaint(rows, split="dev")
    for subset in (None, "medium"):
        assert complaint(rows, subset=subset) == (
            f"task.subset={subset}: org/rows has configurations of other names; choose among main, hard"
        )
    offline()
    assert "(hf download org/rows --repo-type dataset --local-dir DIR)" in complaint(rows)


def test_a_hub_that_is_gone(rows, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub http://127.0.0.1:9 cannot be reached ([Errno 111]" in complaint(rows)
