"""Runs that train a checkpoint with a vision tower, on text and on images: they are resumed, and exported."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from pspo_jax.model.vision import image_tokens
from tests.data.made_images import picture, write_problems, write_splits
from tests.model.checkpoints import transformers
from tests.model.test_pretrained import load
from tests.model.visual_checkpoints import (
    RELEASED_VOCABULARY,
    torch_logits,
    write_visual_policy,
)
from tests.pictures import picture as picture_of
from tests.pictures import prompts_of
from tests.runs.processes import lines_of, metrics, params, wait_for_step


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_visual_checkpoint_trains_on_text(tmp_path, child_env, vision):
    source = tmp_path / "source"
    write_visual_policy(source, layers=1)
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {2 + 3 * (a % 2)}"} for a in range(10, 40) for b in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own_rewards.py").write_text(REWARD)
    fields = {
        "run.dir": tmp_path / "run",
        "run.steps": 2,
        "task.name": "gsm8k",
        "task.train_data": tmp_path / "rows.jsonl",
        "task.heldout_prompts": 8,
        "task.cache": tmp_path / "cache",
        "prompt.template": "none",
        "model.source": source,
        "model.vision": vision,
        "model.compute_dtype": "float32",
        "reward.terms": "accuracy=1, own_rewards:some_letter=0.5",
        "selection.success": "reward",
        "verifier.workers": 1,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 4,
        "loss.kl_coef": 0.01,
        "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 1e-3,
        "eval.every": 0,
        "checkpoint.every": 1,
        "log.report": False,
        "log.to": "none",
    }

    def call(module, words):
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            env=child_env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(**more):
        return call("pspo_jax.train", (w for k, v in (fields | more).items() for w in (f"--{k}", v)))

    first = train()
    assert ("of them train" in first) == (vision == "frozen")
    train(**{"run.steps": 3})
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    call("pspo_jax.export", ["--run", tmp_path / "run", "--out", tmp_path / "out"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)
    processors = [folder / "preprocessor_config.json" for folder in (source, tmp_path / "out")]
    assert json.loads(processors[1].read_text()) == json.loads(processors[0].read_text())
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


REWARD = """
def some_letter(completion, **columns):
    assert "images" not in columns
    return float(len(completion) % 2)
"""
FIELDS = {
    "run.steps": 3,
    "task.name": "math",
    "task.heldout_prompts": 4,
    "task.train_prompts": 0,
    "task.cache": "cache",
    "prompt.max_tokens": 256,
    "prompt.question": "geo3k",
    "model.source": "source",
    "model.compute_dtype": "float32",
    "reward.terms": "geo3k=1, own_rewards:some_letter=0.5",
    "selection.success": "reward",
    "verifier.workers": 1,
    "rollout.prompts": 8,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 6,
    "optimizer.weight_decay": 0.0,
    "optimizer.learning_rate": 1e-3,
    "eval.every": 0,
    "checkpoint.every": 1,
    "log.to": "none",
}
"""Fields of a short run, in a folder that holds a checkpoint and a reward that varies."""


def flags(fields):
    if fields["algorithm.name"] == "popo":
        fields = fields | {"replay.effective": "rewards"}
    return [str(word) for k, v in (FIELDS | fields).items() for word in (f"--{k}", v)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("pspo", {"model.vision": "trained"}),
        ("popo", {"model.vision": "frozen", "rollout.chunks": 2, "loss.minibatches": 2}),
        ("popo", {"model.vision": "trained", "loss.packing": True}),
        ("pspo", {"lora.rank": 4}),
        ("learnability_replay", {"sft.steps": 4, "sft.batch": 4, "sft.warmup": 0, "sft.data": "demonstrations.jsonl"}),
    ],
)
def test_a_visual_checkpoint_trains_on_images(tmp_path, child_env, algorithm, more):
    source = tmp_path / "source"
    write_visual_policy(source)
    write_splits(tmp_path / "problems", 20, 2, 4)
    with (tmp_path / "demonstrations.jsonl").open("w") as file:
        for i in range(8):
            (tmp_path / f"{i}.png").write_bytes(picture(60 + 14 * (i % 5), 150, 100 + i))
            file.write(json.dumps({"prompt": "<image>Find x.", "completion": str(i), "images": [f"{i}.png"]}) + "\n")
    (tmp_path / "own_rewards.py").write_text(REWARD)
    fields = {
        "run.dir": "run",
        "algorithm.name": algorithm,
        "task.train_data": "./problems",
        "task.heldout_data": "./problems",
        "task.heldout_split": "test",
        "eval.other_images": True,
        **more,
    }

    def call(module, *words):
        line = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(line, env=child_env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    call("pspo_jax.train", *flags(fields))
    assert (tmp_path / "run" / "cold_start").exists() == ("sft.steps" in more)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["eval/greedy_other_images"] is not None
    assert all(line["skipped_updates"] == 0 for line in lines[1:]) and lines[-1]["updates"] >= 3
    # The policy that samples and the one that trains agree on prompts with images.
    gaps = [line["sampling/sampling_logp_difference/max"] for line in lines[1:]]
    assert max(gap for gap in gaps if gap is not None) < 1e-3
    call("pspo_jax.export", "--run", "run", "--out", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and any(name.startswith("visual.") for name in changed) == (more.get("model.vision") == "trained")
    if "lora.rank" in more:
        call("pspo_jax.export", "--run", "run", "--out", tmp_path / "adapter", "--adapter-only")
        peft_merges_the_same(tmp_path / "adapter", source, after)
    for data, name in (
        ((), "heldout"),
        (("--benchmarks", "geometry3k", "--data", "geometry3k=./problems"), "geometry3k"),
    ):
        out = tmp_path / f"evaluated_{name}"
        words = ("--samples", 16, "--temperature", 0.6, "--top-p", 1, "--steps", "latest", "--out", out)
        call("pspo_jax.evaluate", "--run", "run", *data, *words)
        lines = [json.loads(line) for line in (out / "step_3" / f"{name}.jsonl").read_text().splitlines()[1:]]
        assert len(lines) == 4 and all(len(line["right"]) == 16 for line in lines)
        assert "Problems: 4; n, samples of each: 16." in (out / "table.md").read_text()


def peft_merges_the_same(adapter, source, merged):
    """PEFT loads the exported adapter over its base, leaves the tower alone, and merges to the exported weights."""
    peft = pytest.importorskip("peft", reason="peft is a test dependency; install '.[test]'")
    plain = transformers.AutoModelForImageTextToText.from_pretrained(source)
    other = peft.PeftModel.from_pretrained(plain, adapter)
    found = {name: x for name, x in other.named_parameters() if "lora_" in name}
    assert found and not any("visual" in name for name in found)
    assert all(x.detach().abs().max() > 0 for x in found.values())
    for name, x in other.merge_and_unload().model.language_model.named_parameters():
        np.testing.assert_allclose(merged[f"model.{name}"], x.detach().numpy(), atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("algorithm", "vision"), [("pspo", "frozen"), ("popo", "trained")])
def test_the_released_ids_are_killed_resumed_and_exported(tmp_path, child_env, capfd, algorithm, vision):
    """32 problems in Geometry3k's columns, the vocabulary of Qwen2.5-VL-3B, and an export that transformers loads."""
    source = tmp_path / "source"
    write_visual_policy(source, RELEASED_VOCABULARY)
    write_problems(tmp_path / "problems.parquet", 32)
    (tmp_path / "own_rewards.py").write_text(REWARD)
    fields = {
        "run.fingerprint": True,
        "algorithm.name": algorithm,
        "task.train_data": "problems.parquet",
        "model.vision": vision,
        "rollout.prompts": 4,
        "log.report": False,
    }

    def begin(module, *words):
        line = [sys.executable, "-m", module, *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(line, env=child_env, cwd=tmp_path, text=True, **pipes)

    def call(module, *words):
        process = begin(module, *words)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call("pspo_jax.train", "--run.dir", whole, *flags(fields))
    process = begin("pspo_jax.train", "--run.dir", killed, *flags(fields))
    assert wait_for_step(process, killed, at_least=1, seconds=600)
    process.kill()
    process.wait()
    process.stdout.close()
    assert lines_of(killed) < 4
    call("pspo_jax.train", "--run.dir", killed, *flags(fields))
    assert metrics(killed) == metrics(whole)
    assert all(line["skipped_updates"] == 0 for line in metrics(whole)[1:]) and metrics(whole)[-1]["updates"] >= 3
    jax.tree.map(np.testing.assert_array_equal, params(killed), params(whole))

    out = tmp_path / "out"
    call("pspo_jax.export", "--run", whole, "--out", out)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert any(name.startswith("visual.") for name in changed) == (vision == "trained")
    loads_with_equal_logits(out, params(whole)["params"], capfd)


def loads_with_equal_logits(folder, trained, capfd):
    """transformers loads an export without a warning, and has the logits of the run's own weights."""
    capfd.readouterr()
    other, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    said = "".join(capfd.readouterr()).lower()
    assert "missing" not in said and "newly initialized" not in said and "not used" not in said, said
    model, weights, source = load(folder)
    for name, tree in trained.items():
        jax.tree.map(np.testing.assert_array_equal, weights[name], tree)
    v, rng = source.architecture.vision, np.random.default_rng(0)
    ids = RELEASED_VOCABULARY.images
    parts = [[5, picture_of(v, rng, 8, 6), 9], [picture_of(v, rng, 4, 10), 3]]
    batch = prompts_of(v, rng, parts, ids=ids)
    embeddings = model.encode_images(weights, batch.images)
    hidden = model.hidden(weights, batch.prompts.tokens, images=image_tokens(embeddings, batch.images))
    found = model.logits(weights, hidden)
    kept = np.setdiff1d(np.arange(RELEASED_VOCABULARY.rows), source.architecture.forbidden)
    for i, right in enumerate(torch_logits(other.eval().float(), v, batch, ids[0])):
        np.testing.assert_allclose(found[i, : len(right)][:, kept], right[:, kept], atol=1e-4, rtol=1e-4)
