"""The memory plan: from shapes alone, for devices that are not there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from pspo_jax.config.command_line import parse
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed.devices import DEVICES, THIS_MACHINE, Target
from pspo_jax.planning import memory as plan
from pspo_jax.planning.roofline import update_lower_bound
from pspo_jax.training.setup import prepare
from scripts.make_checkpoint import SHAPES, make
from tests.conftest import DATA
from tests.helpers import tiny_config

ROWS, TOKENIZER = DATA / "math" / "gsm8k_test.jsonl", DATA / "tokenizers" / "qwen2.5"


def test_targets():
    rest, target = plan.take_target(["--run.steps", "3", "--plan", "v5e-8", "--run.seed", "1"])
    assert rest == ["--run.steps", "3", "--run.seed", "1"]
    assert target == Target("v5e-8", "v5e", 8)
    assert plan.take_target(["--plan=h100x4"])[1] == Target("h100x4", "h100", 4)
    assert plan.take_target(["--plan", "h200"])[1].devices == 1
    assert plan.take_target(["--plan", "v5p-8"])[1].devices == 4  # its name counts cores
    assert plan.take_target(["--plan", "v5e"])[1].devices == 1
    assert plan.take_target(["--plan", "--run.steps", "3"])[1].name == "this machine"
    assert plan.take_target(["--run.steps", "3"])[1] is None
    for bad in ("v5x-8", "h100x0", "8"):
        with pytest.raises(ConfigError, match=f"--plan {bad}: name a device"):
            plan.take_target(["--plan", bad])
    for bad, known in (("v5e-12", "v5e-8, v5e-16"), ("v4-7", "v4-8"), ("v5p-4", "v5p-8")):
        with pytest.raises(ConfigError, match=f"--plan {bad}: there is no such slice; there are .*{known}"):
            plan.take_target(["--plan", bad])


def rows_of(out):
    return {name.strip(): float(size) for name, size in re.findall(r"│ +([^│]+?) +│ ([\d.]+) +│", out)}


def test_the_replay_buffer_is_in_the_plan_and_the_first_line_gives_the_answer(capsys):
    """256 groups of 256 completions of 250 tokens: tokens and log-probs of 4 bytes, a mask of 1, and small change."""
    words = ["--algorithm.name", "popo", "--rollout.prompts", "256", "--rollout.group_size", "256"]
    config = parse([*words, "--rollout.max_new_tokens", "250", "--mesh.data", "1"], "train", "")
    assert plan.show(config, THIS_MACHINE) == 0
    out = capsys.readouterr().out
    assert re.match(r"(fits|may not fit|does not fit) on this machine", out)
    found = rows_of(out)["replay"]
    assert found == pytest.approx(256 * 256 * 250 * 9 / 2**30, abs=0.006)


def test_completions_beside_the_batch_are_in_the_plan():
    """Four more completions for each sixteen: a quarter more products, and a buffer of three steps' completions."""
    setups = {
        name: prepare(tiny_config(algorithm__name=name, mesh__data=1, loss__microbatch_rows=0), weights=False)
        for name in ("grpo", "aper")
    }
    products = {name: update_lower_bound(setup, DEVICES["v5e"]).products for name, setup in setups.items()}
    assert products["aper"] == pytest.approx(1.25 * products["grpo"])
    kept = {name: list(plan._update_details(setup).values())[1] for name, setup in setups.items()}
    assert kept["aper"] == pytest.approx(1.25 * kept["grpo"])
    tokens = setups["aper"].task.train.tokens.shape[1] * 4 + 12 * 9
    # Beside the tokens a completion has 10 numbers of 4 bytes at most.
    stored = plan._residents(setups["aper"])["replay"] / (3 * 8 * 4)
    assert tokens < stored <= tokens + 40 and "replay" not in plan._residents(setups["grpo"])


def test_what_carry_over_holds_is_in_the_plan():
    """Two batches of groups: tokens and log-probs of 4 bytes, 4 more with top-p; and little else."""
    fields = {"mesh__data": 1, "rollout__max_new_tokens": 512, "rollout__carry": True, "rollout__budget": 128}
    held = {
        top_p: plan._residents(prepare(tiny_config(**fields, rollout__top_p=top_p), weights=False))[plan.PENDING]
        for top_p in (1.0, 0.9)
    }
    tokens = 2 * 8 * 4 * 512
    assert tokens * 8 < held[1.0] < 1.05 * tokens * 8 and held[0.9] - held[1.0] == tokens * 4
    plain = prepare(tiny_config(mesh__data=1), weights=False)
    assert plan.PENDING not in plan._residents(plain)


GIB = 2**30


@pytest.mark.parametrize(
    ("rollout", "update", "line"),
    [
        ((3, 4), (5, 6), "fits on v5e-8, per device: rollout 4.00 GiB of 16.00, update 6.00 GiB of 16.00"),
        ((3, 4), (12, 20), "may not fit on v5e-8: the update needs 12.00 to 20.00 GiB of 16.00 per device; raise"),
        ((17, 20), (5, 6), "does not fit on v5e-8: the rollout needs 17.00 to 20.00 GiB of 16.00 per device; raise"),
    ],
)
def test_the_headline_says_whether_a_run_fits_and_what_to_change(rollout, update, line):
    peaks = {"rollout": plan.Peak(*(x * GIB for x in rollout)), "update": plan.Peak(*(x * GIB for x in update))}
    verdicts = {phase: plan._verdict(peak, 16 * GIB, exact=False) for phase, peak in peaks.items()}
    assert plan._headline(verdicts, "v5e-8").startswith(line)


def test_a_peak_between_the_least_and_the_compilers_fits_or_not_if_the_compiler_is_the_devices_own():
    peak = plan.Peak(12 * GIB, 20 * GIB)
    assert plan._verdict(peak, 16 * GIB, exact=True).answer == "does not fit"
    assert plan._verdict(peak, float("inf"), exact=True).answer == "capacity unknown"
    refused = plan.Peak(12 * GIB, float("inf"), "Used 17G of 16G hbm")
    assert plan._verdict(refused, 16 * GIB, exact=True) == ("does not fit", "Used 17G of 16G hbm")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize(
    ("target", "words", "kernel"),
    [
        ("v5e-8", "--mesh.fsdp 4 --model.remat offload --rollout.max_new_tokens 512", "splash"),
        ("v6e-16", "--mesh.fsdp 2 --mesh.tensor 2 --rollout.weights split --algorithm.name popo", None),
    ],
)
def test_compiles_for_a_tpu_that_is_not_there(target, words, kernel, child_env):
    """The TPU's own compiler takes the rollout and the update, with its kernel for long rows."""
    argv = [*words.split(), "--model.compute_dtype", "bfloat16", "--run.compilation_cache", "off", "--plan", target]
    # The TPU's compiler is of another version than the CPU's, and ends on flags that it does not know.
    env = {name: value for name, value in child_env.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "pspo_jax.train", *argv], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert 0 < rows["peak of the update: by the TPU's compiler"] < 1
    assert done.stdout.startswith(f"fits on {target}")
    assert "rollout: fits" in done.stdout and "update: fits" in done.stdout
    assert "least time of a step by arithmetic" in done.stdout
    assert (f"attention: {kernel}, packed rows {kernel} (not tried here)" in done.stdout) == (kernel is not None)


@pytest.mark.slow
def test_seven_billion_parameters_without_a_weight(tmp_path, child_env):
    """Qwen2.5-7B's shape with LoRA on 8 devices: the config alone is there."""
    make(tmp_path / "ck", SHAPES["qwen2.5-7b"], "bfloat16", TOKENIZER, config_only=True)
    assert not list((tmp_path / "ck").glob("*.safetensors"))
    argv = {
        "task.name": "gsm8k",
        "task.train_data": ROWS,
        "model.source": tmp_path / "ck",
        "lora.rank": 32,
        "rollout.max_new_tokens": 256,
        "mesh.fsdp": 8,
        "plan": "v5e-8",
    }
    words = [w for k, v in argv.items() for w in (f"--{k}", str(v))]
    env = {k: v for k, v in child_env.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "pspo_jax.train", *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    parameters = 7_615_616_512 + (152_064 - 151_936 - 128) * 3584  # Qwen2.5-7B's own count
    assert rows["frozen base"] == pytest.approx(parameters * 2 / 8 / 2**30, abs=0.01)
    assert rows["in the rollout: weights as they are decoded"] == pytest.approx(parameters * 2 / 2**30, rel=0.02)
    assert rows["capacity"] == 16
    assert "rollout: " in done.stdout and "fit (" in done.stdout and "GiB of 16.00" in done.stdout
    assert not (tmp_path / "runs").exists()
