"""Compiler flags: the table, flags that the environment already sets, and that XLA knows every one."""

import subprocess
import sys

import pytest

from pspo_jax.config.command_line import parse
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import xla_flags
from tests.conftest import REPO


def config(*words):
    return parse(words, "train", "")


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the CUDA plugin were installed."""
    monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: "cuda12" in name or None)


def test_nothing_is_set_where_no_accelerator_is_installed(monkeypatch):
    monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: None)
    environment = {"XLA_FLAGS": "--a=1"}
    assert xla_flags.apply(config(), environment) == {} and environment == {"XLA_FLAGS": "--a=1"}


def test_the_environment_wins_and_the_config_overrides_the_table(on_gpu):
    name = "--xla_gpu_enable_latency_hiding_scheduler"
    environment = {"XLA_FLAGS": f"{name}=false"}
    xla_flags.apply(config(), environment)
    assert environment["XLA_FLAGS"].split()[0] == f"{name}=false"
    assert environment["XLA_FLAGS"].count(name) == 1
    assert "LIBTPU_INIT_ARGS" not in environment
    environment = {}
    xla_flags.apply(config(f"--runtime.xla_flags={name}=false --xla_dump_to=x"), environment)
    assert environment["XLA_FLAGS"].count(name) == 1 and f"{name}=false" in environment["XLA_FLAGS"]
    assert environment["XLA_FLAGS"].endswith("--xla_dump_to=x")
    environment = {}
    xla_flags.apply(config("--runtime.flags=false", "--runtime.libtpu_flags=--b=2"), environment)
    assert environment == {"LIBTPU_INIT_ARGS": "--b=2"}


def test_words_that_are_not_flags_are_refused():
    with pytest.raises(ConfigError, match=r"runtime.xla_flags=fast: write flags as --name=value"):
        xla_flags.apply(config("--runtime.xla_flags=fast"), {})


def test_xla_knows_every_flag_of_the_table(child_env):
    """An unknown flag would end the process. The config's flags reach XLA before its devices exist."""
    words = " ".join(f"--{f.name}={f.value}" for f in xla_flags.TABLE if f.platform == "gpu")
    program = """
import sys
from pspo_jax.config.command_line import parse
from pspo_jax.training.setup import configure_runtime
configure_runtime(parse(["--runtime.xla_flags=" + sys.argv[1]], "train", ""))
import jax
print(jax.device_count(), float(jax.jit(lambda x: x + 1)(1.0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, f"{words} --xla_force_host_platform_device_count=3"],
        env={name: value for name, value in child_env.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "2.0"]


def test_the_documented_table_is_the_one_in_the_code():
    text = (REPO / "docs" / "distributed.md").read_text()
    for flag in xla_flags.TABLE:
        assert f"| `{flag.name}` | {flag.value} | {flag.reason} |" in text, flag.name
