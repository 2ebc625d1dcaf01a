"""The least time of a step on several targets, as a Markdown table. It is computed, not measured.

python scripts/roofline.py v5e-8 v6e-8 h200x8 -- --config pspo_qwen25_math_1p5b ...
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed.devices import DEVICES, parse_target
from pspo_jax.planning.roofline import LowerBound, rollout_lower_bound, traffic, update_lower_bound
from pspo_jax.training.setup import prepare

_COLUMNS = (
    "Devices",
    "data x fsdp x context x tensor",
    "Rollout, s",
    "bound by",
    "Update, s",
    "bound by",
    "Sent, GB",
)


def main(argv: Sequence[str]) -> int:
    names, flags = (list(argv[: argv.index("--")]), argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if not names:
        raise ConfigError("name at least one target, such as v5e-8 or h200x8")
    targets = [parse_target(name) for name in names]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(t.devices * t.slices for t in targets))
    config = command_line.parse(flags, "scripts/roofline.py", __doc__ or "")
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|---" * len(_COLUMNS) + "|")
    for target in targets:
        device = DEVICES[target.kind or ""]
        sliced = replace(config, {"mesh.slices": target.slices})
        devices = jax.devices()[: target.devices * target.slices]
        setup = prepare(sliced, weights=False, capacity=device.memory, devices=devices)
        shape = setup.mesh.shape
        mesh = f"{shape['slice'] * shape['data']} x {shape['fsdp']} x {shape['context']} x {shape['tensor']}"
        cells = [target.name, mesh]
        for bound in (rollout_lower_bound(setup, device), update_lower_bound(setup, device)):
            cells += [f"{bound.seconds:.2g}", _bound(bound)]
        print("| " + " | ".join([*cells, f"{sum(traffic(setup)) / 1e9:.1f}"]) + " |")
    return 0


def _bound(bound: LowerBound) -> str:
    return max(bound._fields, key=lambda name: getattr(bound, name))


if __name__ == "__main__":
    command_line.run(main, "scripts/roofline.py")
