"""Features of prompts for `selection.predictor`: the hidden states that a policy has on them.

A prompt's summary is the mean of the model's final hidden states over its positions, and the last of them: 2 D numbers.
A prompt with images is read with them, so that prompts of one text with other images have other features.
Each is standardised over the prompts. If there are more than `MAX_FEATURES`, a seeded random matrix projects them to so
many, which keeps the inner products of prompts approximately. The projections are standardised again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import batch_sharding
from pspo_jax.model.interface import Model
from pspo_jax.model.vision import image_tokens
from pspo_jax.selection.predictor import MAX_FEATURES
from pspo_jax.training.splitting import encoded

SAMPLE = 4096
"""Largest number of prompts by which the summaries are standardised before they are projected."""


class ReadImages(Protocol):
    """The images of the prompts with these indices, laid out on the host."""

    def __call__(self, prompts: Int[np.ndarray, "b"], /) -> Images: ...


def feature_width(model: Model, weights: PyTree) -> int:
    """Number of features of a prompt, F.

    Args:
      weights: the weights that the model's functions take, or their ShapeDtypeStructs.
    """
    tokens, lengths = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    shape = jax.eval_shape(lambda w, t, n: summaries(model, w, t, n), weights, tokens, lengths).shape
    return min(int(shape[1]), MAX_FEATURES)


def summaries(
    model: Model,
    weights: PyTree,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    images: Images | None = None,
) -> Float[Array, "B 2*D"]:
    """The mean of each prompt's hidden states over its positions, and its last hidden state, in float32.

    Args:
      images: the images of the prompts; None = all prompts are text.
    """
    embeddings = encoded(model, weights, images)
    if images is None or embeddings is None:
        hidden = model.hidden(weights, tokens)
    else:
        hidden = model.hidden(weights, tokens, images=image_tokens(embeddings, images))
    hidden = hidden.astype(jnp.float32)
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    mean = jnp.where(real[..., None], hidden, 0).sum(axis=1) / lengths[:, None]
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([mean, last], axis=1)


def prompt_features(
    model: Model,
    weights: PyTree,
    tokens: Int[np.ndarray, "N P"],
    lengths: Int[np.ndarray, "N"],
    batch: int = 64,
    seed: int = 0,
    mesh: Mesh | None = None,
    report: Callable[[int, str], None] = lambda count, numbers: None,
    images: ReadImages | None = None,
) -> Float[np.ndarray, "N F"]:
    """The features of all prompts, each with mean 0 and variance 1, on the host, equal on every process.

    Args:
      weights: the weights that the model's functions take.
      tokens: the prompts' tokens, padded on the right: an array, or an object that is indexed like one.
      lengths: tokens of each prompt, at least 1.
      batch: prompts that are computed at a time; the mesh divides them.
      seed: seed of the random projection.
      mesh: the devices, which share a batch; None = JAX's default device.
      report: is called with the number of each batch's prompts, and with no words, once they are done.
      images: reads the images of prompts; None = all prompts are text.
    """
    rows = None if mesh is None else batch_sharding(mesh)
    program = jax.jit(lambda w, t, n, x: summaries(model, w, t, n, x), out_shardings=rows)

    def blocks(wanted: Int[np.ndarray, "n"]) -> Iterator[Float[np.ndarray, "b 2*D"]]:
        for start in range(0, len(wanted), batch):
            some = wanted[start : start + batch]
            # The last batch is filled with its last prompt, as all batches have one shape.
            full = np.pad(some, (0, batch - len(some)), mode="edge")
            of_batch = None if images is None else images(full)
            arrays = np.asarray(tokens[full], np.int32), np.asarray(lengths[full], np.int32), of_batch
            placed = arrays if rows is None else processes.to_global(arrays, rows)
            yield np.asarray(processes.to_host(program(weights, *placed)))[: len(some)]

    total = len(lengths)
    everyone = np.arange(total)
    sampled = everyone if total <= SAMPLE else np.linspace(0, total - 1, SAMPLE).astype(np.int64)
    sample = np.concatenate(list(blocks(sampled)))
    center, scale = _moments(sample)
    matrix = _projection(sample.shape[1], seed)
    parts: list[Float[np.ndarray, "b F"]] = []
    for block in [sample] if total <= SAMPLE else blocks(everyone):
        parts.append(((_finite(block) - center) / scale) @ matrix)
        report(len(block), "")
    projected = np.concatenate(parts)
    center, scale = _moments(projected)
    return ((projected - center) / scale).astype(np.float32)


def _projection(width: int, seed: int) -> Float[np.ndarray, "W F"]:
    """The matrix from summaries to features: the identity, or a random one if there are too many."""
    if width <= MAX_FEATURES:
        return np.eye(width)
    return np.random.default_rng(seed).standard_normal((width, MAX_FEATURES)) / np.sqrt(width)


def _moments(values: Float[np.ndarray, "n K"]) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """Mean and standard deviation of each column in float64; a column of equal numbers has the deviation 1."""
    values = _finite(values)
    center, scale = values.mean(axis=0), values.std(axis=0)
    return center, np.where(scale > 1e-6 * np.abs(center), scale, 1.0)


def _finite(values: Float[np.ndarray, "n K"]) -> Float[np.ndarray, "n K"]:
    """The values in float64; 0 stands for those that are not finite, as a model in 16 bits may have them."""
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
