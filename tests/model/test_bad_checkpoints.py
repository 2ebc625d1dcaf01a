"""Bad checkpoints: one line that names what is wrong, before any weight is read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.huggingface.load import read_source
from tests.model.checkpoints import write_checkpoint

ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder, "qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "ck")


def complaint(folder):
    with pytest.raises(ConfigError) as error:
        read_source(ModelConfig(source=str(folder)))
    text = str(error.value)
    assert "\n" not in text and "model.source=" in text
    return text


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_copy_is_good(copy):
    assert read_source(ModelConfig(source=str(copy))).architecture.layers == 2


def test_missing_folder(tmp_path):
    assert "no such folder" in complaint(tmp_path / "nothing")


def test_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in complaint("no-such-owner-1/no-such-model")


def test_folder_without_config(copy):
    (copy / "config.json").unlink()
    assert "config.json: No such file" in complaint(copy)


def test_config_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    assert "not JSON" in complaint(copy)


def test_unknown_architecture(copy):
    change_config(copy, model_type="mamba")
    text = complaint(copy)
    assert "'mamba' is not supported" in text and "qwen2" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "relu"}, ["hidden_act='relu'"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "yarn"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary"],
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            ["rope_parameters", "high_freq_factor"],
        ),
    ],
)
def test_unsupported_option(copy, fields, words):
    change_config(copy, **fields)
    text = complaint(copy)
    assert all(word in text for word in words), text


def test_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut off" in complaint(copy)
    path.write_bytes(b"")
    assert "damaged or cut off" in complaint(copy)


def test_missing_shard(copy):
    names = load_file(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing" in complaint(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in complaint(copy)
    assert read_source(ModelConfig(source=str(copy)), weights=False).tensors == {}


def test_wrong_shape(copy):
    change_tensors(copy, lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}))
    text = complaint(copy)
    assert "model.norm.weight has shape [7]" in text and "[32]" in text


def test_wrong_type(copy):
    change_tensors(copy, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    assert "model.norm.weight is I8; supported: F32, F16, BF16" in complaint(copy)


def test_missing_tensor(copy):
    change_tensors(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in complaint(copy)


def test_more_layers_than_the_file_has(copy):
    change_config(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    text = complaint(copy)
    assert "lacks model.layers.2" in text and "and 9 more" in text


def test_extra_tensor(copy):
    change_tensors(copy, lambda t: t.update({"model.layers.0.surprise": np.ones(1, np.float32)}))
    assert "model.layers.0.surprise" in complaint(copy)


def test_old_buffers_and_a_tied_head_are_no_surprise(copy):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change_tensors(copy, add)
    assert read_source(ModelConfig(source=str(copy))).architecture.tied
