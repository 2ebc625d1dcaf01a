"""Defaults that follow the machine, a CPU or an accelerator."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, logits_mib
from pspo_jax.distributed.devices import host_bytes
from pspo_jax.distributed.mesh import make_mesh
from pspo_jax.model import built_in
from pspo_jax.runs.history import changes, settings
from pspo_jax.runs.run_folder import with_type_of
from pspo_jax.training import machine_defaults
from tests.helpers import tiny_config

TEXT = ["--task.name", "math", "--task.train_data", "rows.jsonl", "--model.source", "a/b"]


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert machine_defaults.compute_dtype(on_cpu=True)[0] == "float32"
    assert machine_defaults.compute_dtype(on_cpu=False)[0] == "bfloat16"


def test_a_memory_limit_of_the_container_counts(tmp_path):
    (tmp_path / "max").write_text("1073741824\n")
    assert host_bytes(tmp_path / "max") == 2**30
    (tmp_path / "max").write_text("max\n")
    assert host_bytes(tmp_path / "max") == host_bytes(tmp_path / "nothing") > 2**30


def text_config(*words):
    return command_line.parse([*TEXT, *words], "train", "")


def test_fields_of_text_tasks_that_are_not_set_follow_the_machine():
    config = text_config()
    assert config.model.compute_dtype is config.model.remat is config.loss.packing is None
    chosen, words = machine_defaults.with_type(config, on_cpu=False)
    assert chosen.model.compute_dtype == "bfloat16" and "accelerator" in words[0]
    on_cpu, words = machine_defaults.with_type(config, on_cpu=True)
    assert on_cpu.model.compute_dtype == "float32"
    assert len(words) == 1 and "emulated on most CPUs" in words[0]
    config = text_config("--model.compute_dtype", "float32", "--model.remat", "dots", "--loss.packing", "false")
    assert machine_defaults.with_type(config, on_cpu=False) == (config, [])
    assert machine_defaults.with_memory(config, None, None, 8, on_cpu=True) == (config, [])


def test_the_embedded_tasks_do_not_follow_the_machine():
    config = tiny_config()
    assert (
        machine_defaults.with_type(config, on_cpu=True)
        == machine_defaults.with_memory(config, None, None, 8, True)
        == (config, [])
    )
    assert config.model.compute_dtype == "float32" and config.model.remat == "none"


def test_chunks_of_logits_grow_with_the_memory_of_an_accelerator():
    config, gib = tiny_config(), 2**30
    assert config.loss.logits_mib is None and logits_mib(config) == 160
    for capacity, wanted in ((15.75, 160), (16, 160), (32, 501), (59.3, 1084), (141, 1280)):
        chosen, words = machine_defaults.with_logits(config, capacity * gib, on_cpu=False)
        assert logits_mib(chosen) == wanted
        assert bool(words) == (wanted > 160)
    for unchanged in ((math.inf, False), (80 * gib, True)):
        assert machine_defaults.with_logits(config, *unchanged) == (config, [])
    asked = replace(config, {"loss.logits_mib": 64})
    assert machine_defaults.with_logits(asked, 80 * gib, False) == (asked, [])


def test_a_cpu_recomputes_no_more_than_its_memory_requires(monkeypatch):
    config = text_config()
    a = built_in(dataclasses.replace(config.model, layers=24, width=1024, mlp_width=4096), 1000)
    mesh = make_mesh(tiny_config(), tiny_config().model, jax.devices()[:1])
    kinds = {}
    for kind in ("none", "dots", "full"):
        kept, inside = machine_defaults.activations(config, a, kind, mesh, 512)
        kinds[kind] = kept + inside
    assert kinds["none"] > kinds["dots"] > kinds["full"]
    for memory, wanted in ((kinds["none"], "none"), (kinds["dots"], "dots"), (kinds["full"], "full"), (0, "full")):
        monkeypatch.setattr(machine_defaults, "host_bytes", lambda m=memory: 4 * m * jax.local_device_count() * 1.001)
        chosen, words = machine_defaults.with_memory(config, a, mesh, 512, on_cpu=True)
        assert chosen.model.remat == wanted and chosen.loss.packing
        assert f"model.remat {wanted} (" in words[0] and "loss.packing true" in words[1]
        assert (
            chosen.loss.microbatch_tokens == machine_defaults.ENOUGH_TOKENS
            and "loss.microbatch_tokens 256 (" in words[2]
        )
    chosen, words = machine_defaults.with_memory(config, a, mesh, 512, on_cpu=False)
    assert (
        chosen.model.remat == "full"
        and chosen.loss.packing is chosen.loss.microbatch_tokens is None
        and len(words) == 1
    )


def test_a_run_keeps_its_type_on_another_machine(tmp_path):
    began = replace(text_config(), {"model.compute_dtype": "bfloat16"})
    (tmp_path / "config.yaml").write_text(command_line.to_yaml(began))
    assert with_type_of(tmp_path, text_config()).model.compute_dtype == "bfloat16"
    assert with_type_of(tmp_path / "new", text_config()).model.compute_dtype is None
    other = text_config("--model.compute_dtype", "float32")
    assert with_type_of(tmp_path, other) == other
    with pytest.raises(ConfigError, match=r"model\.compute_dtype=bfloat16 there, float32 now"):
        changes(tmp_path, settings(began), other)


def test_a_config_without_types_still_has_an_architecture():
    model = dataclasses.replace(Config().model, compute_dtype=None, remat=None)
    assert (built_in(model, 16).compute_dtype, built_in(model, 16).remat) == ("float32", "none")
