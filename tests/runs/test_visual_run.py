"""Runs that train a checkpoint with a vision tower, on text and on images: they are resumed, and exported."""

from __future__ import annotations

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from safetensors.numpy import load_file

from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from tests.data.made_images import picture
from tests.data.visual_tokenizer import write_visual
from tests.model.checkpoints import transformers
from tests.model.visual_checkpoints import write_visual_checkpoint
from tests.runs.processes import metrics

PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_visual_checkpoint_trains_on_text(tmp_path, child_env, vision):
    source = tmp_path / "source"
    write_visual_checkpoint(source, "qwen2_5_vl", text={"num_hidden_layers": 1}, tower={"depth": 2})
    TOKENIZER.to_hf().save_pretrained(source)
    (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {2 + 3 * (a % 2)}"} for a in range(10, 40) for b in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
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
        "reward.terms": "length=1",
        "reward.require_end": False,
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
        "log.tensorboard": False,
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
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == PROCESSOR
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def write_problems(path, count):
    """Problems with drawn images, in the columns of Geometry3k: two images of each size, to be exchanged."""
    images = [
        {"bytes": picture(60 + 14 * (i // 2 % 5), 150 - 17 * (i // 2 % 4), i), "path": None} for i in range(count)
    ]
    rows = [
        {"images": [image], "problem": f"<image>Find x{i % 3}.", "answer": str(i % 7)} for i, image in enumerate(images)
    ]
    table = datasets.Dataset.from_list(rows)
    features = table.features.copy()
    features["images"] = datasets.List(datasets.Image())
    table.cast(features).to_parquet(str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("pspo", {"model.vision": "trained"}),
        ("popo", {"model.vision": "frozen", "rollout.chunks": 2, "loss.minibatches": 2}),
        ("popo", {"model.vision": "trained", "loss.packing": True}),
        ("pspo", {"lora.rank": 4}),
    ],
)
def test_a_visual_checkpoint_trains_on_images(tmp_path, child_env, algorithm, more):
    source = tmp_path / "source"
    tower = {"depth": 2, "patch_size": 14, "window_size": 56}
    text = {"num_hidden_layers": 2, "vocab_size": 4224, "bos_token_id": None, "eos_token_id": 4098}
    ids = (4108, 4109, 4105, 4106)
    write_visual(source)
    write_visual_checkpoint(source, "qwen2_5_vl", text=text, tower=tower, ids=ids)
    write_problems(tmp_path / "problems.parquet", 24)
    (tmp_path / "own_rewards.py").write_text(
        "def some_letter(completion, **columns):\n"
        "    assert 'images' not in columns\n"
        "    return float(len(completion) % 2)\n"
    )
    fields = {
        "run.dir": tmp_path / "run",
        "run.steps": 3,
        "algorithm.name": algorithm,
        "task.name": "math",
        "task.train_data": tmp_path / "problems.parquet",
        "task.heldout_prompts": 4,
        "task.train_prompts": 0,
        "task.cache": tmp_path / "cache",
        "prompt.max_tokens": 256,
        "prompt.question": "geo3k",
        "model.source": source,
        "model.compute_dtype": "float32",
        "reward.terms": "accuracy=1, own_rewards:some_letter=0.5",
        "selection.success": "reward",
        "replay.effective": "rewards",
        "verifier.workers": 1,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 6,
        "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 1e-3,
        "eval.every": 0,
        "eval.other_images": True,
        "checkpoint.every": 1,
        "log.tensorboard": False,
        **more,
    }
    if algorithm == "pspo":
        del fields["replay.effective"]
    words = [str(w) for k, v in fields.items() for w in (f"--{k}", v)]

    def call(module, *words):
        line = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(line, env=child_env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    call("pspo_jax.train", *words)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["eval/greedy_other_images"] is not None
    assert all(line["skipped_updates"] == 0 for line in lines[1:]) and lines[-1]["updates"] >= 3
    # The policy that samples and the one that trains agree on prompts with images.
    gaps = [line["sampling/sampling_logp_difference/max"] for line in lines[1:]]
    assert max(gap for gap in gaps if gap is not None) < 1e-3
    call("pspo_jax.export", "--run", tmp_path / "run", "--out", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and any(name.startswith("visual.") for name in changed) == (more.get("model.vision") == "trained")
    data, out = f"held={tmp_path / 'problems.parquet'}", tmp_path / "evaluated"
    call("pspo_jax.evaluate", "--run", tmp_path / "run", "--benchmarks", "held", "--data", data, "--out", out)
    assert len((out / "step_3" / "held.jsonl").read_text().splitlines()) == 25
