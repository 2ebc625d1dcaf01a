"""Several processes tokenise a share of the data each, and all of them have the table that one would have made."""

import json
import subprocess
import sys

import datasets
import pytest

from tests.conftest import REPO
from tests.distributed.processes import free_port

SCRIPT = """
import sys
import jax
number, cache, data = int(sys.argv[2]), sys.argv[3], sys.argv[4]
if sys.argv[1] != "alone":
    jax.distributed.initialize(sys.argv[1], 2, number)
from pathlib import Path
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.data import shared_table
from pspo_jax.data.loading import from_data
from pspo_jax.data.tokenising import column_array, tokenised

shared_table._PATIENCE = 0.5
task = replace(Config(), {"task.name": "math", "task.train_data": data, "task.cache": cache}).task
source, made = from_data(data, "task.train_data", "train", task), []

def encode(prompt, grids=()):
    made.append(prompt)
    return list(prompt.encode())

def table():
    return tokenised(source, encode, "bytes", Path(cache), 0, lambda line: print("SAID", line))

rows = table()
print("MADE", len(made))
print("SUM", len(rows), int(column_array(rows, "digest").sum()), rows["row"][:3], rows["row"][-1], rows._fingerprint)
before = len(made)
table()
print("AGAIN", len(made) - before)
"""
ROWS = 2001


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(ROWS)))
    return path


def run(env, data, *caches):
    """The lines that each process prints, with the cache folder of each."""
    address = f"127.0.0.1:{free_port()}" if len(caches) > 1 else "alone"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, address, str(number), str(cache), str(data)],
            env=env | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, cache in enumerate(caches)
    ]
    found = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found.append(dict(line.split(" ", 1) for line in out.splitlines() if line.split(" ")[0].isupper()))
    return found


def test_each_process_tokenises_half_and_both_read_what_one_would_make(child_env, data, tmp_path):
    both = run(child_env, data, tmp_path, tmp_path)
    assert sorted(int(one["MADE"]) for one in both) == [ROWS // 2, ROWS - ROWS // 2]
    assert all(one["AGAIN"] == "0" and "SAID" not in one for one in both)
    (table,) = tmp_path.glob("prompts-*")  # no file of a share is left
    assert both[0]["SUM"] == both[1]["SUM"]
    first = datasets.Dataset.from_file(str(table))
    (alone,) = run(child_env, data, tmp_path / "alone")
    assert alone["MADE"] == str(ROWS) and alone["SUM"] == both[0]["SUM"]
    (other,) = (tmp_path / "alone").glob("prompts-*")
    assert first.to_dict() == datasets.Dataset.from_file(str(other)).to_dict()


@pytest.mark.slow
def test_where_the_folder_is_not_shared_each_tokenises_the_rest_and_says_so(child_env, data, tmp_path):
    both = run(child_env, data, tmp_path / "a", tmp_path / "b")
    assert [one["MADE"] for one in both] == [str(ROWS)] * 2
    for name, one in zip("ab", both, strict=True):
        assert one["SAID"].startswith(f"task.cache={tmp_path / name}: this process sees no rows from 1 of 2 processes")
        assert one["AGAIN"] == "0" and len(list((tmp_path / name).glob("prompts-*"))) == 1
    assert both[0]["SUM"] == both[1]["SUM"]


@pytest.mark.slow
def test_one_that_has_the_table_waits_for_the_other_and_a_cut_off_share_is_made_anew(child_env, data, tmp_path):
    run(child_env, data, tmp_path / "a")
    (table,) = (tmp_path / "a").glob("prompts-*")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{table.stem}-0-of-1.arrow").write_bytes(table.read_bytes()[:1000])
    first, second = run(child_env, data, tmp_path / "a", tmp_path / "b")
    assert first["MADE"] == "0" and second["MADE"] == str(ROWS) and "SAID" not in second
    assert first["SUM"] == second["SUM"]


@pytest.mark.slow
def test_processes_with_other_data_each_tokenise_for_themselves(child_env, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace('"2"', '"3"'))
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, address, str(number), str(tmp_path / "cache"), str(path)],
            env=child_env | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, path in enumerate((data, other))
    ]
    outs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all(f"MADE {ROWS}" in out and "different data, settings or tokenizers" in out for out in outs)
