"""Small models and configs that several tests share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.arrays.state import Prompts
from pspo_jax.config.defaults import FOLLOWERS, flatten, replace
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config
from pspo_jax.model import built_in, transformer
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.interface import InitFn, Model

TINY = {
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.head_dim": 4,
    "model.mlp_width": 24,
    "task.train_prompts": 40,
    "task.heldout_prompts": 16,
    "rollout.prompts": 8,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 12,
    "sft.steps": 0,
}


def slow_except(kept: Sequence[Any], cases: Sequence[Any], several: bool = False) -> list[Any]:
    """Cases of a grid, of which those that are not kept are slow tests.

    Args:
      several: whether a case is a tuple of the values of several parameters.
    """
    return [
        case if case in kept else pytest.param(*(case if several else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def tiny_config(**fields: Any) -> Config:
    """A config of tiny shapes; keyword `a__b` sets field a.b.

    All else is as in the embedded task, whatever the task is: float32, and rates that small models learn with.
    """
    plain = {name: value for name, value in flatten(Config()).items() if name in FOLLOWERS}
    return resolve(replace(Config(), plain | TINY | {k.replace("__", "."): v for k, v in fields.items()}))


def tiny_policy(
    config: Config | None = None, vocab_size: int = 16, forbidden: tuple[int, ...] = (14, 15), **fields: Any
):
    """(policy, params, architecture) of the built-in transformer; the params are new arrays at each call."""
    config = config or tiny_config()
    a = built_in(dataclasses.replace(config.model, **fields), vocab_size, forbidden)
    model, init = compiled_policy(a)
    return model, init(jax.random.key(1)), a


@functools.cache
def compiled_policy(architecture: Architecture) -> tuple[Model, InitFn]:
    """A policy and its `init`, compiled: tests of one architecture share them."""
    model = transformer(architecture)
    return model, jax.jit(model.init)


def random_prompts(b: int, p: int, vocab: int = 13, seed: int = 0) -> Prompts:
    """Prompts of random tokens and lengths 1..p, padded with 14."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, p + 1, b)
    lengths[0] = p
    tokens = np.where(np.arange(p) < lengths[:, None], rng.integers(0, vocab, (b, p)), 14)
    return Prompts(jnp.arange(b), jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.ones(b))


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b| over all leaves of two trees."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    num = sum(float(np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2)) for x, y in pairs)
    den = sum(float(np.sum(np.asarray(y, np.float64) ** 2)) for _, y in pairs)
    return (num / max(den, 1e-30)) ** 0.5
