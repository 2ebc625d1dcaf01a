"""The bytes of images in the memory plan, against the arrays of a small model."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from pspo_jax.arrays.images import ImageEmbeddings, ImageWindows
from pspo_jax.data.image_batches import gather
from pspo_jax.distributed.mesh import make_mesh
from pspo_jax.planning import images, memory
from pspo_jax.training import setup as training_setup
from pspo_jax.training.setup import prepare
from pspo_jax.training.splitting import split_images
from tests.helpers import tiny_config

PROMPTS, MINIBATCHES = 32, 2


@pytest.fixture(scope="module")
def trained():
    fields = {"task__image_widths": "24,40", "rollout__prompts": PROMPTS, "loss__minibatches": MINIBATCHES}
    replay = {"algorithm__name": "popo", "loss__microbatch_rows": 8, "rollout__chunks": 2}
    config = tiny_config(task__name="segments", mesh__data=1, **fields, **replay)
    return prepare(config, weights=False)


@pytest.fixture(scope="module")
def frozen(trained):
    architecture = dataclasses.replace(trained.architecture, freezes_vision=True)
    config, mesh, task = trained.config, trained.mesh, trained.task
    return training_setup._with_strategies(config, mesh, task, None, architecture)


def leaves_bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_tower_that_trains_has_patches_and_activations(trained):
    rows = np.arange(PROMPTS, dtype=np.int32)
    batch = gather(trained.task.train, rows, np.ones(PROMPTS, np.float32), trained.images).images
    assert isinstance(batch, ImageWindows)
    details = memory._details(trained)
    assert details["update"]["patches of images"] == leaves_bytes(batch)
    assert details["rollout"]["patches of images"] == leaves_bytes(batch) / 2
    minibatch = jax.tree.map(lambda x: x[: PROMPTS // MINIBATCHES], batch)
    with jax.set_mesh(make_mesh(trained.config)):
        part = jax.tree.map(lambda x: x[0], split_images(minibatch))
    params = trained.abstract.params
    encode = trained.model.encode_images
    embeddings, pull = jax.eval_shape(
        lambda p: (encode(p, minibatch), jax.vjp(lambda p: encode(p, part), p)[1]), params
    )
    vision = trained.architecture.vision
    update, tower = details["update"], details["update, as the tower is differentiated"]
    assert update["embeddings of images, and their gradient"] == 2 * leaves_bytes(embeddings)
    kept = [x for x in jax.tree.leaves(pull) if x.shape[:2] == (vision.layers, 8) and x.shape[3:] == (vision.width,)]
    assert len(kept) == 1 and tower["the tower's activations, each block's input"] == leaves_bytes(kept)
    assert tower["gradients"] == leaves_bytes(params)
    assert "replay" in memory._residents(trained)


@pytest.mark.slow
def test_the_peak_is_that_of_the_largest_moment(trained):
    details = memory._details(trained)
    update, tower = details["update"], details["update, as the tower is differentiated"]
    # The compiler cannot do with less than the sum of what must exist at one moment.
    found = memory._residents(trained)
    peaks = memory._peaks(trained, found, details)
    assert all(peak.least <= peak.compiled for peak in peaks.values())
    assert peaks["update"].least - sum(found.values()) == max(sum(update.values()), sum(tower.values()))


def test_a_frozen_tower_has_embeddings_and_nothing_else(trained, frozen):
    details = memory._details(frozen)
    assert set(details) == {"rollout", "update"} and frozen.embeddings is not None
    assert not any("patches" in name or "tower" in name for parts in details.values() for name in parts)
    batch = frozen.room.empty(PROMPTS, frozen.task.train.tokens.shape[1])
    assert isinstance(batch, ImageEmbeddings) and batch.embeddings.shape == (PROMPTS, 15, 16)
    assert details["update"]["embeddings of images"] == leaves_bytes(batch)
    assert details["rollout"]["embeddings of images"] == leaves_bytes(batch) / 2
    tower = sum(x.size for x in jax.tree.leaves(frozen.abstract.frozen["vision"])) * 4
    assert memory._residents(frozen)["frozen base"] == tower
    sizes = [len(memory._decoded(setup.abstract.weights)) for setup in (trained, frozen)]
    assert sizes[0] == sizes[1] == len(jax.tree.leaves(frozen.abstract.params))
    count, size = images.table_bytes(frozen)
    every = [part.images for part in (frozen.task.train, frozen.task.heldout)]
    tokens = dict(pair for x in every for pair in zip(x.keys, x.tokens().tolist(), strict=True))
    assert (count, size) == (len(tokens), 4 * 16 * sum(tokens.values())) and images.table_bytes(trained) is None
