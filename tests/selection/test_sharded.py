"""A selector on eight devices is the selector on one: draws, weights and state, also across a save and a restore."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pspo_jax.arrays.per_prompt import padded_rows
from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.defaults import replace
from pspo_jax.config.presets import resolve
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import make_mesh, prompts_shardings
from pspo_jax.selection import SCORERS, PromptMetadata, SelectorContext, selector
from tests.selection.helpers import compiled_whole

N, B, G = 20_000, 16, 4


def strategy(name, **changes):
    changes = {f"selection.{k}": v for k, v in changes.items()}
    config = resolve(replace(Config(), {"selection.name": name, **changes}))
    return selector(config.selection, config.forgetting, SelectorContext(B, G, 20, 0, ("even", "odd")))


def metadata(n=N):
    rng = np.random.default_rng(0)
    return PromptMetadata(np.arange(n, dtype=np.int8) % 2, rng.random(n).astype(np.float32))


def mesh_of(data, fsdp=1):
    config = replace(Config(), {"rollout.prompts": 32, "mesh.data": data, "mesh.fsdp": fsdp})
    return make_mesh(config)


class Stepper:
    """A selector and its state on a mesh, stepped with outcomes that depend on the step and the prompts alone."""

    def __init__(self, chosen, mesh, n=N, state=None):
        known = metadata(n)
        self.mesh = mesh
        self.abstract = jax.eval_shape(lambda c: chosen.init(n, c), known)
        self.shardings = prompts_shardings(mesh, self.abstract, n)
        whole = NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            init = jax.jit(lambda c: chosen.init(n, c), out_shardings=self.shardings)
            self.state = init(known) if state is None else state
            self.select = jax.jit(
                partial(chosen.select, batch=B), donate_argnums=0, out_shardings=(whole, whole, self.shardings)
            )
            self.observe = jax.jit(chosen.observe, donate_argnums=0, out_shardings=self.shardings)

    def step(self, step):
        with jax.set_mesh(self.mesh):
            ids, weight, self.state = self.select(self.state, jax.random.key(step), jnp.int32(step))
            rng = np.random.default_rng([step, int(np.asarray(ids).sum())])
            rewards = (rng.random((B, G)) < rng.random((B, 1))).astype(np.float32)
            centred = rewards - rewards.mean(1, keepdims=True)
            outcome = RolloutOutcome(rewards, centred, centred, np.float32(0.01 * step))
            self.state = self.observe(self.state, ids, outcome, jnp.int32(step))
        return np.asarray(ids), np.asarray(weight)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        np.testing.assert_array_equal(x, y)


USUAL = {"prioritized_replay"}
"""A score for each prompt and a tree over all of them; the others are slow tests."""


@pytest.mark.parametrize("name", [x if x in USUAL else pytest.param(x, marks=pytest.mark.slow) for x in SCORERS])
def test_eight_devices_draw_and_learn_what_one_does(name):
    chosen = strategy(name, exploration=0.25, cooldown=2)
    one, eight = Stepper(chosen, mesh_of(1)), Stepper(chosen, mesh_of(4, 2))
    rows = padded_rows(N)
    assert eight.state.score.sharding.shard_shape((rows,)) == (rows // 8,)
    for step in range(4):
        for x, y in zip(one.step(step), eight.step(step), strict=True):
            np.testing.assert_array_equal(x, y)
    assert_equal(one.state, eight.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pps", "prioritized_replay"])
def test_a_restored_state_goes_on_as_the_saved_one_on_any_number_of_devices(name, tmp_path: Path):
    chosen = strategy(name, quotas="even=0.25")
    saved = Stepper(chosen, mesh_of(4, 2))
    for step in range(3):
        saved.step(step)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(3, {"selector": saved.state}, {})
        checkpoints.wait()
        on = {}
        for count in (1, 2):
            mesh = mesh_of(count)
            shardings = prompts_shardings(mesh, saved.abstract, N)
            wanted = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved.abstract, shardings
            )
            found = checkpoints.restore({"selector": wanted}, pytest.fail)
            assert found is not None
            on[count] = Stepper(chosen, mesh, state=found[0]["selector"])
    for step in range(3, 6):
        ids, weight = saved.step(step)
        for other in on.values():
            got = other.step(step)
            np.testing.assert_array_equal(got[0], ids)
            np.testing.assert_array_equal(got[1], weight)
    for other in on.values():
        assert_equal(other.state, saved.state)


@pytest.mark.parametrize("n", [5, 127, 1000])
def test_data_that_devices_do_not_divide(n):
    chosen = compiled_whole(selector(*_parts("uniform"), SelectorContext(5, G, 20, 0)))
    mesh = mesh_of(8)
    state = jax.jit(
        lambda: chosen.init(n), out_shardings=prompts_shardings(mesh, jax.eval_shape(lambda: chosen.init(n)), n)
    )()
    ids, _, _ = chosen.select(state, jax.random.key(0), jnp.int32(0), 5)
    assert len(set(np.asarray(ids).tolist())) == 5
    assert int(ids.min()) >= 0 and int(ids.max()) < n


def _parts(name):
    config = resolve(replace(Config(), {"selection.name": name}))
    return config.selection, config.forgetting


@pytest.mark.parametrize(
    "name", ["prioritized_replay", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pps", "mopps", "curriculum"))]
)
def test_nothing_as_long_as_the_data_travels_or_is_copied(name):
    """Devices send each other far less than N, and a donated state is aliased except for far less than N."""
    n = 2_000_000
    rows = padded_rows(n)
    chosen, mesh = strategy(name, exploration=0.25, cooldown=2), mesh_of(8)
    abstract = jax.eval_shape(
        lambda c: chosen.init(n, c),
        metadata(8)._replace(
            task_ids=jax.ShapeDtypeStruct((n,), jnp.int8), difficulty=jax.ShapeDtypeStruct((n,), jnp.float32)
        ),
    )
    shardings = prompts_shardings(mesh, abstract, n)
    spec = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    whole = NamedSharding(mesh, PartitionSpec())

    def plain(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    step, ids, groups = plain(dtype=jnp.int32), plain(B, dtype=jnp.int32), plain(B, G)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    with jax.set_mesh(mesh):
        select = jax.jit(partial(chosen.select, batch=B), donate_argnums=0, out_shardings=(whole, whole, shardings))
        observe = jax.jit(chosen.observe, donate_argnums=0, out_shardings=shardings)
        programs = (
            select.lower(spec, key, step),
            observe.lower(spec, ids, RolloutOutcome(groups, groups, groups, plain()), step),
        )
        for lowered in programs:
            compiled = lowered.compile()
            for line in compiled.as_text().splitlines():
                if re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", line):
                    sizes = [
                        int(np.prod([int(d) for d in s.split(",") if d])) for s in re.findall(r"\[([\d,]*)\]", line)
                    ]
                    assert max(sizes) < rows // 16, line
            held = compiled.memory_analysis()
            assert held.output_size_in_bytes - held.alias_size_in_bytes < rows // 8
