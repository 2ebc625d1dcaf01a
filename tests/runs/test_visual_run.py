"""A run that trains a checkpoint with a vision tower on text: it starts, is resumed, and is exported."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from tests.model.visual_checkpoints import transformers, write_visual_checkpoint
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
