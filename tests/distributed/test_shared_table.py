"""Several processes tokenise a share of the data each, and all of them have the table that one would have made."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from pspo_jax.data import shared_table
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


def in_threads(monkeypatch, paths, count):
    """The rows that each of several threads makes, as if each were a process, and what it says."""
    barrier, own, board = threading.Barrier(len(paths)), threading.local(), [None] * len(paths)

    def every(value):
        board[own.number] = value
        barrier.wait(10)
        found = list(board)
        barrier.wait(10)
        return found

    threads = SimpleNamespace(
        process_count=lambda: len(paths),
        process_number=lambda: own.number,
        equal_everywhere=lambda x: np.array([(x == other).all() for other in every(x)]),
        sum_over_processes=lambda x: sum(every(x)),
        any_process=lambda flag: any(every(flag)),
        wait_for_all=lambda name, seconds: every(None),
    )
    monkeypatch.setattr(shared_table, "processes", threads)
    monkeypatch.setattr(shared_table, "_PATIENCE", 0.0)

    def one(number):
        own.number, made, said = number, [], []

        def make(path, rows):
            made.extend(rows)
            datasets.Dataset.from_dict({"row": list(rows)}).map(lambda x: x, cache_file_name=str(path))

        shared_table.share_work(paths[number], count, make, said.append)
        return made, said

    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(one, range(len(paths))))


def table(path):
    return datasets.Dataset.from_file(str(path))["row"][:]


@pytest.mark.parametrize("workers", [2, 3])
def test_each_makes_its_share_and_one_joins_them(monkeypatch, tmp_path, workers):
    path = tmp_path / "prompts-a.arrow"
    found = in_threads(monkeypatch, [path] * workers, 1001)
    assert [row for made, _ in found for row in made] == list(range(1001)) == table(path)
    assert not any(said for _, said in found) and [p.name for p in tmp_path.glob("prompts*")] == [path.name]
    assert all(made == [] for made, _ in in_threads(monkeypatch, [path] * workers, 1001))


def test_without_a_shared_folder_each_makes_the_rest_and_says_so(monkeypatch, tmp_path):
    paths = [tmp_path / name / "prompts-a.arrow" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
    for (made, said), path in zip(in_threads(monkeypatch, paths, 1000), paths, strict=True):
        assert sorted(made) == list(range(1000)) == table(path)
        assert len(said) == 1 and "sees no rows from 1 of 2 processes, so it tokenises 500 more of 1,000" in said[0]
        assert list(path.parent.iterdir()) == [path]


def test_few_rows_and_other_tables_are_made_by_each_alone(monkeypatch, tmp_path):
    path, other = tmp_path / "prompts-a.arrow", tmp_path / "prompts-b.arrow"
    assert in_threads(monkeypatch, [path, path], shared_table.SHARED_FROM - 1) == [([], [])] * 2
    found = in_threads(monkeypatch, [path, other], 1000)
    assert all(made == [] and "processes have other data, settings or caches" in said[0] for made, said in found)


@pytest.mark.slow
def test_each_process_tokenises_half_and_both_read_what_one_would_make(child_env, data, tmp_path):
    both = run(child_env, data, tmp_path, tmp_path)
    assert sorted(int(one["MADE"]) for one in both) == [ROWS // 2, ROWS - ROWS // 2]
    assert all(one["AGAIN"] == "0" and "SAID" not in one for one in both)
    (joined,) = tmp_path.glob("prompts-*")  # no file of a share is left
    assert both[0]["SUM"] == both[1]["SUM"]
    first = datasets.Dataset.from_file(str(joined))
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
    (whole,) = (tmp_path / "a").glob("prompts-*")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{whole.stem}-0-of-1.arrow").write_bytes(whole.read_bytes()[:1000])
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
    assert all(f"MADE {ROWS}" in out and "processes have other data, settings or caches" in out for out in outs)
