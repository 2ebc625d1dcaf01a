"""The table of a frozen tower's embeddings: it stands for the tower, is kept on disk, and leaves no tower in a step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.groups import groups_of
from pspo_jax.arrays.images import ImageEmbeddings, ImageWindows
from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.defaults import replace
from pspo_jax.data.image_batches import embedding_room, gather, image_room
from pspo_jax.data.images.processor import ImageProcessor
from pspo_jax.data.images.prompt_images import PromptImages, first_of
from pspo_jax.data.task import PromptDataset
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.losses.policy_loss import denominators
from pspo_jax.model.transformer import transformer
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.system.progress import Progress
from pspo_jax.system.storage import StorageError
from pspo_jax.training.algorithm import build
from pspo_jax.training.image_table import fill
from pspo_jax.training.scoring import rows_of, score
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.update import loss_gradient
from tests.helpers import relative, tiny_config
from tests.pictures import IMAGE, picture, prompts_of
from tests.training.test_images import VISION, B, G, T, policy

ONE = jnp.float32(1)
ROWS, WEIGHT = np.arange(B, dtype=np.int32), np.ones(B, np.float32)
STOP = [5, 6, 7, 8, 9, 10, 11, 12]


def dataset(seed=0):
    """Four prompts: two with an image, one with two images, one of which is the first prompt's, and one with none."""
    rng = np.random.default_rng(seed)
    a, b, c = (picture(VISION, rng, 2 * down, 2 * right) for down, right in ((2, 3), (1, 5), (2, 2)))
    found = prompts_of(VISION, rng, [[3, a, 2], [b, 4], [2, c, 1, a, 3], [6]])
    every = [a, b, c, a]
    images = PromptImages(
        first_of([len(of) for of in found.pictures]),
        np.array([(x.rows, x.columns) for x in every], np.int32),
        [f"image {'abca'[i]}" for i in range(4)],
        [x.patches for x in every].__getitem__,
        ImageProcessor(patch_size=2, merge_size=2),
        IMAGE,
    )
    return PromptDataset(found.prompts.tokens, found.prompts.lengths, ["1"] * B, images=images)


class Table:
    """A small frozen policy, its data, and calls of `fill`."""

    def __init__(self, folder, **fields):
        self.model, self.architecture, whole = policy(freezes_vision=True, **fields)
        self.frozen = {"vision": whole["vision"]}
        self.params = {name: x for name, x in whole.items() if name != "vision"}
        self.prompts, self.folder, self.lines = dataset(), folder, []
        self.config = tiny_config(rollout__prompts=B, rollout__group_size=G, rollout__max_new_tokens=T, mesh__data=1)
        self.patches = image_room(VISION, self.prompts)
        self.empty = embedding_room(self.patches, self.architecture.width, "float32", self.prompts)

    def weights(self):
        return merge_params(self.params, self.frozen)

    def fill(self, weights=None, mesh=None, more=()):
        """(the filled room, how many images were computed)"""
        mesh = make_mesh(self.config) if mesh is None else mesh
        progress = Progress(enabled=False, quiet=True)
        progress.say = self.lines.append
        weights = self.weights() if weights is None else weights
        with jax.set_mesh(mesh):
            made = self.empty, self.model, self.architecture, weights, mesh, [self.prompts, *more]
            room = fill(*made, self.folder, progress)
        return room, int(self.lines[-1].split(" of which")[0].split()[-1].replace(",", ""))

    def batch(self, room):
        return jax.tree.map(jnp.asarray, gather(self.prompts, ROWS, WEIGHT, room))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return Table(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def filled(table):
    room, computed = table.fill()
    assert computed == 3  # one of the four images occurs twice
    return room


@pytest.fixture(scope="module")
def rolled_out(table, filled):
    """Rollouts of the same keys on patches and on embeddings, and random advantages."""
    sample = make_sampler(table.model, G, T, 0)
    settings = SamplingParams.of(table.config.rollout, STOP)
    return [sample(table.weights(), table.batch(room), jax.random.key(1), settings) for room in (table.patches, filled)]


def rows(table, rollouts: Rollouts):
    advantages = jnp.asarray(np.random.default_rng(2).standard_normal((B, G)), jnp.float32)
    return rows_of(groups_of(rollouts, advantages, advantages, jnp.int32(0)), jnp.int32(0), table.config)


def test_a_batch_holds_no_patch_and_the_rollouts_are_the_same(table, rolled_out):
    of_patches, of_table = rolled_out
    assert isinstance(of_patches.prompts.images, ImageWindows)
    images = of_table.prompts.images
    assert isinstance(images, ImageEmbeddings) and not any(x.dtype == jnp.uint8 for x in jax.tree.leaves(images))
    # As many as the longest prompt's images have, and not as many as windows have room for.
    assert images.embeddings.shape == (B, 10, table.architecture.width)
    np.testing.assert_array_equal(of_table.tokens, of_patches.tokens)
    # Processors differ in the last bits of float32: on one, a log-prob of -5 is off by four of its units.
    np.testing.assert_allclose(of_table.log_probs, of_patches.log_probs, rtol=1e-6, atol=1e-6)


def test_each_token_has_the_embedding_that_the_tower_gives_it(table, filled):
    of_patches, of_table = (table.batch(room).images for room in (table.patches, filled))
    encoded = jax.jit(table.model.encode_images)(table.weights(), of_patches)
    for name in ("positions", "delta"):
        np.testing.assert_array_equal(getattr(of_patches, name), getattr(of_table, name))
    is_image = np.asarray(of_patches.unit) >= 0
    np.testing.assert_array_equal(is_image, np.asarray(of_table.unit) >= 0)
    for i in range(B):
        right = np.asarray(encoded[i])[np.asarray(of_patches.unit[i])[is_image[i]]]
        found = np.asarray(of_table.embeddings[i])[np.asarray(of_table.unit[i])[is_image[i]]]
        np.testing.assert_allclose(found, right, atol=1e-6 * np.abs(encoded).max())
    assert is_image.sum(axis=1).tolist() == [6, 5, 10, 0]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"loss.microbatch_rows": 2}, id="four microbatches"),
        pytest.param({"loss.packing": True, "loss.microbatch_rows": 4}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_frozen_by_table_is_frozen_in_the_step(table, rolled_out, fields):
    """Log-probs and gradients of the same rows, on embeddings and on patches."""
    config, batch = replace(table.config, fields), rows(table, rolled_out[0])
    total = denominators(batch)

    @jax.jit
    def found(params, batch, images):
        log_probs = score(table.model, merge_params(params, table.frozen), batch, ONE, config, images=images)[0]
        weights = lambda p, _: merge_params(p, table.frozen)  # noqa: E731
        grads = loss_gradient(table.model, weights, params, batch, ONE, config, total, images=images)[0]
        return jnp.where(batch.mask, log_probs, 0), grads

    (log_probs, grads), (right_log_probs, right) = (
        found(table.params, batch.replace(images=rows(table, rollouts).images), rollouts.prompts.images)
        for rollouts in reversed(rolled_out)
    )
    assert relative(log_probs, right_log_probs) < 1e-6
    assert relative(grads, right) < 1e-6
    other = rolled_out[1].prompts.images
    other = dataclasses.replace(other, embeddings=other.embeddings[::-1])
    assert (
        relative(found(table.params, batch.replace(images=rows(table, rolled_out[1]).images), other)[1], right) > 1e-3
    )


def lowered_step(table, room, **fields):
    """The traced step."""
    config = replace(table.config, fields)
    algorithm, optimizer = build(config), optax.sgd(0.5)
    longest = table.prompts.tokens.shape[1]
    empty = room.empty(1, longest)
    state = jax.eval_shape(
        lambda p: init_state(
            p, optimizer, algorithm, config, 40, longest, jax.random.key(0), table.frozen, images=empty
        ),
        table.params,
    )
    settings = SamplingParams.of(config.rollout, STOP)
    rollouts = jax.eval_shape(
        make_sampler(table.model, G, T, 0), table.weights(), table.batch(room), jax.random.key(1), settings
    )
    step = make_train_step(table.model, optimizer, algorithm, config)
    return step.lower(state, rollouts, jax.ShapeDtypeStruct((B, G), jnp.float32))


POPO = {"replay.name": "popo", "loss.kl_coef": 0.05, "loss.minibatches": 2}


@pytest.mark.parametrize(
    ("fields", "compiles"), [({}, False), pytest.param(POPO, True, marks=pytest.mark.slow)], ids=["traced", "compiled"]
)
def test_a_step_holds_no_tower_and_no_pixels(table, filled, tmp_path, fields, compiles):
    """The products of a step do not depend on the tower: they are those of a tower of three times as many blocks."""
    deep = Table(tmp_path)
    deep.architecture = dataclasses.replace(deep.architecture, vision=dataclasses.replace(VISION, layers=6))
    deep.model = transformer(deep.architecture)
    deep.frozen = {"vision": transformer(deep.architecture.whole()).init(jax.random.key(0))["vision"]}
    flops = {}
    for name, of, room in (("table", table, filled), ("deep", deep, filled), ("patches", table, table.patches)):
        program = lowered_step(of, room, **fields)
        program = program.compile() if compiles else program
        flops[name] = program.cost_analysis()["flops"]
        assert ("u8[" in program.as_text() or "xui8>" in program.as_text()) == (name == "patches")
    assert flops["table"] == flops["deep"] < flops["patches"]


def entries(folder):
    return sorted(folder.glob("image_embeddings/*/*/*.bin"))


def test_the_table_is_kept_and_what_is_damaged_is_computed_again(tmp_path):
    table = Table(tmp_path)
    room, computed = table.fill()
    right, files = table.batch(room).images, entries(tmp_path)
    assert computed == len(files) == 3 and "3 distinct" in table.lines[-1] and str(tmp_path) in table.lines[-1]
    assert table.fill()[1] == 0
    whole = [path.read_bytes() for path in files]
    files[0].write_bytes(whole[0][:-4])
    files[1].write_bytes(whole[1][:9] + bytes([whole[1][9] ^ 1]) + whole[1][10:])
    with pytest.raises(StorageError, match="is lost or damaged; the same command computes it again"):
        table.batch(room)
    again, computed = table.fill()
    assert computed == 2 and [path.read_bytes() for path in files] == whole
    # The file of another image in its place is not believed either.
    files[2].write_bytes(whole[1])
    assert table.fill()[1] == 1
    jax.tree.map(np.testing.assert_array_equal, table.batch(again).images, right)
    mapped = again.table.read("image a", 6)
    assert isinstance(mapped.base, np.memmap) or isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable


def test_another_tower_or_type_has_a_table_of_its_own_and_language_weights_do_not_matter(tmp_path):
    table = Table(tmp_path)
    first = table.batch(table.fill()[0]).images.embeddings
    other = merge_params(jax.tree.map(lambda x: x + 1, table.params), table.frozen)
    assert table.fill(weights=other)[1] == 0
    moved = jax.tree.map(lambda x: x, table.frozen)
    moved["vision"]["merger_down_bias"] = moved["vision"]["merger_down_bias"] + 1
    room, computed = table.fill(weights=merge_params(table.params, moved))
    assert computed == 3 and np.abs(table.batch(room).images.embeddings - first).max() > 0.5
    table.architecture = dataclasses.replace(table.architecture, compute_dtype="bfloat16")
    table.empty = table.empty._replace(dtype="bfloat16")
    room, computed = table.fill()
    assert computed == 3 and table.batch(room).images.embeddings.dtype == jnp.bfloat16


def test_the_control_reads_the_embeddings_of_other_images(table, filled):
    prompts = table.prompts
    images = prompts.images._replace(keys=["image c", *prompts.images.keys[1:]])
    # Equal grids alone are exchanged: an image of another size has another number of tokens.
    with pytest.raises(StorageError):
        gather(prompts._replace(images=images), ROWS, WEIGHT, filled)
    same = prompts.images.exchanged(0)
    found = gather(prompts._replace(images=same), ROWS, WEIGHT, filled)
    jax.tree.map(np.testing.assert_array_equal, found.images, gather(prompts, ROWS, WEIGHT, filled).images)


def test_two_images_with_one_key_are_refused(table):
    images = table.prompts.images
    clash = images._replace(keys=["image b", "image d", *images.keys[2:]])
    other = table.prompts._replace(images=clash)
    with pytest.raises(ValueError, match="two different images of the data have the key image b"):
        table.fill(more=[other])


def test_embeddings_are_refused_where_the_tower_trains(table, rolled_out):
    model = policy()[0]
    with pytest.raises(ValueError, match="this model's encoder trains; give it patches"):
        images = rolled_out[1].prompts.images
        score(model, table.weights(), rows(table, rolled_out[1]), ONE, table.config, images=images)


def test_a_room_without_its_table_makes_no_batch(table):
    with pytest.raises(ValueError, match="the embeddings of images are not computed yet"):
        table.batch(table.empty)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"mesh__data": 2, "mesh__fsdp": 2}, {"mesh__data": 1, "mesh__context": 2}])
def test_devices_share_the_work(tmp_path, table, filled, axes):
    """A table computed by several devices, with weights split over them, is that of one."""
    mine = Table(tmp_path)
    config = tiny_config(rollout__prompts=B, rollout__group_size=G, rollout__max_new_tokens=T, **axes)
    mesh, axes_of = make_mesh(config), (mine.model.axes, mine.model.frozen_axes)
    parts = zip((mine.params, mine.frozen), axes_of, strict=True)
    split = [jax.device_put(x, params_shardings(mesh, x, of)) for x, of in parts]
    room, computed = mine.fill(weights=merge_params(*split), mesh=mesh)
    assert computed == 3
    found, right = (table.batch(x).images.embeddings for x in (room, filled))
    np.testing.assert_allclose(found, right, atol=1e-5)
