"""Checkpoints on a real file system: kept by policy, verified, restored on another mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pspo_jax.checkpoint.checksums import checksums
from pspo_jax.checkpoint.params_folder import belongs, load_folder, save_folder
from pspo_jax.checkpoint.store import Checkpoints
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.run_stages import CheckpointConfig
from pspo_jax.runs.run_folder import RunLog


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
        "n": jnp.int32(seed),
        "key": jax.random.key(seed),
        "none": None,
    }


def abstract(value):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)


def same(a, b):
    raw = [
        jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if x.dtype == a["key"].dtype else x), t)
        for t in (a, b)
    ]
    jax.tree.map(np.testing.assert_array_equal, *raw)


def test_latest_and_best_are_kept(tmp_path):
    greedy = {1: 0.2, 2: 0.9, 3: 0.1, 4: 0.5}
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=2, keep_best=1)) as checkpoints:
        for step in range(1, 8):
            scores = {"greedy": greedy[step]} if step in greedy else None
            checkpoints.save(step, tree(step), {"note": step}, scores)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7]
        state, metadata = checkpoints.restore(abstract(tree()), print)
        assert metadata["note"] == 7
    same(state, tree(7))


def test_a_state_of_another_make_is_refused_and_left_alone(tmp_path):
    """A younger field that is empty is no difference; an array that is not there, or has another shape, is."""
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, tree(1), {})
        checkpoints.save(2, tree(2), {})
        checkpoints.wait()
        younger = abstract({**tree(), "queue": None})
        state, _ = checkpoints.restore(younger, print)
        assert state.pop("queue") is None
        same(state, tree(2))
        for change, words in (
            ({"ring": jnp.zeros(3)}, r"checkpoint 2 .*\['ring'\] is not there in it and float32\[3\] now"),
            ({"w": jnp.zeros((4, 4))}, r"\['w'\] is float32\[8, 4\] in it and float32\[4, 4\] now"),
            ({"h": None}, r"\['h'\] is bfloat16\[8\] in it and not there now"),
        ):
            with pytest.raises(ConfigError, match=words):
                checkpoints.restore(abstract({**tree(), **change}), print)
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "c.damaged").exists()


def test_metadata_is_what_it_was_when_saved(tmp_path):
    """The caller may go on changing its counters while the save is written."""
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        counts = {"rollouts": 1}
        checkpoints.save(1, tree(), {"counts": counts})
        counts["rollouts"] = 2
        checkpoints.wait()
        assert checkpoints.metadata(1)["counts"] == {"rollouts": 1}


def test_damage_is_found_and_set_aside(tmp_path):
    said = []
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), {})
        checkpoints.wait()
        for path in (tmp_path / "c" / "2" / "state").rglob("manifest.ocdbt"):
            path.write_bytes(b"")
        state, _ = checkpoints.restore(abstract(tree()), said.append)
        same(state, tree(1))
        assert "checkpoint 2 is damaged" in said[0]
        assert (tmp_path / "c.damaged" / "2").exists()
        checkpoints.save(2, tree(5), {})
        checkpoints.wait()
        same(checkpoints.restore(abstract(tree()), said.append)[0], tree(5))


def test_none_readable_is_an_error_that_names_them(tmp_path):
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract(tree()), print) is None
        checkpoints.save(3, tree(), {})
        checkpoints.wait()
        for path in (tmp_path / "c" / "3" / "state").rglob("manifest.ocdbt"):
            path.unlink()
        with pytest.raises(ConfigError, match=r"all checkpoints \[3\] in .* are damaged.*start_over"):
            checkpoints.restore(abstract(tree()), lambda text: None)


def test_checksum_sees_values_and_places():
    x = jnp.arange(6.0)
    first = int(checksums({"x": x})[0])
    assert first == int(checksums({"x": x})[0])
    assert first != int(checksums({"x": x[::-1]})[0])
    assert first != int(checksums({"x": x.at[3].add(1e-6)})[0])


def test_restores_on_another_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    value = {"w": jnp.arange(32.0).reshape(8, 4)}
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, value, {})
        checkpoints.wait()
        spec = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))}
        state, _ = checkpoints.restore(spec, print)
    assert len(state["w"].sharding.device_set) == 8
    np.testing.assert_array_equal(state["w"], value["w"])


def test_params_belong_to_their_settings(tmp_path):
    params = {"w": jnp.arange(4.0)}
    save_folder(tmp_path / "p", params, {"lr": 0.1})
    assert belongs(tmp_path / "p", {"lr": 0.1}) and not belongs(tmp_path / "p", {"lr": 0.2})
    np.testing.assert_array_equal(load_folder(tmp_path / "p", abstract(params))["w"], params["w"])
    save_folder(tmp_path / "p", params, {"lr": 0.2})
    assert belongs(tmp_path / "p.before", {"lr": 0.1}) and belongs(tmp_path / "p", {"lr": 0.2})


def test_log_drops_what_a_resume_repeats(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "rew')
    log = RunLog(tmp_path, resume_step=3, tensorboard=False)
    log.metrics(4, {"reward": float("nan")})
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [0, 1, 2, 3, 4]
    assert kept[-1]["reward"] is None
