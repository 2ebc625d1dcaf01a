"""Test set-up: eight CPU devices, a shared compilation cache, and the folder of data."""

import gc
import os
import sys
from pathlib import Path

from tests import xla

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=8)}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "tests" / "data"
"""Samples, a tokenizer and golden values; tests/data/README.md says where they come from."""
EVERY_ROW = Path(os.environ["PSPO_TEST_DATA"]) if "PSPO_TEST_DATA" in os.environ else None
"""A folder of the whole data sets, which slow tests read where it is given."""
every_row = [pytest.mark.slow, pytest.mark.skipif(EVERY_ROW is None, reason="PSPO_TEST_DATA names no folder")]
"""Marks of a test that reads it."""
CACHE = REPO / ".jax_cache"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
settings.register_profile("suite", deadline=None, max_examples=30)
settings.load_profile("suite")


LONGEST = (
    "pool",
    "runs/test_text_run",
    "training/test_train_function",
    "runs/test_run",
    "hub/test_push",
    "runs/test_loggers",
    "training/test_run_end",
    "training/test_distillation",
    "small-lora",
    "distributed/test_processes",
    "training/test_replay_step",
    "training/test_packing",
    "rollout/test_sampler",
    "launch/test_launcher_stops",
    "runs/test_run_faults",
    "selection/test_options",
    "selection/test_selection",
    "training/test_step_meaning",
    "training/test_prompt_features",
    "model/test_pretrained",
    "model/test_lora",
    "training/test_step",
    "training/test_left_out",
    "training/test_images",
    "training/test_image_table",
    "selection/test_over_steps",
    "selection/test_posterior",
    "selection/test_tree",
    "planning/test_plan",
    "replay/test_buffer",
    "selection/test_prioritized_replay",
    "selection/test_selector_page",
    "selection/test_longest_first",
    "selection/test_sharded",
    "selection/test_bins",
    "training/test_aper_step",
    "runs/test_bucket",
    "training/test_sft",
    "training/test_precision",
    "training/test_cold_start",
    "distributed/test_fsdp",
    "model/test_transformer",
    "losses/test_policy_loss",
    "losses/test_own_surrogate",
    "losses/test_log_probs",
    "advantages/test_estimators",
    "rewards/test_grading",
)
"""Groups of tests that take 15 s or more, the longest first; that of `pool` mostly waits."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put the tests of a file into a group, which one worker runs, and the longest groups first.

    Tests of a group share its module's fixtures and compiled programs. Tests that name a group of their own keep it.
    """
    rank = {name: i for i, name in enumerate(LONGEST)}
    ranks = []
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        name = mark.args[0] if mark else item.path.relative_to(REPO / "tests").with_suffix("").as_posix()
        if mark is None:
            item.add_marker(pytest.mark.xdist_group(name))
        ranks.append(rank.get(name, len(rank)))
    order = sorted(range(len(items)), key=ranks.__getitem__)
    items[:] = [items[i] for i in order]


def pytest_collection_finish():
    """Spare the garbage collector what the imports made: its passes over that take a fifth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


MOST_MAPPINGS = 20_000
"""Mappings of memory from which compiled programs are dropped, where the system counts mappings."""


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """A compiled program keeps memory mapped, and a process may have 65,530 mappings: more programs end in a crash.

    Small programs that many tests run, such as those of single operations, are kept as long as there is room.
    """
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    """Losses and advantages computed with TRL 1.16 and others."""
    import json

    return json.loads((DATA / "golden" / "trl_verl.json").read_text())


@pytest.fixture(scope="session")
def child_env():
    """Environment of a child process: one CPU device, the shared cache."""
    return os.environ | {
        "XLA_FLAGS": xla.flags(),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "PYTHON": sys.executable,
        "COLUMNS": "200",
    }
