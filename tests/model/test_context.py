"""How many positions a checkpoint was made for, and what is said of rows that are longer."""

import dataclasses
from types import SimpleNamespace

import pytest

from pspo_jax.model.architecture import beyond_context
from pspo_jax.model.huggingface.families import max_positions
from tests.helpers import tiny_policy


@pytest.mark.parametrize(
    ("limit", "rotary", "length"),
    [
        (4096, None, 4096),
        (4096, {"rope_type": "default"}, 4096),
        (131_072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131_072),
        (32_768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        (163_840, {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163_840),
        (2048, {"rope_type": "linear", "factor": 2.0}, 4096),
        (32_768, {"full_attention": {"rope_type": "linear", "factor": 8.0}}, 32_768),
        (None, None, None),
    ],
)
def test_positions_that_a_checkpoint_was_made_for(limit, rotary, length):
    assert max_positions(SimpleNamespace(max_position_embeddings=limit, rope_parameters=rotary)) == length
    assert max_positions(SimpleNamespace()) is None


def test_rows_beyond_the_context_are_one_line():
    _, _, a = tiny_policy()
    assert beyond_context(a, 60, 4000) is None
    a = dataclasses.replace(a, max_positions=100)
    assert beyond_context(a, 60, 40) is None
    line = beyond_context(a, 100, 4000)
    assert line and "rollout.max_new_tokens=4000" in line and "100 + 4,000 tokens" in line
