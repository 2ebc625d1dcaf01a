"""Runs on images under a frozen tower: embeddings are computed once, survive a kill, and are shared by processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import xla
from tests.data.visual_tokenizer import write_visual
from tests.distributed.processes import free_port
from tests.model.visual_checkpoints import write_visual_checkpoint
from tests.runs.processes import finish, lines_of, metrics, params, wait_for_step
from tests.runs.test_visual_run import write_problems

pytestmark = pytest.mark.slow
POPO = {"algorithm.name": "popo", "rollout.chunks": 2, "loss.minibatches": 2, "replay.effective": "rewards"}
DAPO = {"algorithm.name": "dapo", "rollout.slots": 8, "rollout.dynamic_sampling_rounds": 2, "loss.kl_coef": 0.01}
APER = {"algorithm.name": "aper", "loss.packing": True}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A function from a run folder and more fields to the words of a command; its cache is shared."""
    folder = tmp_path_factory.mktemp("frozen")
    source = folder / "source"
    tower = {"depth": 2, "patch_size": 14, "window_size": 56}
    text = {"num_hidden_layers": 2, "vocab_size": 4224, "bos_token_id": None, "eos_token_id": 4098}
    write_visual(source)
    write_visual_checkpoint(source, "qwen2_5_vl", text=text, tower=tower, ids=(4108, 4109, 4105, 4106))
    write_problems(folder / "problems.parquet", 24)
    (folder / "own_rewards.py").write_text(
        "def some_letter(completion, **columns):\n    return float(len(completion) % 2)\n"
    )
    fields = {
        "run.steps": 6,
        "run.fingerprint": True,
        "task.name": "math",
        "task.train_data": folder / "problems.parquet",
        "task.heldout_prompts": 4,
        "task.train_prompts": 0,
        "task.cache": folder / "cache",
        "prompt.max_tokens": 256,
        "prompt.question": "geo3k",
        "model.source": source,
        "model.compute_dtype": "float32",
        "reward.terms": "accuracy=1, own_rewards:some_letter=0.5",
        "selection.success": "reward",
        "verifier.workers": 1,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 6,
        "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 1e-3,
        "eval.every": 3,
        "eval.other_images": True,
        "checkpoint.every": 1,
        "log.to": "none",
    }

    def of(run, **more):
        found = fields | {"run.dir": run} | more
        return [str(word) for name, value in found.items() for word in (f"--{name}", value)]

    of.folder = folder
    return of


def start(env, words, devices=1, log=subprocess.PIPE):
    line = [sys.executable, "-m", "pspo_jax.train", *words]
    env = env | {"XLA_FLAGS": xla.flags(devices)}
    return subprocess.Popen(line, env=env, cwd=words_folder(words), stdout=log, stderr=subprocess.STDOUT, text=True)


def words_folder(words):
    return Path(words[words.index("--task.cache") + 1]).parent


def computed(out):
    """How many images stand in batches, and how many of them were computed by this call."""
    found = re.search(r"images: ([\d,]+) distinct .* tower makes of them, ([\d,]+) of which were computed", out)
    return int(found[1]), int(found[2])


def entries(folder):
    return sorted((folder / "cache").glob("image_embeddings/*/*/*.bin"))


@pytest.mark.parametrize("fields", [POPO, DAPO, APER], ids=["popo", "dapo", "aper"])
def test_killed_and_resumed_to_the_bit(child_env, tmp_path, words, fields):
    """The second call reads what the first one computed, and computes again what was damaged meanwhile."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = computed(finish(start(child_env, words(whole, **fields))))
    assert first[0] == 24 and first[1] in (0, 24)
    process = start(child_env, words(killed, **fields))
    assert wait_for_step(process, killed, at_least=2)
    process.kill()
    process.wait()
    process.stdout.close()
    assert lines_of(killed) < 7
    damaged, lost = entries(words.folder)[:2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lost.unlink()
    assert computed(finish(start(child_env, words(killed, **fields)))) == (24, 2)
    assert metrics(killed) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, params(killed), params(whole))
    lines = metrics(whole)
    assert lines[-1]["eval/greedy_other_images"] is not None
    gaps = [line.get("sampling/sampling_logp_difference/max") for line in lines[1:]]
    assert max(gap for gap in gaps if gap is not None) < 1e-3


def test_four_devices_and_two_processes_equal_one(child_env, tmp_path, words):
    more = POPO | {"run.steps": 3, "log.completions_every": 0}
    one, four, two = tmp_path / "one", tmp_path / "four", tmp_path / "two"
    finish(start(child_env, words(one, **more)))
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "task.cache": words.folder / "cache"}
    finish(start(child_env, words(four, **more, **mesh), devices=4))
    port = free_port()
    ranks = []
    for number in range(2):
        # Each process has a cache of its own, and one of them is damaged after the first call.
        own = {
            "distributed.coordinator": f"127.0.0.1:{port}",
            "distributed.processes": 2,
            "distributed.process": number,
            "task.cache": words.folder / f"cache{number}" / "inner",
        }
        with Path(f"{two}.{number}.log").open("w") as log:
            line = [sys.executable, "-m", "pspo_jax.train", *words(two, **more, **own)]
            env = child_env | {"XLA_FLAGS": xla.flags(1)}
            ranks.append(subprocess.Popen(line, env=env, cwd=words.folder, stdout=log, stderr=subprocess.STDOUT))
    for number, process in enumerate(ranks):
        assert process.wait(timeout=400) == 0, Path(f"{two}.{number}.log").read_text()
    for other in (four, two):
        for a, b in zip(metrics(one), metrics(other), strict=True):
            for name in ("crc/prompt_ids", "crc/tokens", "eval/greedy", "eval/greedy_other_images"):
                assert a.get(name) == b.get(name), name
    caches = [sorted((words.folder / f"cache{n}" / "inner").glob("image_embeddings/*/*/*.bin")) for n in range(2)]
    assert len(caches[0]) == 24
    assert [path.read_bytes() for path in caches[0]] == [path.read_bytes() for path in caches[1]]
