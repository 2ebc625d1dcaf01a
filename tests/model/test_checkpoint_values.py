"""Values in a checkpoint that are wrong or contradict each other: named in one line, or read as they are meant."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.model.architecture import beyond_context
from pspo_jax.model.huggingface.json_files import check_side_files
from pspo_jax.model.huggingface.load import read_source
from tests.model.checkpoints import torch_logits, transformers, write_checkpoint
from tests.model.test_bad_checkpoints import ROPE, change_config, change_tensors, complaint
from tests.model.test_pretrained import load

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A tied Qwen2, and a Llama and a Mistral with heads of their own."""
    folder = tmp_path_factory.mktemp("originals")
    write_checkpoint(folder / "qwen2", "qwen2", tie_word_embeddings=True)
    write_checkpoint(folder / "llama", "llama")
    write_checkpoint(folder / "mistral", "mistral", sliding_window=None)
    return folder


@pytest.fixture
def copies(originals, tmp_path):
    return lambda name="qwen2": shutil.copytree(originals / name, tmp_path / name)


WRONG = [
    ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6"; it must be a number above 0'),
    ({"rms_norm_eps": None}, "rms_norm_eps=null"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN"),
    ({"torch_dtype": "bf16"}, 'torch_dtype="bf16"; it must be float32, float16 or bfloat16'),
    ({"dtype": 16}, "dtype=16"),
    ({"vocab_size": "97"}, 'vocab_size="97"; it must be a whole number above 0'),
    ({"vocab_size": None}, "vocab_size=null"),
    ({"hidden_size": [32]}, "hidden_size=[32]"),
    ({"hidden_size": 32.0}, "hidden_size=32.0"),
    ({"hidden_size": 30}, "hidden_size=30; it must be a multiple of num_attention_heads=4"),
    ({"num_hidden_layers": True}, "num_hidden_layers=true"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_attention_heads": {"q": 4}}, 'num_attention_heads={"q": 4}'),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3; it must be a divisor of num_attention_heads=4"),
    ({"head_dim": 7}, "head_dim=7; it must be even"),
    ({"intermediate_size": -48}, "intermediate_size=-48"),
    ({"max_position_embeddings": "256"}, 'max_position_embeddings="256"'),
    ({"tie_word_embeddings": "true"}, 'tie_word_embeddings="true"; it must be true or false'),
    ({"use_sliding_window": 1}, "use_sliding_window=1"),
    ({"hidden_act": 3}, "hidden_act=3; it must be text"),
    ({"layer_types": "full_attention"}, 'layer_types="full_attention"'),
    ({"layer_types": ["full_attention"] * 3}, "3 layer_types for num_hidden_layers=2"),
    ({"rope_scaling": [2.0]}, "rope_scaling=[2.0]; it must be an object"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, 'rope_scaling.factor="8"'),
    ({"rope_parameters": ROPE | {"rope_theta": 0}}, "rope_parameters.rope_theta=0"),
    ({"rope_parameters": ROPE | {"rope_type": None}}, "rope_parameters.rope_type=null"),
    ({"rope_theta": "1e4"}, 'rope_theta="1e4"'),
    ({"model_type": ["qwen2"]}, 'model_type=["qwen2"]'),
    ({"model_type": None}, "model_type=null"),
    ({"architectures": "Qwen2ForCausalLM"}, 'architectures="Qwen2ForCausalLM"'),
    ({"quantization_config": "gptq"}, 'quantization_config="gptq"'),
    ({"eos_token_id": "2"}, 'eos_token_id="2"'),
    ({"eos_token_id": [2, "3"]}, 'eos_token_id=[2, "3"]'),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}, "auto_map="),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_wrong_value_in_the_config_is_named(copies, fields, words):
    folder = copies()
    change_config(folder, **fields)
    text = complaint(folder)
    assert "config.json has" in text and words in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "is not a JSON object but [1, 2]"),
        (b'"qwen2"', "is not a JSON object"),
        (b"null", "is not a JSON object but null"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"", "is not JSON"),
        (b"{}", "has no model_type"),
    ],
)
def test_a_config_that_is_no_object_is_refused(copies, content, words):
    folder = copies()
    (folder / "config.json").write_bytes(content)
    assert words in complaint(folder)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0]}}, "'longrope'"),
        ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "rope"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config="),
        ("llama", {"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 96}, "has shape [97, 32], config.json implies [96, 32]"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1."),
        ("llama", {"head_dim": 4}, "k_proj.weight has shape [16, 32], config.json implies [8, 32]"),
        ("qwen2", {"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ],
)
def test_what_would_be_another_model_is_refused(copies, family, fields, words):
    folder = copies(family)
    change_config(folder, **fields)
    assert words in complaint(folder)


def test_a_wrong_id_in_the_generation_config_is_named(copies):
    folder = copies()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, None]}))
    assert "generation_config.json has eos_token_id=[2, null]; it must be a token's id or a list" in complaint(folder)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read: it is not JSON" in complaint(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"a": ')
    with pytest.raises(ConfigError, match=f"model.tokenizer=x: {name} cannot be read: it is not JSON"):
        check_side_files(tmp_path, "model.tokenizer=x")


def test_a_tensor_in_two_files_is_refused(copies):
    folder = copies()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")
    assert "stands in a.safetensors and in b.safetensors" in complaint(folder)


def test_two_models_in_one_folder_are_refused_and_files_without_an_index_do_not_count(copies):
    folder = copies()
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert read_source(ModelConfig(source=str(folder))).architecture.layers == 2
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "consolidated.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "holds model.safetensors and model.safetensors.index.json, which names other files" in complaint(folder)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_a_damaged_index_is_refused(copies, content):
    folder = copies()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in complaint(folder)


def add_head(folder, change):
    change_tensors(folder, lambda t: t.update({HEAD: change(t[EMBED].copy())}))


def test_another_head_than_the_tied_embedding_is_used_as_it_stands(copies):
    """As transformers does, whose logits are the oracle."""
    folder = copies()
    add_head(folder, lambda x: x[::-1].copy())
    model, params, source = load(folder)
    assert source.untied and not source.architecture.tied
    tokens = np.random.default_rng(0).integers(3, 97, (2, 9))
    ours = np.asarray(model.logits(params, model.hidden(params, jnp.asarray(tokens))))
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert np.abs(ours - torch_logits(torch_model, tokens)).max() <= 1e-4


def test_one_number_decides_whether_a_head_is_tied(copies):
    folder = copies()
    add_head(folder, lambda x: x)
    assert read_source(ModelConfig(source=str(folder))).architecture.tied
    add_head(folder, lambda x: x + np.eye(*x.shape, dtype=x.dtype)[:, ::-1] * 1e-3)
    assert not read_source(ModelConfig(source=str(folder))).architecture.tied
    add_head(folder, lambda x: np.ones((98, 32), np.float32))
    assert "lm_head.weight has shape [98, 32], config.json implies [97, 32]" in complaint(folder)


def test_numbers_that_are_not_finite_are_found_while_reading(copies):
    folder, layer = copies(), "model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[EMBED][3, 5], tensors[layer][-1, -1] = np.nan, -np.inf

    change_tensors(folder, damage)
    with pytest.raises(ConfigError, match=f"model.source=.*: NaN or infinity in {EMBED}, {layer}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_long_row_is_said(copies):
    folder = copies("llama")
    a = read_source(ModelConfig(source=str(folder))).architecture
    assert a.max_positions == 256 and beyond_context(a, 56, 200) is None
    assert "more than the 256 that model.source was made for" in beyond_context(a, 57, 200)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    change_config(folder, rope_parameters=yarn)
    assert read_source(ModelConfig(source=str(folder))).architecture.max_positions == 1024
