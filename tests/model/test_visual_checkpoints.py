"""Checkpoints with a vision tower: released configs, both layouts of names, exports, adapters, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.architecture import Lora
from pspo_jax.model.huggingface.load import read_source
from pspo_jax.model.huggingface.save import (
    copy_files,
    merged_tensors,
    numpy_dtype,
    stored_names,
    whole_tensors,
    write_adapter,
    write_tensors,
)
from pspo_jax.model.transformer import transformer
from pspo_jax.model.vision import image_tokens
from pspo_jax.model.weights import entries, table
from tests.model.checkpoints import torch, transformers
from tests.model.test_pretrained import load
from tests.model.visual_checkpoints import torch_logits, write_visual_checkpoint
from tests.pictures import picture, prompts_of

TEXT_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
RELEASED = {
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "in_chans": 3,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    | TEXT_3B,
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "qwen2_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 1536,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
}
"""The flat config.json of Qwen2.5-VL-3B and of Qwen2-VL-2B."""


def write_config(folder, fields):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))


def shapes_of(a):
    """Name and shape of each tensor, by transformers' names in memory."""
    found = {}
    for _, name, w, _ in entries(table(a)):
        inner = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        found[inner] = w.hf_shape
    return found


@pytest.mark.parametrize(
    ("kind", "count"), [("qwen2_5_vl", 3_754_622_976), pytest.param("qwen2_vl", 2_208_985_600, marks=pytest.mark.slow)]
)
def test_a_released_config_describes_the_weights_that_transformers_has(tmp_path, kind, count):
    write_config(tmp_path, RELEASED[kind])
    a = read_source(ModelConfig(source=str(tmp_path)), weights=False).architecture
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert shapes_of(a) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(math.prod(shape) for shape in shapes_of(a).values()) == count
    assert a.forbidden == (151652, 151653, 151654, 151655, 151656)
    assert a.rotaries[0].axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert a.vision.layout == (2, 8) and a.vision.patch_numbers == 588
    assert set(range(32)) & set(a.vision.whole_image) == set(range(32) if kind == "qwen2_vl" else (7, 15, 23, 31))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, torch's model, a batch, torch's logits) of a small checkpoint in the layout of released files."""
    folder = tmp_path_factory.mktemp("saved")
    model = write_visual_checkpoint(folder, "qwen2_5_vl", 3, {"num_hidden_layers": 1}, {"depth": 2})
    v, rng = read_source(ModelConfig(source=str(folder))).architecture.vision, np.random.default_rng(0)
    batch = prompts_of(v, rng, [[2, picture(v, rng, 4, 6), 2], [4]])
    return folder, model, batch, torch_logits(model, v, batch)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def rename(folder, change):
    path = folder / "model.safetensors"
    save_file({change(name): x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})


def nested(name):
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def logits_of(model, weights, batch):
    images = jax.tree.map(jnp.asarray, batch.images)
    seen = image_tokens(model.encode_images(weights, images), images)
    return np.asarray(model.logits(weights, model.hidden(weights, jnp.asarray(batch.prompts.tokens), images=seen)))


def assert_equal(found, expected, forbidden, atol=1e-4):
    allowed = np.setdiff1d(np.arange(found.shape[-1]), forbidden)
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine[: len(right), allowed], right[:, allowed], atol=atol)


@pytest.mark.parametrize("layout", ["released", "in_memory"])
def test_both_layouts_are_read_and_exported_as_they_are(saved, copy, tmp_path, layout):
    _, _, batch, expected = saved
    if layout == "in_memory":
        rename(copy, nested)
    before = load_file(copy / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in before) == (layout == "in_memory")
    _, params, source = load(copy)
    a, out = source.architecture, tmp_path / "out"
    out.mkdir()
    tensors = whole_tensors(a, source, params, lambda name: numpy_dtype(source.tensors[name].dtype))
    write_tensors(out, stored_names(tensors, source))
    copy_files(out, copy, ("config.json", "generation_config.json"))
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], err_msg=name)
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for right, found in zip(expected, torch_logits(again.eval(), a.vision, batch), strict=True):
        np.testing.assert_array_equal(right, found)


def test_a_frozen_tower_is_taken_from_the_source(saved, copy):
    _, _, batch, expected = saved
    _, params, source = load(copy)
    a = dataclasses.replace(source.architecture, freezes_vision=True)
    model = transformer(a)
    trained = {name: x for name, x in params.items() if name != "vision"}
    assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0))) == jax.tree.structure(trained)
    assert set(model.frozen_axes) == {"vision"}
    assert_equal(logits_of(model, SplitParams({"vision": params["vision"]}, trained), batch), expected, a.forbidden)
    changed = jax.tree.map(lambda x: x + 1, trained)
    written = dict(whole_tensors(a, source, changed, lambda name: np.dtype("float32")))
    before = load_file(copy / "model.safetensors")
    assert written.keys() == before.keys()
    for name, x in before.items():
        np.testing.assert_allclose(written[name], x + (not name.startswith("visual.")), atol=1e-6)


def test_adapters_are_pefts_and_leave_the_tower_alone(saved, copy, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is a test dependency; install '.[test]'")
    _, _, batch, expected = saved
    _, base, source = load(copy)
    lora = Lora(rank=2, alpha=4.0, dropout=0.0, targets=("q", "o", "gate", "down"))
    a = dataclasses.replace(source.architecture, lora=lora)
    model = transformer(a)
    adapters = jax.tree.map(
        lambda x: np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32) * 0.3,
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    found = logits_of(model, SplitParams(base, adapters), batch)
    assert np.abs(found[0, 0] - logits_of(model, SplitParams(base, None), batch)[0, 0]).max() > 0.1
    assert_equal(logits_of(model, SplitParams(base, None), batch), expected, a.forbidden)

    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, a, adapters, str(copy))
    plain = transformers.AutoModelForImageTextToText.from_pretrained(copy, attn_implementation="eager")
    other = peft.PeftModel.from_pretrained(plain, folder).eval()
    adapted = {name for name, _ in other.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * len(lora.targets) and not any("visual" in name for name in adapted)
    assert_equal(found, torch_logits(other.base_model.model, a.vision, batch), a.forbidden)

    merged = dict(merged_tensors(a, source, adapters, lambda name: np.dtype("float32")))
    name = "model.layers.0.mlp.gate_proj.weight"
    other = other.merge_and_unload()
    right = other.model.language_model.layers[0].mlp.gate_proj.weight.detach().numpy()
    np.testing.assert_allclose(merged[name], right, atol=1e-5)
    tower = load_file(copy / "model.safetensors")
    for name in tower:
        if name.startswith("visual."):
            np.testing.assert_array_equal(merged[name], tower[name])


def complaint(folder):
    with pytest.raises(ConfigError) as error:
        read_source(ModelConfig(source=str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mixture_of_layouts_is_refused(copy):
    rename(copy, lambda name: nested(name) if "merger" in name else name)
    text = complaint(copy)
    assert "mixes two layouts of names" in text and "model.visual.merger" in text


def test_a_tower_without_a_tensor_is_refused(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["visual.blocks.1.attn.qkv.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "the checkpoint lacks visual.blocks.1.attn.qkv.bias" in complaint(copy)
    tensors["visual.blocks.1.attn.qkv.bias"] = np.zeros(48, np.float32)
    tensors["visual.deepstack.weight"] = np.zeros(4, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    assert "that the architecture lacks: visual.deepstack.weight" in complaint(copy)


REFUSED = {
    "activation": ({"hidden_act": "relu"}, {}, "vision_config.hidden_act='relu'; it must be 'silu'"),
    "width": ({"out_hidden_size": 64}, {}, "vision_config.out_hidden_size=64; it must be the width of the language"),
    "heads": ({"num_heads": 3}, {}, "vision_config.hidden_size=1280; it must be a multiple of 4 num_heads = 12"),
    "window": ({"window_size": 14}, {}, "vision_config.window_size=14; it must be at least 28"),
    "depth": ({"depth": 0}, {}, "vision_config has depth=0; it must be a whole number above 0"),
    "blocks": ({"fullatt_block_indexes": 7}, {}, "fullatt_block_indexes=7; it must be a list of whole numbers"),
    "sections": ({}, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 16]}}, "with the sum 64"),
    "no_sections": ({}, {"rope_scaling": {"type": "default"}}, "rope_parameters lack 'mrope_section'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_settings_are_refused(tmp_path, case):
    tower, fields, words = REFUSED[case]
    released = RELEASED["qwen2_5_vl"]
    write_config(tmp_path, released | fields | {"vision_config": released["vision_config"] | tower})
    with pytest.raises(ConfigError) as error:
        read_source(ModelConfig(source=str(tmp_path)), weights=False)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_sections_without_a_tower_are_refused(tmp_path):
    fields = {name: x for name, x in RELEASED["qwen2_5_vl"].items() if name != "vision_config"}
    write_config(tmp_path, fields | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    with pytest.raises(ConfigError, match="mrope_section"):
        read_source(ModelConfig(source=str(tmp_path)), weights=False)


def test_mean_and_deviation_are_the_processors(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.125]}))
    v = read_source(ModelConfig(source=str(copy))).architecture.vision
    assert v.mean == (0.5, 0.25, 0.5) and v.std == (0.5, 0.5, 0.125)
    path.write_text(json.dumps({"image_std": [0.5, 0]}))
    assert "image_std=[0.5, 0]; it must be 3 numbers above 0" in complaint(copy)
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.125] * 3}}))
    assert read_source(ModelConfig(source=str(copy))).architecture.vision.mean == (0.125,) * 3
    path.unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": {"rescale_factor": 1}}))
    assert "processor_config.json has rescale_factor=1; only 1/255 is supported" in complaint(copy)
