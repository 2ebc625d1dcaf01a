"""The rows that a process owns, the cluster that it is in, the mesh that it takes; on one process."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pspo_jax.config.command_line import parse
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import smallest_fsdp
from pspo_jax.training.host_step import _over_rounds


def test_on_one_process_every_function_is_the_identity():
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), (AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    value = np.arange(32).reshape(16, 2)
    array = processes.to_global({"x": value}, rows)["x"]
    assert array.sharding == rows and processes.is_primary() and processes.process_count() == 1
    assert processes.owned_rows(array).tolist() == list(range(16))
    np.testing.assert_array_equal(processes.fetch_rows(array, np.array([3, 5])), value[[3, 5]])
    np.testing.assert_array_equal(processes.to_host(array), value)
    np.testing.assert_array_equal(processes.share_rows({"x": value}, np.arange(16), 16)["x"], value)
    assert processes.any_process(True) and not processes.any_process(False)
    with processes.fail_together(), pytest.raises(OSError):
        raise OSError("raised inside")


def test_a_cluster_is_recognised_by_its_variables(monkeypatch):
    """A cluster of one process does not count, nor does a SLURM allocation without srun."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name in slurm:
        monkeypatch.delenv(name, raising=False)
    assert not processes.in_cluster()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not processes.in_cluster()
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert processes.in_cluster()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not processes.in_cluster()


def test_rounds_are_one_step():
    """Counts are summed, extremes kept by whole words ("terminated" is no minimum), the rest averaged."""
    rounds = [
        {"groups/effective": 3.0, "groups/waiting": 3.0, "completions/max_terminated_length": 9.0}
        | {"completions/mean_terminated_length": 4.0, "completions/min_length": 2.0, "loss_weight/min": 0.5},
        {"groups/effective": 5.0, "groups/waiting": 8.0, "completions/max_terminated_length": 7.0}
        | {"completions/mean_terminated_length": 6.0, "completions/min_length": 1.0, "loss_weight/min": 0.7},
    ]
    assert _over_rounds(rounds) == {
        "groups/effective": 8.0,
        "groups/waiting": 8.0,
        "completions/max_terminated_length": 9.0,
        "completions/mean_terminated_length": 5.0,
        "completions/min_length": 1.0,
        "loss_weight/min": 0.5,
    }
    assert _over_rounds([]) == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--distributed.processes", "2"],
            "distributed.processes=2: distributed.coordinator=None does not read it; drop it, or set distributed.coord",
        ),
        (["--distributed.coordinator", "here"], "distributed.coordinator=here: must be host:port"),
        (
            ["--distributed.coordinator", "h:1", "--distributed.processes", "2", "--distributed.process", "2"],
            "distributed.process=2: must be less than distributed.processes=2",
        ),
        (["--mesh.fsdp", "0"], "mesh.fsdp=0: must be at least 1"),
    ],
)
def test_a_wrong_number_of_a_process_is_refused_in_one_line(words, says):
    with pytest.raises(ConfigError, match=says):
        parse(words, "train", "")


@given(st.floats(1, 1e12), st.floats(1e6, 1e12), st.integers(1, 64), st.sampled_from([48, 64, 896, 3584]))
def test_the_smallest_fsdp_leaves_half_of_the_memory(state, capacity, devices, width):
    found = smallest_fsdp(state, capacity, devices, width)
    works = [d for d in range(1, devices + 1) if devices % d == 0 and width % d == 0]
    assert found in works
    assert state / found <= capacity / 2 or found == works[-1]
    assert all(state / d > capacity / 2 for d in works if d < found)


def test_fsdp_of_known_models():
    """AdamW in float32 needs 16 bytes per weight; adapters on a bfloat16 base need 2."""
    gib = 2**30
    assert smallest_fsdp(1.54e9 * 16, 80e9, 8, 1536) == 1
    assert smallest_fsdp(1.54e9 * 16, 16 * gib, 8, 1536) == 4
    assert smallest_fsdp(7.6e9 * 16, 80e9, 8, 3584) == 4
    assert smallest_fsdp(7.6e9 * 16, 16 * gib, 64, 3584) == 16
    assert smallest_fsdp(7.6e9 * 2, 80e9, 8, 3584) == 1
    assert smallest_fsdp(1e9, float("inf"), 8, 1536) == 1
