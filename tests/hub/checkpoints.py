"""A small checkpoint with its tokenizer, as the files of a repository."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np

from pspo_jax.commands.export import write_model
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.model import transformer
from pspo_jax.training.setup import architecture_for
from tests.helpers import TINY


@functools.cache
def tiny_files() -> dict[str, bytes]:
    """Files of an exported policy of two blocks for the embedded task, with its tokenizer of 16 characters."""
    config = replace(Config(), TINY)
    _, _, architecture = architecture_for(config)
    shapes = jax.eval_shape(transformer(architecture).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.linspace(-0.5, 0.5, x.size, dtype=x.dtype).reshape(x.shape), shapes)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), config, params)
        return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}
