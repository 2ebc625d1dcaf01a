"""Held-out accuracy of prompts with images, and of the same prompts with each other's images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.arrays.state import Rollouts
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.data.image_batches import image_room
from pspo_jax.data.synthetic.segments import MAX_RESPONSE, TOKENIZER, TOWER, segments
from pspo_jax.data.task import pad_rows
from pspo_jax.evaluation.heldout import evaluate


def measure(images, i):
    """The lengths of an image's bars, from the windows in which a batch holds it."""
    down, right = TOWER.layout.offsets()
    rows, columns = images.grid[i, 0]
    pixels = np.zeros((4 * rows, 4 * columns), np.uint8)
    for window, (row, column) in zip(images.patches[i], images.corner[i], strict=True):
        for patch, r, c in zip(window, row + down, column + right, strict=True):
            if r < rows and c < columns:
                pixels[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = patch.reshape(4, 4)
    return [int((pixels[top : top + 8] > 0).any(axis=0).sum()) // 2 for top in (0, 8, 16)]


def reader(_, prompts, key, settings):
    """A policy that reads images off the arrays of a batch, and adds what it is asked for."""
    answers = []
    for i, (ids, n) in enumerate(zip(prompts.tokens, prompts.lengths, strict=True)):
        question = TOKENIZER.decode(ids[:n].tolist()).partition("]")[2]
        lengths = measure(prompts.images, i)
        answers.append(TOKENIZER.encode(f"={sum(lengths[int(x) - 1] for x in question.removesuffix('=').split('+'))}$"))
    tokens, lengths = pad_rows(answers, MAX_RESPONSE, TOKENIZER.pad_token_id)
    shape = jnp.zeros((len(answers), 1, MAX_RESPONSE))
    drawn = jnp.asarray(tokens)[:, None], shape > 0, shape, shape, jnp.asarray(lengths)[:, None]
    return Rollouts(prompts, *drawn, jnp.ones((len(answers), 1), bool), jnp.ones(()))


@pytest.mark.parametrize("widths", ["24", "24,32"])
def test_the_answers_follow_the_images(widths):
    fields = {"task.name": "segments", "task.heldout_prompts": 300, "eval.samples": 1, "task.image_widths": widths}
    config = replace(Config(), fields)
    task = segments(config.task, 4)
    room = image_room(TOWER, task.train, task.heldout)
    found = evaluate(reader, None, task, config, jax.random.key(0), 64, lambda prompts: prompts, room=room)
    assert found["greedy"] == found["sampled"] == 1 and found["no_verdict"] == 0
    assert 0 < found["greedy_other_images"] < 0.15
    alone = replace(config, {"eval.other_images": False})
    found = evaluate(reader, None, task, alone, jax.random.key(0), 64, lambda prompts: prompts, room=room)
    assert "greedy_other_images" not in found
