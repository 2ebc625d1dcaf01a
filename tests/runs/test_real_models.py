"""Real vocabulary, tokenizer, rows and processes: a Qwen2-shaped checkpoint in, three steps, a checkpoint out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.arrays.split_params import merge_params
from pspo_jax.export import main as export
from pspo_jax.model.transformer import transformer
from tests import xla
from tests.conftest import DATA
from tests.model.checkpoints import torch_logits, transformers, write_talker
from tests.model.test_pretrained import load
from tests.runs.processes import TIMES, finish, metrics

TOKENIZERS = DATA / "tokenizers"
ROWS = DATA / "math" / "gsm8k_train.jsonl"
STEPS = 3

KINDS = [
    pytest.param(("full", "qwen2.5"), marks=[pytest.mark.xdist_group("real-full"), pytest.mark.slow], id="full"),
    pytest.param(("lora", "qwen2.5"), marks=[pytest.mark.xdist_group("real-lora"), pytest.mark.slow], id="lora"),
    pytest.param(("lora", "qwen2.5-small"), marks=pytest.mark.xdist_group("small-lora"), id="lora-small"),
]
"""What is trained, and the vocabulary: the real one, or its first 4,096 ranks."""


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """The checkpoint of a vocabulary, by the name of its tokenizer."""
    made = {}

    def get(tokenizer):
        if tokenizer not in made:
            made[tokenizer] = tmp_path_factory.mktemp("talker") / "ck"
            write_talker(made[tokenizer], TOKENIZERS / tokenizer)
        return made[tokenizer]

    return get


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """GSM8K rows, as they are, whose answer is 2 or 5: a random policy that says these hits some."""
    path = tmp_path_factory.mktemp("rows") / "gsm8k.jsonl"
    lines = [line for line in ROWS.read_text().split("\n") if line]
    path.write_text("\n".join([x for x in lines if json.loads(x)["answer"].endswith(("#### 2", "#### 5"))][:80]))
    return path


def run(env, folder, talker, rows, devices, *argv):
    words = {
        "run.dir": folder,
        "run.steps": STEPS,
        "run.fingerprint": True,
        "task.name": "gsm8k",
        "task.train_data": rows,
        "task.heldout_prompts": 8,
        "model.source": talker,
        "model.compute_dtype": "float32",
        "model.remat": "none",
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 6,
        "eval.every": 0,
        "checkpoint.every": 1,
        "optimizer.learning_rate": 1e-4,
        # At 1 many tokens come from a flat tail of 151,000, where neighbours on the cumulative sum are no further apart
        # than rounding differs between meshes.
        "rollout.temperature": 0.5,
        "log.report": False,
        "log.to": "none",
    }
    flags = [w for k, v in words.items() for w in (f"--{k}", str(v))]
    env = env | {"XLA_FLAGS": xla.flags(devices)}
    command = [sys.executable, "-m", "pspo_jax.train", *flags, *argv]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finish(process)
    return metrics(folder)


ARGUMENTS = {
    "full": ("--loss.kl_coef", "0.04"),
    "lora": ("--lora.rank", "4", "--model.param_dtype", "float32", "--loss.kl_coef", "0.04"),
}
MESHES = {
    "four": (4, ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")),
    "two slices": (8, ("--mesh.slices", "2", "--mesh.data", "4", "--mesh.fsdp", "2")),
    "two slices by tensor": (8, ("--mesh.slices", "2", "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")),
}
"""Number of devices and how they are used."""


class Trained(NamedTuple):
    kind: str
    talker: Path
    folder: Path


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, child_env, talkers, rows):
    """A run of three PSPO steps on one device, from a checkpoint."""
    kind, tokenizer = request.param
    found = Trained(kind, talkers(tokenizer), tmp_path_factory.mktemp("run") / kind)
    run(child_env, found.folder, found.talker, rows, 1, *ARGUMENTS[kind])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_one_device_equals_several(trained, mesh, tmp_path, child_env, rows):
    one = metrics(trained.folder)
    assert len(one) == STEPS + 1
    assert any(line["groups/effective"] > 0 for line in one[1:]) and any(line["grad_norm"] > 0 for line in one[1:])
    devices, words = MESHES[mesh]
    several = run(child_env, tmp_path / "several", trained.talker, rows, devices, *ARGUMENTS[trained.kind], *words)
    for a, b in zip(one, several, strict=True):
        for name in a:
            if name in ("crc/params", "crc/advantage", "crc/selector"):
                continue  # bits of floats; their values are compared as metrics
            if name == "update/useful_tokens" and "slices" in mesh:
                continue  # each slice makes microbatches of its own rows, so that padding differs
            if name.startswith("crc/"):
                assert a[name] == b[name], name
            else:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), name


@pytest.mark.slow
def test_adapter_checkpoints_are_small_and_resume_to_the_bit(trained, tmp_path, child_env, rows):
    kind, talker, folder = trained
    size = sum(p.stat().st_size for p in (folder / "checkpoints" / "3").rglob("*") if p.is_file())
    exported = (talker / "model.safetensors").stat().st_size
    assert size < exported / (10 if exported > 10**7 else 2) if kind == "lora" else size > exported
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "3")
    (again / "summary.json").unlink()
    after = run(child_env, again, talker, rows, 1, *ARGUMENTS[kind])
    assert [{k: v for k, v in x.items() if not k.startswith(TIMES)} for x in after] == metrics(folder)


def test_exported_run_is_the_policy(trained, tmp_path):
    """The folder loads in transformers with its tokenizer, and has the logits of the run's own params."""
    kind, talker, folder = trained
    out = tmp_path / "out"
    assert export(["--run", str(folder), "--out", str(out)]) == 0
    files = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files
    card = (out / "README.md").read_text()
    assert "pspo on gsm8k" in card and "eval/greedy" in card
    assert "base_model" not in card  # the base is a folder, which the hub would refuse as a base

    exported = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = np.array([tokenizer.encode("Natalia sold clips to 48 of her friends")])
    model, params, _ = load(out)
    ours = np.asarray(model.logits(params, model.hidden(params, jnp.asarray(tokens))))
    assert np.abs(ours - torch_logits(exported, tokens)).max() <= 1e-4
    base, before, _ = load(talker)
    start = np.asarray(base.logits(before, base.hidden(before, jnp.asarray(tokens))))
    assert np.abs(ours - start).max() > 1e-3

    if kind == "lora":
        check_adapter(folder, talker, tmp_path / "adapter", tokens, ours)


def check_adapter(folder, talker, out, tokens, merged):
    """PEFT loads the exported adapter over the base and computes what the merged export does."""
    from peft import PeftModel

    assert export(["--run", str(folder), "--out", str(out), "--adapter-only"]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    exported = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(talker), out)
    assert np.abs(torch_logits(exported, tokens) - merged).max() <= 1e-4


@pytest.mark.slow
def test_export_of_all_steps_and_of_one_that_is_not_there(trained, tmp_path, child_env):
    kind, folder = trained.kind, trained.folder
    if kind == "full":
        pytest.skip("the cheaper run is enough")
    call = [sys.executable, "-m", "pspo_jax.export", "--run", str(folder), "--out", str(tmp_path / "all")]
    done = subprocess.run([*call, "--step", "all", "--adapter-only"], env=child_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["step_000001", "step_000002", "step_000003"]
    write_talker(tmp_path / "other", TOKENIZERS / "qwen2.5-small", layers=3)
    call[-1] = str(tmp_path / "one")
    for extra, words in (
        (["--step", "7"], "no such checkpoint; there are 1, 2, 3"),
        (["--base", str(tmp_path / "other")], "is not the checkpoint that this run began from"),
    ):
        bad = subprocess.run([*call, *extra], env=child_env, capture_output=True, text=True)
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and words in bad.stderr, bad.stderr


def test_sampler_and_trainer_agree(trained):
    """float32: within 1e-4 per token, as the run's own metrics say."""
    _, talker, folder = trained
    for line in metrics(folder)[1:]:
        assert line["sampling/sampling_logp_difference/max"] <= 1e-4
    model = transformer(load(talker)[2].architecture)
    assert model.frozen_axes is None and merge_params({"a": 1}, None) == {"a": 1}
