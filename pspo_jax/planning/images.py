"""The bytes that images take on a device, from shapes alone.

Where the vision tower trains, a batch holds patches. The tower runs at moments of its own, at which the activations of
a rollout or of a microbatch do not exist. Where it is frozen, a batch holds embeddings, and no tower runs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pspo_jax.config.schema import round_prompts
from pspo_jax.distributed.mesh import ROWS, UPDATE_ROWS, microbatch_size, size_along
from pspo_jax.training.setup import Setup
from pspo_jax.training.splitting import PROMPTS_ENCODED_AT_A_TIME


def of_batch(setup: Setup, prompts: int) -> dict[str, float]:
    """The images of so many prompts in the form in which batches hold them; none if the data has no images."""
    room = setup.room
    if room is None:
        return {}
    arrays = jax.eval_shape(lambda: room.empty(prompts, setup.task.train.tokens.shape[1]))
    name = "patches of images" if setup.embeddings is None else "embeddings of images"
    return {name: _bytes(arrays) / size_along(setup.mesh.shape, ROWS)}


def of_tower_in_rollout(setup: Setup) -> dict[str, float]:
    """The tower's arrays as it reads all prompts of a rollout at once; none if no tower runs."""
    if setup.embeddings is not None or setup.images is None:
        return {}
    prompts = round_prompts(setup.config) // setup.config.rollout.chunks
    each = size_along(setup.mesh.shape, UPDATE_ROWS)
    return {
        "the tower's activations, one block": prompts * _block(setup, trained=False) / each,
        "embeddings of images": prompts * _embeddings(setup) * _itemsize(setup) / each,
    }


def embeddings_in_update(setup: Setup) -> dict[str, float]:
    """Embeddings of a minibatch's images, and the float32 gradient that microbatches add up; none if no tower runs."""
    if setup.embeddings is not None or setup.images is None:
        return {}
    prompts = setup.config.rollout.prompts // setup.config.loss.minibatches
    size = prompts * _embeddings(setup) / size_along(setup.mesh.shape, UPDATE_ROWS)
    width = _itemsize(setup) + (4 if setup.model.trains_encoder else 0)
    return {"embeddings of images, and their gradient": size * width}


def of_tower_in_update(setup: Setup) -> dict[str, float]:
    """The tower's arrays as it is differentiated, after the last microbatch; none if it does not train."""
    if not setup.model.trains_encoder or setup.images is None:
        return {}
    vision = setup.architecture.vision
    assert vision is not None
    with jax.set_mesh(setup.mesh):
        prompts = setup.config.rollout.prompts // setup.config.loss.minibatches
        at_once = microbatch_size(prompts, PROMPTS_ENCODED_AT_A_TIME) / size_along(setup.mesh.shape, UPDATE_ROWS)
    inputs = vision.layers * _patches(setup) * vision.width * _itemsize(setup)
    return {
        "the tower's activations, each block's input": at_once * inputs,
        "the tower's activations, one block": at_once * _block(setup, trained=True),
    }


def table_bytes(setup: Setup) -> tuple[int, float] | None:
    """Number of distinct images, and the bytes of their embeddings on disk; None if no table is kept."""
    room = setup.embeddings
    if room is None:
        return None
    tokens: dict[str, int] = {}
    for images in (part.images for part in (setup.task.train, setup.task.heldout)):
        if images is not None:
            tokens |= {key: images.processor.num_tokens(images.grid(i)) for i, key in enumerate(images.keys)}
    return len(tokens), float(sum(tokens.values()) * room.width * jnp.dtype(room.dtype).itemsize)


def _itemsize(setup: Setup) -> int:
    """Bytes of a number of the tower's activations."""
    return jnp.dtype(setup.architecture.compute_dtype).itemsize


def _patches(setup: Setup) -> int:
    """Patches for which a prompt has room."""
    assert setup.images is not None
    return setup.images.windows * setup.images.layout.patches


def _embeddings(setup: Setup) -> int:
    """Numbers of the embeddings for which a prompt has room."""
    assert setup.images is not None
    return setup.images.windows * setup.images.layout.units * setup.architecture.width


def _block(setup: Setup, trained: bool) -> float:
    """Bytes of a block's activations for one prompt: its input with queries, keys and values.

    Args:
      trained: whether the block is differentiated, for which the numbers inside its MLP are needed too.
    """
    vision = setup.architecture.vision
    assert vision is not None
    inner = (2 if vision.gated else 1) * vision.mlp_width if trained else 0
    return float(_patches(setup) * (4 * vision.width + inner) * _itemsize(setup))


def _bytes(arrays: PyTree[jax.ShapeDtypeStruct]) -> int:
    """Bytes of whole arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
