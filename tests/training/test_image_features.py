"""Features of prompts with images: the hidden states that transformers has on them; runs of segments that resume."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.training.prompt_features import feature_width, prompt_features
from tests.distributed.processes import finish_all, launch
from tests.helpers import tiny_config
from tests.model.test_pretrained import load
from tests.model.visual_checkpoints import torch, torch_inputs, write_visual_checkpoint
from tests.pictures import picture, prompts_of
from tests.runs.processes import finish, lines_of, metrics, params, start, wait_for_step

N = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(torch's model, ours, its weights, the tower, prompts with images of unequal sizes, and one of text alone)."""
    folder = tmp_path_factory.mktemp("features")
    other = write_visual_checkpoint(folder, "qwen2_5_vl", text={"num_hidden_layers": 1}, tower={"depth": 2})
    model, weights, source = load(folder)
    v, rng = source.architecture.vision, np.random.default_rng(0)

    def image(down, right):
        return picture(v, rng, 2 * down, 2 * right)

    parts = [[3, image(2, 3), 2], [image(1, 5), 4], [2, image(2, 2), 1, image(3, 1), 3], [6], [image(4, 1), 1]]
    parts += [[image(2, 3), 5], [1, image(3, 3), 1]]
    return other, model, weights, v, prompts_of(v, rng, parts, windows=5)


def features(model, weights, batch, mesh=None):
    """The features of the prompts, with the images of `batch.images`; devices share eight prompts at a time."""
    tokens, lengths = np.asarray(batch.prompts.tokens), np.asarray(batch.prompts.lengths)

    def read(rows):
        return jax.tree.map(lambda x: x[rows], batch.images)

    return prompt_features(model, weights, tokens, lengths, 8 if mesh else 4, seed=0, mesh=mesh, images=read)


def test_features_are_the_hidden_states_of_transformers(made):
    other, model, weights, v, batch = made
    summaries = []
    for i in range(N):
        alone = batch._replace(tokens=batch.tokens[i : i + 1], pictures=batch.pictures[i : i + 1])
        other.model.rope_deltas = None
        with torch.no_grad():
            states = other.model(**torch_inputs(v, alone)).last_hidden_state[0].double().numpy()
        summaries.append(np.concatenate([states.mean(axis=0), states[-1]]))
    wanted = (np.array(summaries) - np.mean(summaries, axis=0)) / np.std(summaries, axis=0)
    found = features(model, weights, batch)
    assert feature_width(model, weights) == found.shape[1] == wanted.shape[1]
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_another_image_gives_other_features(made):
    _, model, weights, _, batch = made
    found = features(model, weights, batch)
    patches = batch.images.patches.copy()
    patches[0] = 255 - patches[0]
    other = features(model, weights, batch._replace(images=dataclasses.replace(batch.images, patches=patches)))
    assert np.abs(found[0] - other[0]).max() > 0.05


@pytest.mark.slow
def test_devices_share_the_prompts(made):
    _, model, weights, _, batch = made
    mesh = make_mesh(tiny_config(rollout__prompts=8, mesh__data=2, mesh__fsdp=2, mesh__context=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, params_shardings(mesh, weights, model.axes))
        spread = features(model, placed, batch, mesh)
    np.testing.assert_allclose(spread, features(model, weights, batch), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["killed", "two processes"])
def test_the_preset_trains_on_segments_and_resumes_to_the_bit(child_env, tmp_path, stopped):
    fields = {
        "task__name": "segments",
        "task__image_widths": "24,32",
        "algorithm__name": "learnability_replay",
        "sft__steps": 60,
        "run__steps": 8,
        "checkpoint__every": 1,
        "eval__every": 4,
    }
    whole, other = tmp_path / "whole", tmp_path / "other"
    finish(start(child_env, whole, **fields))
    if stopped == "killed":
        process = start(child_env, other, **fields)
        assert wait_for_step(process, other, at_least=3)
        process.kill()
        process.wait()
        process.stdout.close()
        assert lines_of(other) < 9
        finish(start(child_env, other, **fields))
        assert metrics(other) == metrics(whole)
        jax.tree.map(np.testing.assert_array_equal, params(other), params(whole))
    else:
        finish_all(other, launch(child_env, other, processes=2, devices=1, mesh__data=2, **fields))
        one, two = (params(folder)["selector"]["per_prompt"]["features"] for folder in (whole, other))
        np.testing.assert_allclose(one, two, atol=1e-4)
    found = params(whole)["selector"]["per_prompt"]["features"][:40]
    # There are twelve texts, so that prompts of one text differ by their images alone.
    assert np.abs(found).max() > 0 and len(np.unique(np.round(found, 4), axis=0)) == 40
    assert all(0 <= line["selection/predictor_error"] <= 1 for line in metrics(whole)[1:])
