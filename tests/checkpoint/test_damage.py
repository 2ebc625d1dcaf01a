"""What counts as damage of a checkpoint, on real files: what a checksum says, and nothing else."""

from __future__ import annotations

import json
import resource
import shutil

import numpy as np
import pytest

from pspo_jax.checkpoint import damage
from pspo_jax.checkpoint.reading import read_params
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.system.storage import StorageError
from tests.checkpoint.trees import abstract, tree


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "c"
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), {"note": step}, {"greedy": 0.1 * step})
        checkpoints.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "c")


def files_of(folder):
    return sorted(str(p.relative_to(folder / "2")) for p in (folder / "2").rglob("*") if p.is_file())


def spoil(path, how):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(bytes(data[:middle]))
    else:
        data[middle] ^= 0x10
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "flipped"])
def test_no_spoilt_file_of_a_checkpoint_changes_what_is_restored(saved, tmp_path, how):
    """Each file in turn: what comes back is checkpoint 2, or 1 with a line, and nothing is lost or trained on."""
    for number, name in enumerate(files_of(saved)):
        folder, said = shutil.copytree(saved, tmp_path / str(number)), []
        spoil(folder / "2" / name, how)
        with Checkpoints(folder, CheckpointConfig(), said.append) as checkpoints:
            state, metadata = checkpoints.restore(abstract(tree()), said.append)
        step = metadata["note"]
        np.testing.assert_array_equal(state["w"], tree(step)["w"], name)
        aside = folder.with_name(f"{folder.name}.damaged")
        assert (step == 1) == (aside / "2").exists() == any("checkpoint 2 is damaged" in line for line in said), name


def test_scores_are_written_anew_from_the_metadata(copy):
    said, path = [], copy / "2" / "metrics" / "metrics"
    for words in ("", '{"greedy": NaN}', '{"gredy": 0.2}', "[]"):
        path.write_text(words)
        with Checkpoints(copy, CheckpointConfig(keep_best=1), said.append):
            assert json.loads(path.read_text()) == {"greedy": 0.2}


def test_an_error_that_may_pass_is_raised_and_moves_nothing(copy):
    """A file that cannot be opened, too few files that may be open, a bug in the caller's check."""
    whole = copy / "2" / "_CHECKPOINT_METADATA"
    text = whole.read_bytes()
    whole.unlink()
    whole.symlink_to(whole.name)  # opening it fails with ELOOP, also for root
    with pytest.raises(StorageError, match=r"Too many levels of symbolic links.*nothing was changed"):
        Checkpoints(copy, CheckpointConfig())
    whole.unlink()
    whole.write_bytes(text)
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StorageError, match="Too many open files"):
                checkpoints.restore(abstract(tree()), print)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for error in (OSError(5, "Input/output error"), ValueError("a bug"), KeyError("x"), RuntimeError("memory")):

            def check(metadata, error=error):
                raise error

            with pytest.raises(type(error)):
                checkpoints.restore(abstract(tree()), print, check)
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(abstract(tree()), print)[1]["note"] == 2
    assert not copy.with_name("c.damaged").exists()


def test_data_that_cannot_be_read_now_are_no_damage(copy):
    """The arrays' file, which TensorStore opens and not Python."""
    largest = max((copy / "2" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    kept = largest.rename(largest.with_name("kept"))
    largest.symlink_to(largest.name)
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        with pytest.raises(StorageError, match="symbolic links"):
            checkpoints.restore(abstract(tree()), print)
        largest.unlink()
        kept.rename(largest)
        assert checkpoints.restore(abstract(tree()), print)[1]["note"] == 2


def test_a_wrong_question_of_whole_files_is_no_damage(copy):
    """Arrays of another structure than the metadata say are an error of the program."""
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        assert damage.complaint(copy / "2") == (None, True)
        (copy / "2" / damage.RECORD).unlink()
        assert damage.complaint(copy / "2") == (None, False)
        assert checkpoints.restore(abstract(tree()), print)[1]["note"] == 2


def test_a_checkpoint_without_its_record_is_still_found_damaged(copy):
    """As of a process that was killed between the two."""
    (copy / "2" / damage.RECORD).unlink()
    largest = max((copy / "2" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    spoil(largest, "cut")
    said = []
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract(tree()), said.append)[1]["note"] == 1
    assert "checkpoint 2 is damaged" in said[0]


def test_readers_name_a_damaged_checkpoint_and_move_nothing(tmp_path):
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"params": tree()}, {})
        checkpoints.wait()
    largest = max((tmp_path / "c" / "1" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    spoil(largest, "cut")
    with pytest.raises(ConfigError, match=r"1: is damaged \(state/.*bytes\); choose another"):
        read_params(tmp_path / "c", 1)
    assert (tmp_path / "c" / "1").exists()


def test_a_score_that_is_no_number_ranks_nothing(tmp_path):
    """keep_best keeps the best of those that have a score."""
    greedy = {1: float("nan"), 2: 0.5, 3: float("nan"), 4: 0.2, 5: float("nan")}
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=1, keep_best=1)) as checkpoints:
        for step, score in greedy.items():
            checkpoints.save(step, tree(step, 2), {}, {"greedy": score, "sampled": float("nan")})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5]
