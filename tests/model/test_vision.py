"""Models with a vision tower against torch, on random configurations and images of unequal sizes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.model.architecture import Architecture
from pspo_jax.model.interface import MASKED, Model
from pspo_jax.model.transformer import transformer
from pspo_jax.model.vision import encode_images, image_tokens
from pspo_jax.model.weights import entries, table, to_hf
from pspo_jax.rollout.sampler import make_sampler
from pspo_jax.rollout.token_loop import SamplingParams
from tests.model.checkpoints import torch
from tests.model.test_pretrained import load
from tests.model.visual_checkpoints import (
    pixel_values,
    torch_greedy,
    torch_inputs,
    torch_logits,
    write_visual_checkpoint,
)
from tests.pictures import END, IMAGE, START, VIDEO, VisualPrompts, picture, prompts_of

SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
CASES = {
    "windows": ("qwen2_5_vl", {}, {}, True),
    "untied": ("qwen2_5_vl", {"num_key_value_heads": 1}, {"fullatt_block_indexes": [0, 2], "window_size": 24}, False),
    "no_whole_image": ("qwen2_5_vl", {}, {"fullatt_block_indexes": [], "window_size": 8}, True),
    "whole_images": ("qwen2_5_vl", {}, {"fullatt_block_indexes": [0, 1, 2], "num_heads": 4}, True),
    "wide_heads": (
        "qwen2_5_vl",
        SECTIONS | {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"depth": 4, "fullatt_block_indexes": [3], "in_channels": 1, "temporal_patch_size": 1},
        True,
    ),
    "merge_of_three": ("qwen2_5_vl", {"rms_norm_eps": 1e-3}, {"spatial_merge_size": 3, "window_size": 24}, False),
    "qwen2_vl": ("qwen2_vl", {}, {}, True),
    "qwen2_vl_untied": ("qwen2_vl", {"num_key_value_heads": 4}, {"num_heads": 4, "mlp_ratio": 3, "depth": 2}, False),
}
"""For each case: model_type, fields of the language model, fields of the tower, whether the head is tied."""
USUAL = ("windows",)
COUNT = 32


def write(folder, case, seed=0):
    kind, text, tower, tied = CASES[case]
    return write_visual_checkpoint(folder, kind, seed, text, tower, tied)


def unequal(v, rng, windows=0):
    """Prompts with one image, none, and two; each image has another shape, and one is smaller than a window."""
    m = v.layout.merge

    def image(down, right):
        return picture(v, rng, m * down, m * right)

    parts = [[3, image(2, 3), 2], [image(1, 5), 4], [5], [2, image(2, 2), 1, image(4, 1), 3], [image(5, 5), 1]]
    return prompts_of(v, rng, parts, windows)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def logits_fn(model):
    """A jitted (params, tokens, images) -> logits."""

    @jax.jit
    def logits(params, tokens, images):
        seen = image_tokens(model.encode_images(params, images), images)
        return model.logits(params, model.hidden(params, tokens, images=seen))

    return logits


@pytest.mark.parametrize("case", [c if c in USUAL else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_tower_logits_and_greedy_tokens_are_torchs(tmp_path, case):
    torch_model = write(tmp_path, case, seed=len(case))
    model, params, source = load(tmp_path)
    a, rng = source.architecture, np.random.default_rng(len(case))
    v = a.vision
    batch = unequal(v, rng)
    images = on_device(batch.images)

    inputs = torch_inputs(v, batch)
    kept = {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"}
    positions, delta = torch_model.model.get_rope_index(**{k: x for k, x in inputs.items() if k in kept})
    for i, ids in enumerate(batch.tokens):
        np.testing.assert_array_equal(batch.images.positions[i, : len(ids)], positions[:, i, : len(ids)].T)
        assert batch.images.delta[i] == delta[i].item()

    embeddings = jax.jit(lambda params, images: encode_images(a, params, images))(params, images)
    for i, pictures in enumerate(batch.pictures):
        if pictures:
            pixels = torch.as_tensor(np.concatenate([pixel_values(v, x) for x in pictures]))
            grids = torch.as_tensor([[1, x.rows, x.columns] for x in pictures])
            with torch.no_grad():
                expected = torch_model.model.visual(pixels, grid_thw=grids).pooler_output.numpy()
            unit = batch.images.unit[i]
            np.testing.assert_allclose(embeddings[i][unit[unit >= 0]], expected, atol=1e-5)

    found = np.asarray(logits_fn(model)(params, batch.prompts.tokens, images))
    allowed = np.setdiff1d(np.arange(a.vocab_size), a.forbidden)
    for mine, expected in zip(found, torch_logits(torch_model, v, batch), strict=True):
        np.testing.assert_allclose(mine[: len(expected), allowed], expected[:, allowed], atol=1e-4)
    assert (found[..., list(a.forbidden)] == MASKED).all()

    prompts = on_device(dataclasses.replace(batch.prompts, images=batch.images))
    settings = SamplingParams(0.0, 1.0, 0, jnp.asarray([-1]), COUNT)
    drawn = make_sampler(model, 1, COUNT, 0)(params, prompts, jax.random.key(0), settings).tokens[:, 0]
    expected = torch_greedy(torch_model, v, batch, COUNT)
    np.testing.assert_array_equal(drawn, expected)
    assert len(np.unique(expected)) > 12, "greedy texts that repeat a few tokens show little"


class Case(NamedTuple):
    """The first case, whose compiled programs several tests use."""

    torch_model: Any
    model: Model
    params: Any
    architecture: Architecture
    batch: VisualPrompts
    logits: Any
    """Jitted (params, tokens, images) -> logits."""
    right: np.ndarray
    """The logits of the batch."""


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    torch_model = write(folder, "windows")
    model, params, source = load(folder)
    batch, logits = unequal(source.architecture.vision, np.random.default_rng(5), windows=12), logits_fn(model)
    right = np.asarray(logits(params, batch.prompts.tokens, batch.images))
    return Case(torch_model, model, params, source.architecture, batch, logits, right)


def test_wrong_images_and_positions_show(windows):
    batch, images, with_image = windows.batch, windows.batch.images, [0, 1, 3, 4]
    behind = np.asarray(batch.prompts.lengths) - 1

    def moved(logits=windows.logits, **wrong):
        """The largest change of the logits behind each prompt."""
        found = np.asarray(logits(windows.params, batch.prompts.tokens, images.replace(**wrong)))
        rows = np.arange(len(behind))
        return np.abs(found[rows, behind] - windows.right[rows, behind]).max(axis=1)

    places = np.broadcast_to(np.arange(images.positions.shape[1], dtype=np.int32)[:, None], images.positions.shape)
    other = np.random.default_rng(9).integers(0, 256, images.patches.shape, np.uint8)
    tower = dataclasses.replace(windows.architecture.vision, whole_image=())
    never_whole = logits_fn(transformer(dataclasses.replace(windows.architecture, vision=tower)))
    assert moved().max() == 0
    assert moved(positions=places)[with_image].min() > 1e-2
    assert moved(patches=other)[with_image].min() > 1e-2
    assert moved(patches=np.ascontiguousarray(images.patches[:, :, ::-1]))[with_image].min() > 1e-2
    assert moved(unit=np.minimum(images.unit, 0))[with_image].min() > 1e-2
    assert moved(never_whole)[[0, 1, 4]].min() > 1e-2
    assert moved(patches=other)[2] == 0, "a prompt without images depends on those of others"


def test_one_program_serves_images_of_all_sizes(windows):
    v, rng, batch = windows.architecture.vision, np.random.default_rng(1), windows.batch
    longest = batch.prompts.tokens.shape[1] - 3
    before = windows.logits._cache_size()
    for down, right in ((1, 1), (2, 5), (3, 2)):
        parts = [[1, picture(v, rng, 2 * down, 2 * right), 1]] * len(batch.tokens)
        sized = prompts_of(v, rng, parts, windows=12, longest=longest)
        assert np.isfinite(windows.logits(windows.params, sized.prompts.tokens, sized.images)).all()
    assert windows.logits._cache_size() == before


def test_a_text_token_with_the_id_of_images_stays_text(windows):
    tokens, images = np.array(windows.batch.prompts.tokens), windows.batch.images
    tokens[2, 1] = IMAGE
    found = [
        np.asarray(windows.logits(windows.params, tokens, images.replace(patches=patches)))[2]
        for patches in (images.patches, 255 - images.patches)
    ]
    np.testing.assert_array_equal(*found)


def test_rows_of_text_need_no_images(windows):
    tokens, length = windows.batch.prompts.tokens, windows.batch.prompts.lengths[2]
    plain = windows.model.logits(windows.params, windows.model.hidden(windows.params, jnp.asarray(tokens[2:3])))
    np.testing.assert_allclose(plain[0, :length], windows.right[2, :length], atol=1e-5)


def test_tokens_around_images_are_never_drawn(windows):
    assert windows.architecture.forbidden == (IMAGE, VIDEO, START, END)
    assert (windows.right[..., [IMAGE, VIDEO, START, END]] == MASKED).all()


def test_gradients_of_the_tower_are_torchs(windows):
    a, batch = windows.architecture, windows.batch
    factor = np.random.default_rng(3).standard_normal(windows.right.shape).astype(np.float32) / 100
    factor[..., list(a.forbidden)] = 0
    factor *= (np.arange(factor.shape[1]) < np.asarray(batch.prompts.lengths)[:, None])[..., None]

    def loss(params):
        return (windows.logits(params, batch.prompts.tokens, batch.images) * factor).sum()

    grads = jax.jit(jax.grad(loss))(windows.params)
    windows.torch_model.zero_grad()
    windows.torch_model.model.rope_deltas = None
    out = windows.torch_model(**torch_inputs(a.vision, batch)).logits
    (out * torch.as_tensor(factor[:, : out.shape[1]])).sum().backward()
    expected = {name: p.grad.numpy() for name, p in windows.torch_model.model.visual.named_parameters()}
    found = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(grads)}
    for path, name, w, layer in entries(table(a)):
        if name.startswith("visual."):
            mine = to_hf(w, np.asarray(found[path] if layer is None else found[path][layer]))
            right = expected.pop(name.removeprefix("visual."))
            np.testing.assert_allclose(mine, right, atol=1e-4 * np.abs(right).max() + 1e-6, err_msg=name)
    assert not expected
