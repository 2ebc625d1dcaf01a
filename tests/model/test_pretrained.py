"""Reading checkpoints: seven families against torch, on random configurations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.arrays.state import Prompts
from pspo_jax.config.schema import ModelConfig
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.model.huggingface.load import load_params, read_source
from pspo_jax.model.transformer import transformer
from pspo_jax.model.weights import table
from pspo_jax.rollout.sampler import make_sampler
from pspo_jax.rollout.token_loop import SamplingParams
from tests.helpers import tiny_config
from tests.model.checkpoints import torch_greedy, torch_logits, write_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
ONE_KV, ALL_KV = {"num_key_value_heads": 1}, {"num_key_value_heads": 4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

CONFIGS = {
    "qwen2": [
        TIED,
        UNTIED | ONE_KV,
        ALL_KV | {"rope_parameters": YARN},
        WINDOW,
        {"rope_theta": 1e6, "num_hidden_layers": 1},
    ],
    "qwen3": [
        TIED | {"head_dim": 16},
        UNTIED | {"head_dim": 4} | ONE_KV,
        {"attention_bias": True, "head_dim": 8},
        WINDOW | ALL_KV | {"head_dim": 8},
        {"head_dim": 8, "rope_parameters": YARN | {"beta_fast": 16, "attention_factor": 1.2}},
    ],
    "llama": [
        {"rope_parameters": LLAMA3},
        TIED | ONE_KV | {"rope_parameters": LLAMA3 | {"factor": 32.0}},
        ALL_KV | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        {"head_dim": 16, "rope_parameters": LINEAR},
        {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ],
    "mistral": [
        {"sliding_window": None},
        {"sliding_window": 5},
        {"sliding_window": 3, "head_dim": 16} | ONE_KV,
        TIED | ALL_KV | {"sliding_window": 12},
        {"sliding_window": None, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ],
    "smollm3": [
        {"num_hidden_layers": 5},
        {"no_rope_layers": [0, 1]} | UNTIED,
        {"no_rope_layers": [1, 0], "attention_bias": True} | ONE_KV,
        {"no_rope_layers": [1, 1], "mlp_bias": True} | ALL_KV,
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4},
    ],
    "olmo2": [{}, TIED | ONE_KV, ALL_KV, {"attention_bias": True}, {"rope_parameters": LINEAR, "rms_norm_eps": 1e-3}],
    "gemma3_text": [
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "num_hidden_layers": 6},
        {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
        {"head_dim": 8, "layer_types": ["sliding_attention"] * 2, "sliding_window": 100} | ONE_KV,
        {"head_dim": 4, "query_pre_attn_scalar": 9, "layer_types": ["full_attention"] * 2} | ALL_KV | UNTIED,
        {
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 3,
            "rope_parameters": {
                "full_attention": LINEAR | {"factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ],
}
USUAL = {
    "qwen2": (0,),
    "qwen3": (4,),
    "llama": (3,),
    "mistral": (2,),
    "smollm3": (2,),
    "olmo2": (1,),
    "gemma3_text": (0, 4),
}
"""Cases of each family that hold each rotary scaling, window and kind of head; the others are slow tests. A family that
is not listed runs all of its cases."""
CASES = [
    pytest.param(
        family, fields, id=f"{family}-{i}", marks=[] if i in USUAL.get(family, range(len(each))) else pytest.mark.slow
    )
    for family, each in CONFIGS.items()
    for i, fields in enumerate(each)
]


def load(folder, mesh=None, **fields):
    """(model, params, source) of a checkpoint on one device or a mesh."""
    source = read_source(ModelConfig(source=str(folder), **fields))
    mesh = mesh or make_mesh(tiny_config(mesh__data=1))
    weights, model = table(source.architecture), transformer(source.architecture)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = load_params(source, weights, params_shardings(mesh, shapes, model.axes), source.architecture.param_dtype)
    return model, params, source


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_logits_and_greedy_tokens_are_torchs(tmp_path, family, fields):
    torch_model = write_checkpoint(tmp_path, family, seed=len(str(fields)), **fields)
    model, params, _ = load(tmp_path)
    rng = np.random.default_rng(0)
    lengths = np.array([16, 9, 1, 12])
    tokens = np.where(np.arange(16) < lengths[:, None], rng.integers(3, 97, (4, 16)), 0)

    got = jax.jit(lambda p, x: model.logits(p, model.hidden(p, x)))(params, jnp.asarray(tokens))
    want = torch_logits(torch_model, tokens)  # causal: padding on the right changes no real token
    real = np.arange(16) < lengths[:, None]
    assert np.abs(want[real]).max() > 1
    assert np.abs(np.asarray(got) - want)[real].max() <= 1e-4

    sample = make_sampler(model, 1, 32, 0)
    settings = SamplingParams(0.0, 1.0, 0, jnp.array([-1]), 32)
    prompts = Prompts(jnp.arange(4), jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.ones(4))
    rollouts = sample(params, prompts, jax.random.key(0), settings)
    for left in (True, False):
        np.testing.assert_array_equal(rollouts.tokens[:, 0], torch_greedy(torch_model, tokens, lengths, 32, left))
