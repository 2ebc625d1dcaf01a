"""Several slices: the mesh over them, what crosses from one to another, and that they do what one device does."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pspo_jax import train
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed.mesh import BY_SLICE, WHOLE, constrain, make_mesh, on_each_slice
from pspo_jax.model.mixed_precision import lookup
from pspo_jax.planning.memory import take_target
from pspo_jax.planning.roofline import bytes_across_slices
from pspo_jax.training.compile import lower_programs
from pspo_jax.training.setup import prepare
from tests.conftest import REPO
from tests.distributed.hlo import collectives
from tests.helpers import relative, slow_except, tiny_config
from tests.runs.processes import COLD_START, SMALL, metrics, params

SCALARS = 4096
"""Bytes of counters, metrics and per-prompt numbers of a small batch that may cross beside the gradients."""


def mesh_of(**fields):
    return make_mesh(replace(Config(), {name.replace("__", "."): value for name, value in fields.items()}))


def test_each_slice_holds_its_own_devices():
    mesh = mesh_of(mesh__slices=2, mesh__data=4, mesh__fsdp=2)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    first, second = (sorted(device.id for device in part.flat) for part in mesh.devices)
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert mesh_of(mesh__fsdp=2).shape["slice"] == 1
    # Where not all devices are used, they are the first of each slice.
    assert [device.id for device in mesh_of(mesh__slices=2, mesh__data=2).devices.flat] == [0, 4]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mesh__slices": 3}, "mesh.slices=3: does not divide the 8 devices; choose a divisor"),
        ({"mesh__slices": 2, "mesh__fsdp": 8}, "mesh.fsdp=8 .* does not divide the 4 devices of each of the 2 slices"),
        (
            {"mesh__slices": 2, "mesh__fsdp": 4, "mesh__tensor": 2},
            "mesh.fsdp=4 x mesh.context=1 x mesh.tensor=2: does not divide the 4 devices of each of the 2 slices",
        ),
        (
            {"mesh__slices": 2, "mesh__tensor": 2, "rollout__weights": "split"},
            "rollout.weights=split does not go with mesh.tensor=2 x mesh.context=1 within a slice; use gathered",
        ),
        ({"mesh__slices": 2, "mesh__data": 3}, "mesh.slices=2: does not divide mesh.data=3, which counts all slices"),
    ],
)
def test_slices_that_do_not_fit_are_refused_in_one_line(fields, says):
    with pytest.raises(ConfigError, match=says) as error:
        mesh_of(**fields)
    assert "\n" not in str(error.value)


class Chip:
    """A device of which the mesh reads no more than its place."""

    platform = "tpu"
    process_index = 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


def test_slices_that_a_tpu_reports_are_found_and_must_be_even():
    uneven = [Chip(i, int(i >= 5)) for i in range(8)]
    with pytest.raises(ConfigError, match="the TPU's slices have 5, 3 devices; all need equally many"):
        make_mesh(Config(), devices=uneven)
    even = [Chip(i, i // 4) for i in range(8)]
    with pytest.raises(ConfigError, match=r"mesh.slices=4: JAX reports 2 slices of 4 devices; drop it"):
        make_mesh(replace(Config(), {"mesh.slices": 4}), devices=even)


def test_a_plan_names_slices():
    target = take_target(["--plan", "2xv5e-8"])[1]
    assert (target.kind, target.devices, target.slices) == ("v5e", 8, 2)
    assert take_target(["--plan", "h100x8"])[1].slices == 1
    with pytest.raises(ConfigError, match="--plan 0xv5e-8: name a device"):
        take_target(["--plan", "0xv5e-8"])


TENSOR = {"mesh__data": 2, "mesh__tensor": 2}
CONTEXT = {"mesh__data": 2, "mesh__context": 2}
CASES = {
    "padded": {"loss__microbatch_rows": 8, "loss__entropy_coef": 0.01},
    "packed": {"loss__microbatch_rows": 8, "loss__packing": True, "algorithm__name": "popo"},
    "replay and KL": {"loss__microbatch_rows": 8, "loss__kl_coef": 0.01, "algorithm__name": "aper"},
    "slots": {"rollout__slots": 16, "loss__microbatch_rows": 8},
    "tensor": {"loss__microbatch_rows": 8, "loss__entropy_coef": 0.01} | TENSOR,
    "context": {"loss__microbatch_rows": 8, "loss__entropy_coef": 0.01} | CONTEXT,
    "tensor, packed": {"loss__microbatch_rows": 8, "loss__packing": True, "algorithm__name": "popo"} | TENSOR,
    "split weights": {"loss__microbatch_rows": 8, "rollout__weights": "split"},
    "images": {"loss__microbatch_rows": 8, "task__name": "segments"},
}


def rollout_images(setup):
    """Numbers of the embeddings of a batch's images."""
    if setup.images is None:
        return 0
    units = setup.images.windows * setup.images.layout.units
    return setup.config.rollout.prompts * units * setup.architecture.width


@pytest.mark.parametrize("case", slow_except(["padded"], list(CASES)))
def test_gradients_cross_once_per_update_and_rollouts_never(case):
    """Four microbatches, or as many as are needed: the sum of their gradients crosses, and little else."""
    fields = {"mesh__slices": 2, "mesh__data": 4, "mesh__fsdp": 2, "model__width": 32} | CASES[case]
    setup = prepare(tiny_config(**fields))
    with jax.set_mesh(setup.mesh):
        lowered = lower_programs(setup)
        # The program of the padded case's rollouts is that of the others.
        names = ("step", "sample") if case != "padded" else ("step",)
        texts = {name: lowered[name].compile().as_text() for name in names}
    per_slice = setup.mesh.devices[0].size
    crossing = {name: [(c.crossing(per_slice), c) for c in collectives(text)] for name, text in texts.items()}
    assert all(c.groups for found in crossing.values() for _, c in found)

    gradient = bytes_across_slices(setup)
    assert gradient == 4 * sum(x.size for x in jax.tree.leaves(setup.abstract.params))
    sums = [bytes_ for bytes_, c in crossing["step"] if c.kind == "all-reduce" and c.bytes > SCALARS]
    # Every device sends what nothing splits, such as the scales of norms.
    params = jax.tree.leaves(setup.abstract.params)
    unsplit = sum(4 * x.size * per_slice for x in params if x.sharding.is_fully_replicated)
    assert gradient <= sum(sums) <= gradient + unsplit
    others = sum(bytes_ for bytes_, _ in crossing["step"]) - sum(sums)
    rows = 4 * 4 * sum(x.size for x in jax.tree.leaves(setup.abstract.replay) if x.ndim > 1)
    # The embeddings of images cross once, and each device sends the gradient in them.
    embeddings = 4 * rollout_images(setup) * (1 + per_slice)
    assert others <= SCALARS + rows + embeddings
    assert sum(bytes_ for bytes_, _ in crossing.get("sample", ())) <= (SCALARS if case == "slots" else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slice_looks_embeddings_up_in_a_table_that_tensor_and_fsdp_split(dtype):
    """Values are those of the table, and gradients the sums over all slices, to the rounding of the table's type."""
    mesh = mesh_of(mesh__slices=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (12, 8)).astype(dtype)
    tokens = jax.random.randint(keys[1], (8, 5), 0, 12)
    weight = jax.random.normal(keys[2], (8, 5, 8))

    def of_slice(table, tokens, weight):
        found, pull = jax.vjp(lambda table: lookup(constrain(table, "vocab", "embed"), tokens, "float32"), table)
        return found, jax.lax.psum(pull(weight)[0].astype("float32"), "slice")

    with jax.set_mesh(mesh):
        run = jax.jit(on_each_slice(of_slice, (WHOLE, BY_SLICE, BY_SLICE), (BY_SLICE, WHOLE)))
        found, gradient = run(table, tokens, weight)
    assert (np.asarray(found) == np.asarray(table.astype("float32"))[np.asarray(tokens)]).all()
    wanted = np.zeros((12, 8))
    np.add.at(wanted, np.asarray(tokens), np.asarray(weight, np.float64))
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 if dtype == "float32" else 0.02)


RUNS = {
    "packed, four slices": (
        {"loss.packing": True, "loss.microbatch_rows": 8},
        {"mesh.slices": 4, "mesh.data": 4, "mesh.fsdp": 2},
    ),
    "split weights": ({}, {"mesh.slices": 2, "mesh.data": 4, "mesh.fsdp": 2, "rollout.weights": "split"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_a_run_on_several_slices_is_that_of_one_device(case, tmp_path):
    fields, mesh = RUNS[case]
    common = SMALL | COLD_START | fields | {
        "algorithm.name": "grpo", "run.steps": 6, "run.fingerprint": True, "loss.kl_coef": 0.01, "eval.every": 0,
        "eval.samples": 1, "log.report": False, "log.to": "none", "log.completions_every": 0,
    }  # fmt: skip
    for name, of_mesh in (("one", {"mesh.data": 1}), ("slices", mesh)):
        train(replace(Config(), common | of_mesh | {"run.dir": str(tmp_path / name)}))
    one, slices = metrics(tmp_path / "one"), metrics(tmp_path / "slices")
    for key in ("crc/prompt_ids", "crc/tokens", "reward", "num_tokens"):
        assert [row.get(key) for row in one] == [row.get(key) for row in slices], key
    assert max(row.get("grad_norm", 0) for row in one) > 0
    assert relative(params(tmp_path / "slices")["params"], params(tmp_path / "one")["params"]) < 1e-5


TPU = """
import json, re, sys
from pspo_jax.config.defaults import replace
from pspo_jax.distributed.devices import devices_for, parse_target
from pspo_jax.planning.memory import _across_slices
from pspo_jax.training.compile import lower_programs
from pspo_jax.training.setup import prepare
from tests.distributed.hlo import sent_to_slices
from tests.helpers import tiny_config
import jax, numpy as np

devices = devices_for(parse_target("2xv5e-8"))
from jax.experimental.mesh_utils import create_hybrid_device_mesh
hybrid = create_hybrid_device_mesh((1, 2, 4, 1, 1), (2, 1, 1, 1, 1), devices, allow_split_physical_axes=True)
config = tiny_config(
    model__width=512, model__heads=4, model__kv_heads=4, model__head_dim=128, model__mlp_width=1024, mesh__fsdp=4,
    rollout__prompts=16, loss__microbatch_rows=16, loss__entropy_coef=0.01, model__compute_dtype="bfloat16",
)
setup = prepare(config, weights=False, capacity=16e9, devices=devices)
with jax.set_mesh(setup.mesh):
    lowered = lower_programs(setup)
    sent = {name: sent_to_slices(lowered[name].compile().as_text()) for name in ("step", "sample")}
gradient = sum(4 * x.size for x in jax.tree.leaves(setup.abstract.params))
same = bool((setup.mesh.devices == hybrid).all())
print(json.dumps([same, sent["step"], sent["sample"], gradient, _across_slices(setup)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
def test_the_tpus_compiler_sends_gradients_once_between_two_slices(child_env):
    """Two v5e slices of eight chips: the mesh is JAX's hybrid one, and each chip sends its eighth of the gradient."""
    env = {name: value for name, value in child_env.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", TPU], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    same, step, sample, gradient, line = json.loads(done.stdout.splitlines()[-1])
    assert same
    large = sum(size for size in step if size > SCALARS)
    assert large == pytest.approx(gradient / 8, rel=0.01)
    assert sum(step) - large <= 16 * SCALARS and sample == []
    assert f"each slice sends {gradient / 1e9:.3g} GB of gradients per update, once" in line
