"""Images in sampling, scoring and updates: one run of the tower for each prompt, whatever shares it."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspo_jax.arrays.groups import groups_of
from pspo_jax.arrays.images import PatchLayout, empty_images
from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import ModelConfig
from pspo_jax.distributed.mesh import check_tower, make_mesh, params_shardings
from pspo_jax.losses.policy_loss import denominators
from pspo_jax.model.architecture import Rotary, Vision, built_in
from pspo_jax.model.transformer import transformer
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.distillation import prepare_lesson
from pspo_jax.training.scoring import Microbatch, microbatch_log_probs, rows_of, score
from pspo_jax.training.splitting import split_minibatches
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.update import loss_gradient, microbatch_loss
from tests.helpers import relative, slow_except, tiny_config
from tests.pictures import END, IMAGE, START, VIDEO, picture, prompts_of

B, G, T = 4, 2, 10
VISION = Vision(
    layers=2, width=16, heads=2, mlp_width=24, whole_image=(1,), layout=PatchLayout(2, 4), patch=2, channels=1, frames=2
)
VISION = dataclasses.replace(VISION, mean=(0.5,), std=(0.25,))
ONE = jnp.float32(1)


def policy(**fields):
    """(model, architecture, weights) of a small model with a tower."""
    a = built_in(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48, tied=False), 98)
    a = dataclasses.replace(
        a,
        rotaries=(Rotary(a.rotaries[0].frequencies, axes=(0, 1, 1, 2)),),
        vision=VISION,
        forbidden=(0, IMAGE, VIDEO, START, END),
        **fields,
    )
    whole = transformer(a.whole()).init(jax.random.key(0))
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), whole)
    return transformer(a), a, noisy


def batch(seed=0):
    rng = np.random.default_rng(seed)

    def image(down, right):
        return picture(VISION, rng, 2 * down, 2 * right)

    parts = [[3, image(2, 3), 2], [image(1, 5), 4], [2, image(2, 2), 1, image(3, 1), 3], [6]]
    found = prompts_of(VISION, rng, parts, windows=5)
    return jax.tree.map(jnp.asarray, dataclasses.replace(found.prompts, images=found.images))


@pytest.fixture(scope="module")
def made():
    """(model, architecture, weights, config, rollouts, rows with random advantages)."""
    model, a, weights = policy()
    config = tiny_config(rollout__prompts=B, rollout__group_size=G, rollout__max_new_tokens=T)
    settings = SamplingParams.of(config.rollout, [5, 6, 7, 8, 9, 10, 11, 12])
    rollouts = make_sampler(model, G, T, 0)(weights, batch(), jax.random.key(1), settings)
    advantages = jnp.asarray(np.random.default_rng(2).standard_normal((B, G)), jnp.float32)
    rows = rows_of(groups_of(rollouts, advantages, advantages, jnp.int32(0)), jnp.int32(0), config)
    return model, a, weights, config, rollouts, rows


def test_the_sampler_and_the_trainer_agree(made):
    model, _, weights, config, rollouts, rows = made
    assert len(np.unique(rollouts.lengths)) > 2
    found = jax.jit(lambda w, rows, images: score(model, w, rows, ONE, config, images=images)[0])
    right = found(weights, rows, rollouts.prompts.images)
    np.testing.assert_allclose(
        jnp.where(rows.mask, right, 0), rollouts.log_probs.reshape(rows.mask.shape), atol=1e-5, rtol=1e-5
    )
    flat = rows.images.replace(delta=jnp.zeros_like(rows.images.delta))
    wrong = found(weights, rows.replace(images=flat), rollouts.prompts.images)
    assert np.abs(jnp.where(rows.mask, right - wrong, 0)).max() > 1e-3


@pytest.mark.slow
def test_slots_draw_the_same_completions(made):
    model, _, weights, config, rollouts, _ = made
    settings = SamplingParams.of(config.rollout, [5, 6, 7, 8, 9, 10, 11, 12])
    again = make_sampler(model, G, T, 0, slots=3)(weights, batch(), jax.random.key(1), settings)
    np.testing.assert_array_equal(again.tokens, rollouts.tokens)
    np.testing.assert_allclose(again.log_probs, rollouts.log_probs, atol=1e-5)


@pytest.mark.parametrize("shares", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_rows_have_the_log_probs_of_padded_ones(made, shares):
    model, _, weights, config, rollouts, rows = made
    packed = replace(config, {"loss.packing": True, "loss.microbatch_rows": 4, "loss.share_prompts": shares})
    images = rollouts.prompts.images
    found, right = (
        jax.jit(lambda w, c=c: score(model, w, rows, ONE, c, images=images)[0])(weights) for c in (packed, config)
    )
    np.testing.assert_allclose(jnp.where(rows.mask, found, 0), jnp.where(rows.mask, right, 0), atol=1e-5)


@pytest.mark.slow
def test_a_teacher_reads_the_same_images_with_its_own_tower(made):
    """Its divergence and the log-probs of the drawn tokens, in padded and in packed rows."""
    model, _, weights, config, rollouts, rows = made
    images, teacher = rollouts.prompts.images, jax.tree.map(lambda x: 1.2 * x, weights)
    padded = replace(config, {"teacher.divergence": "jsd"})
    packed = replace(padded, {"loss.packing": True, "loss.microbatch_rows": 4})

    def found(c):
        lesson = prepare_lesson(model, model, teacher, rows, ONE, c, images)
        more = {"images": images, "divergence": lesson.teach(images)}
        return loss_gradient(model, lambda w, _: w, weights, lesson.rows, ONE, c, denominators(rows), **more)

    (grads, metrics, mismatch, _), other = jax.jit(lambda: found(padded))(), jax.jit(lambda: found(packed))()
    assert relative(other[0], grads) < 1e-4 and float(metrics.loss) > 1e-3
    assert float(other[1].loss) == pytest.approx(float(metrics.loss), rel=1e-4)
    of_teacher = score(model, teacher, rows, ONE, config, images=images)[0]
    kl = jnp.where(rows.mask, rows.old_log_probs - of_teacher, 0).sum()
    for one in (mismatch, other[2]):
        assert float(one.teacher_kl) == pytest.approx(float(kl), rel=1e-4)


@pytest.fixture(scope="module")
def in_one_stage(made):
    """The gradient of all rows at once, straight through the tower."""
    model, _, weights, config, rollouts, rows = made
    total = denominators(rows)

    def loss(weights):
        embeddings = model.encode_images(weights, rollouts.prompts.images)
        return microbatch_loss(model, weights, Microbatch(0, rows, None, None), ONE, config, total, embeddings)[0]

    return jax.jit(jax.grad(loss))(weights)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="one microbatch", marks=pytest.mark.slow),
        pytest.param({"loss.microbatch_rows": 2}, id="four microbatches", marks=pytest.mark.slow),
        pytest.param({"loss.packing": True, "loss.microbatch_rows": 4}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_in_two_stages_is_that_in_one(made, in_one_stage, fields, monkeypatch):
    monkeypatch.setattr("pspo_jax.training.splitting.PROMPTS_ENCODED_AT_A_TIME", 2)
    model, _, weights, config, rollouts, rows = made
    images, total, c = rollouts.prompts.images, denominators(rows), replace(config, fields)
    found = jax.jit(lambda w, images: loss_gradient(model, lambda w, _: w, w, rows, ONE, c, total, images=images)[0])(
        weights, images
    )
    assert relative(found, in_one_stage) < 1e-6
    assert relative(found["vision"], in_one_stage["vision"]) < 5e-6
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(found["vision"]["layers"])) > 0


def test_minibatches_keep_the_images_of_their_rows(made):
    model, _, weights, config, rollouts, rows = made
    images = rollouts.prompts.images
    parts, of_parts = split_minibatches(rows, images, 2, G)

    @jax.jit
    def log_probs(weights, part, images):
        embeddings = model.encode_images(weights, images)
        alone = Microbatch(0, part, None, None)
        found = microbatch_log_probs(model, weights, alone, ONE, config, embeddings=embeddings)[0]
        return jnp.where(part.mask, found, 0)

    right = rollouts.log_probs.reshape(B, G, T)
    for i in range(2):
        part, part_images = jax.tree.map(lambda x, i=i: x[i], (parts, of_parts))
        found = log_probs(weights, part, part_images)
        np.testing.assert_allclose(found, right[i::2].reshape(-1, T), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("freezes", "replay"), [(True, "none"), (False, "none"), (False, "popo"), (False, "aper")])
def test_a_step_trains_the_tower_unless_it_is_frozen(made, freezes, replay):
    _, _, whole, config, rollouts, _ = made
    model = policy(freezes_vision=freezes)[0]
    fields = {"replay.extra": 2} if replay == "aper" else {}
    config = replace(config, {"loss.minibatches": 2, "loss.kl_coef": 0.05, "replay.name": replay} | fields)
    frozen = {"vision": whole["vision"]} if freezes else None
    params = {name: x for name, x in whole.items() if not (freezes and name == "vision")}
    algorithm, optimizer = build(config), optax.sgd(0.5)
    longest = rollouts.prompts.tokens.shape[1]
    room = empty_images(1, longest, 5, VISION.patch_numbers, VISION.layout)
    state = init_state(params, optimizer, algorithm, config, 40, longest, jax.random.key(0), frozen, images=room)
    before = jax.device_get(state.weights)
    rewards = jnp.asarray(np.random.default_rng(3).integers(0, 2, (B, G)), jnp.float32)
    step = make_train_step(model, optimizer, algorithm, config)
    after, metrics = step(state, rollouts, rewards)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["skipped_updates"]) == 0
    now = jax.device_get(after.weights)
    if freezes:
        assert isinstance(now, SplitParams) and relative(now.frozen, before.frozen) == 0
        assert relative(now.trained, before.trained) > 1e-4
    else:
        leaves = zip(jax.tree.leaves(now["vision"]), jax.tree.leaves(before["vision"]), strict=True)
        assert min(np.abs(x - y).max() for x, y in leaves) > 0


MESHES = (
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "loss.microbatch_rows": 4},
    {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2, "loss.packing": True},
    {"mesh.data": 2, "mesh.context": 2, "mesh.tensor": 2, "loss.microbatch_rows": 4},
    {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "loss.packing": True, "loss.share_prompts": False},
    {"mesh.data": 1, "mesh.context": 4, "mesh.tensor": 2},
)


@pytest.mark.parametrize("fields", slow_except(MESHES[:1], MESHES), ids=str)
def test_eight_devices_do_what_one_does(made, in_one_stage, fields, capfd):
    """Every matrix of the tower is divided by all axes that split weights; log-probs and gradients are those of one."""
    model, a, weights, config, rollouts, rows = made
    c, images, total = replace(config, fields), rollouts.prompts.images, denominators(rows)
    mesh = make_mesh(c, a)
    split = jax.device_put(weights, params_shardings(mesh, weights, model.axes))
    for name, x in split["vision"]["layers"].items():
        parts = x.size // math.prod(x.sharding.shard_shape(x.shape))
        bias_or_norm = c.mesh.tensor if name in ("qkv_bias", "gate_bias", "up_bias") else 1
        matrix = (c.mesh.fsdp or 1) * c.mesh.context * c.mesh.tensor
        assert parts == (bias_or_norm if "bias" in name or "norm" in name else matrix), name

    @jax.jit
    def log_probs_and_gradient(w):
        found = score(model, w, rows, ONE, c, images=images)[0]
        return found, loss_gradient(model, lambda w, _: w, w, rows, ONE, c, total, images=images)[0]

    with jax.set_mesh(mesh):
        log_probs, gradient = jax.device_get(log_probs_and_gradient(split))
    right = rollouts.log_probs.reshape(rows.mask.shape)
    np.testing.assert_allclose(np.where(rows.mask, log_probs, 0), np.where(rows.mask, right, 0), atol=1e-5)
    assert relative(gradient, in_one_stage) < 1e-5
    assert relative(gradient["vision"], in_one_stage["vision"]) < 1e-5
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("fields", MESHES, ids=str)
def test_eight_devices_draw_what_one_draws(made, fields):
    model, a, weights, config, rollouts, _ = made
    mesh = make_mesh(replace(config, fields), a)
    split = jax.device_put(weights, params_shardings(mesh, weights, model.axes))
    settings = SamplingParams.of(config.rollout, [5, 6, 7, 8, 9, 10, 11, 12])
    with jax.set_mesh(mesh):
        again = make_sampler(model, G, T, 0)(split, batch(), jax.random.key(1), settings)
    np.testing.assert_array_equal(again.tokens, rollouts.tokens)
    np.testing.assert_allclose(again.log_probs, rollouts.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh.fsdp": 3, "mesh.data": 1}, "mesh.fsdp x mesh.context=3: does not divide width=16 of the vision tower"),
        ({"mesh.tensor": 4, "mesh.data": 1}, "mesh.tensor=4: does not divide heads=2 of the vision tower; 2 would"),
    ],
)
def test_a_mesh_that_does_not_divide_the_tower_is_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_tower(replace(tiny_config(), fields), VISION)
