"""Entry point: `python -m pspo_jax.train [--config FILE.yaml] [--stage.field value ...] [--plan [TARGET]]`.

Without arguments it trains the embedded default with PSPO. In a run folder that holds a checkpoint it carries on.
`--plan` prints the memory that the run would need on each device, and runs nothing; see plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from pspo_jax.config import command_line
from pspo_jax.planning import memory as plan
from pspo_jax.training.loop import train

DESCRIPTION = """RL post-training with verifiable rewards, in JAX.

--plan [TARGET]: print the memory that the run would need on each device of TARGET, such as v5e-8, h100x8 or h200, and
run nothing; without TARGET, on this machine."""


def main(argv: Sequence[str]) -> int:
    argv, target = plan.take_target(argv)
    config = command_line.parse(argv, "python -m pspo_jax.train", DESCRIPTION)
    if config.run.print_config:
        print(command_line.to_yaml(config), end="")
        return 0
    if target is not None:
        return plan.show(config, target)
    return train(config)


if __name__ == "__main__":
    command_line.run(main, "pspo_jax.train")
