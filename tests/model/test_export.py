"""Checkpoints out: what goes in comes out to the bit, and a folder is there whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from pspo_jax.config.fields import ConfigError
from pspo_jax.model.huggingface.save import copy_files, numpy_dtype, whole_tensors, write_folder, write_tensors
from tests.helpers import slow_except
from tests.model.checkpoints import torch, transformers, write_checkpoint
from tests.model.test_pretrained import load

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {},
    "smollm3": {},
    "olmo2": {},
    "gemma3_text": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("dtype", slow_except(["bfloat16"], ["float32", "bfloat16", "float16"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_write_is_the_identity(tmp_path, family, dtype):
    """Through float32 and back, in shards; bits are compared, not values."""
    model = write_checkpoint(tmp_path / "in", family, dtype=getattr(torch, dtype), shards="20KB", **FAMILIES[family])
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    _, params, source = load(tmp_path / "in")
    (tmp_path / "out").mkdir()
    tensors = whole_tensors(source.architecture, source, params, lambda name: numpy_dtype(source.tensors[name].dtype))
    write_tensors(tmp_path / "out", tensors, shard_bytes=30_000)
    copy_files(tmp_path / "out", source.folder, ("config.json", "generation_config.json"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    want, got = model.state_dict(), again.state_dict()
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype == getattr(torch, dtype)
        bits = torch.int32 if dtype == "float32" else torch.int16
        assert torch.equal(got[name].view(bits), tensor.view(bits)), name


def test_one_shard_needs_no_index(tmp_path):
    values = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    write_tensors(tmp_path, iter(values.items()))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o666
    assert set(load_file(tmp_path / "model.safetensors")) == {"a", "b"}


def test_folder_appears_whole_or_not_at_all(tmp_path):
    def half(folder):
        (folder / "first").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "out", half)
    assert not (tmp_path / "out").exists()
    write_folder(tmp_path / "out", lambda folder: (folder / "all").write_text("x") and None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["all"]
    with pytest.raises(ConfigError, match="exists already"):
        write_folder(tmp_path / "out", half)


def test_killed_export_leaves_no_folder_that_looks_whole(tmp_path, child_env):
    """A real process, killed between two shards."""
    code = (
        "import numpy as np, sys, time; from pathlib import Path\n"
        "from pspo_jax.model.huggingface.save import write_folder, write_tensors\n"
        "def tensors():\n"
        "    for i in range(100):\n"
        "        yield f't{i}', np.zeros(1000, np.float32); time.sleep(.05)\n"
        "write_folder(Path(sys.argv[1]), lambda folder: write_tensors(folder, tensors(), 4000))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=child_env)
    partial = tmp_path / "out.partial"
    for _ in range(600):
        if len(list(partial.glob("shard-*"))) > 3:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "out").exists()
    assert not list(partial.glob("model*"))
    write_folder(tmp_path / "out", lambda folder: (folder / "x").write_text(json.dumps(1)) and None)
    assert not partial.exists()
