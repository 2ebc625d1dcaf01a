"""Runs in processes of their own, and what their folders hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from pspo_jax.checkpoint.reading import saved_steps
from tests import xla

TIMES = ("time/", "step_time", "tokens_per_second")
SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.mlp_width": 64,
    "task.train_prompts": 40,
    "task.heldout_prompts": 16,
    "rollout.prompts": 8,
    "rollout.group_size": 4,
}
"""A model and a task of which a step takes milliseconds."""
COLD_START = {"sft.steps": 200, "sft.batch": 32, "sft.learning_rate": 0.01}
"""Just enough of a cold start that some groups are mixed, so that every part of the state moves."""


def flags(folder, **fields):
    values = SMALL | {
        "run.dir": folder,
        "run.steps": 12,
        "run.fingerprint": True,
        "checkpoint.every": 3,
        "log.report": False,
        "log.to": "none",
        "log.completions_every": 4,
        "eval.samples": 1,
    }
    values |= {k.replace("__", "."): v for k, v in fields.items()}
    if values.get("sft.steps") != 0:
        values = COLD_START | values
    return [word for k, v in values.items() for word in (f"--{k}", str(v))]


def start(env, folder, devices=1, **fields):
    env = env | {"XLA_FLAGS": xla.flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "pspo_jax.train", *flags(folder, **fields)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def metrics(folder, drop=TIMES):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(drop)} for line in lines]


def params(folder):
    """Parts of the last checkpoint, whatever the devices that it was saved from."""
    path = Path(folder) / "checkpoints"
    last = saved_steps(path)[-1]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    there = ocp.checkpointables_metadata((path / str(last)).absolute()).metadata["state"]

    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), there)
    tree = ocp.load_checkpointables((path / str(last)).absolute(), {"state": wanted})["state"]
    return jax.tree.map(
        np.asarray, {k: tree[k] for k in ("params", "selector", "advantage", "replay", "queue") if k in tree}
    )


def lines_of(folder):
    """Lines that are logged; the first is of step 0."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_step(process, folder, at_least, seconds=120):
    """Until the run has logged this many steps, or for so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if lines_of(folder) > at_least:
            return True
        time.sleep(0.01)
    return process.poll() is not None
