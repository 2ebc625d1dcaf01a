"""Checksums of ten seeded short runs: prompts, tokens, parameters and per-prompt state after every step.

    python scripts/run_checksums.py --write FILE
    python scripts/run_checksums.py --compare FILE

A change that must not alter any number, such as a renaming, gives the same file before and after on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _chaos_configs import BASE, TEXT, Fields, accepted, flags, write_world

RUNS: dict[str, Fields] = {
    "grpo": {"algorithm.name": "grpo"},
    "dr_grpo in four microbatches": {"algorithm.name": "dr_grpo", "loss.microbatch_rows": 8},
    "pspo": {"algorithm.name": "pspo"},
    "prioritized_replay, cispo": {"algorithm.name": "prioritized_replay", "loss.name": "cispo"},
    "popo, packed": {"algorithm.name": "popo", "loss.packing": True, "loss.microbatch_rows": 8},
    "dapo with slots": {"algorithm.name": "dapo", "rollout.slots": 8},
    "ers, two iterations and minibatches, KL": {
        "algorithm.name": "ers",
        "loss.num_iterations": 2,
        "loss.minibatches": 2,
        "loss.kl_coef": 0.01,
    },
    "cold start, posterior_mixed, bfloat16": {
        "algorithm.name": "posterior_mixed",
        "sft.steps": 20,
        "model.param_dtype": "bfloat16",
    },
    "spo on two devices": {"devices": 2, "mesh.fsdp": 2, "algorithm.name": "spo"},
    "adapters on text": TEXT | {"algorithm.name": "grpo", "model.source": "checkpoint", "lora.rank": 2},
}


def run(fields: Fields, world: Path, folder: Path) -> list[dict[str, Any]]:
    """The checksums of every step of one run."""
    values = accepted(BASE | {"run.steps": 4} | fields, world, lambda _: None)
    devices = values.get("devices", 1)
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pspo_jax.train", *flags(values, folder)]
    done = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or k.startswith("crc/")} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="FILE", type=Path)
    what.add_argument("--compare", metavar="FILE", type=Path)
    args = parser.parse_args()
    before = json.loads(args.compare.read_text()) if args.compare else {}
    found, differs = {}, 0
    with tempfile.TemporaryDirectory() as place:
        world = Path(place) / "world"
        write_world(world)
        for number, (name, fields) in enumerate(RUNS.items()):
            found[name] = run(fields, world, Path(place) / str(number))
            same = not args.compare or found[name] == before.get(name)
            differs += not same
            print(f"{name}: {'ok' if same else 'DIFFERS'}, {len(found[name])} lines", flush=True)
    if args.write:
        args.write.write_text(json.dumps(found, indent=1))
    return int(differs > 0)


if __name__ == "__main__":
    sys.exit(main())
