"""Changed data under stored and waiting groups: they follow their prompts, whatever the padded length."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.replay.dynamic_sampling import Queue
from pspo_jax.runs import history
from pspo_jax.system.progress import Progress
from pspo_jax.training import resume
from pspo_jax.training.setup import place_state, prepare
from tests.checkpoint.records import saved
from tests.helpers import tiny_config

FIELDS = {"algorithm__name": "dapo", "rollout__oversampling": 2.0}


def stored(groups, task, rows):
    """Groups of these prompts in the first places."""
    n, size = len(rows), groups.step.shape[0]
    places = np.arange(size) < n
    ids = np.zeros(size, np.int32)
    ids[:n] = rows
    prompts = dataclasses.replace(
        groups.prompts,
        ids=jnp.asarray(ids),
        tokens=jnp.asarray(task.train.tokens[ids], jnp.int32),
        lengths=jnp.asarray(task.train.lengths[ids], jnp.int32),
    )
    marks = jnp.arange(size, dtype=jnp.float32)[:, None] + jnp.zeros_like(groups.rewards)
    return dataclasses.replace(
        groups,
        prompts=prompts,
        rewards=marks,
        mask=jnp.ones_like(groups.mask),
        step=jnp.where(places, 1, -1),
        counted=jnp.asarray(places),
    )


@pytest.mark.parametrize(
    ("replay", "stored_kind"),
    [("popo", "stored groups"), pytest.param("aper", "stored completions", marks=pytest.mark.slow)],
)
def test_groups_follow_their_prompts_into_another_padded_length(replay, stored_kind, tmp_path, capsys):
    fields = FIELDS | {"replay__name": replay}
    before = prepare(tiny_config(**fields, run__dir=str(tmp_path), task__train_prompts=56))
    other = tiny_config(**fields, run__dir=str(tmp_path), task__train_prompts=40, rollout__prompt_bucket=32)
    after = prepare(replace(other, {"task.allow_change": True}))
    old, new = before.task.train.content().tolist(), after.task.train.content().tolist()
    assert before.task.train.tokens.shape[1] != after.task.train.tokens.shape[1]
    stays = [i for i, content in enumerate(old) if content in new]
    goes = [i for i, content in enumerate(old) if content not in new]
    rows = [stays[0], goes[0], stays[1], goes[1], stays[2]]
    with jax.set_mesh(before.mesh):
        state = place_state(before, jax.jit(before.model.init)(jax.random.key(0)))
        ring = dataclasses.replace(state.replay, groups=stored(state.replay.groups, before.task, rows))
        queue = Queue(stored(state.queue.groups, before.task, rows), jnp.int32(len(rows)))
        state = state.replace(
            replay=jax.device_put(ring, before.shardings.replay), queue=jax.device_put(queue, before.shardings.queue)
        )
        resume.save_content(before, tmp_path)
        with saved(before, state, tmp_path, config=history.settings(after.config)) as checkpoints:
            found = resume.restore(after, tmp_path, checkpoints, Progress(False)).state
    printed = capsys.readouterr().out
    for kind in (stored_kind, "waiting groups"):
        assert f"{kind}: 3 follow their prompts, 2 are dropped" in printed
    kept = [new.index(old[i]) for i in (stays[0], stays[1], stays[2])]
    ring, queue = found.replay, found.queue
    assert np.flatnonzero(ring.groups.counted).tolist() == [0, 2, 4]
    assert int(queue.held) == 3 and np.flatnonzero(queue.groups.counted).tolist() == [0, 1, 2]
    for groups, places in ((ring.groups, [0, 2, 4]), (queue.groups, [0, 1, 2])):
        assert np.asarray(groups.prompts.ids)[places].tolist() == kept
        np.testing.assert_array_equal(np.asarray(groups.prompts.tokens)[places], after.task.train.tokens[kept])
        assert np.asarray(groups.rewards)[places, 0].tolist() == [0, 2, 4]
        assert not np.asarray(groups.mask)[~np.asarray(groups.counted)].any()
        assert (np.asarray(groups.step)[~np.asarray(groups.counted)] == -1).all()
