"""`python -m pspo_jax.train`: its arguments, and its exit code."""

from __future__ import annotations

from collections.abc import Sequence

from pspo_jax.config import command_line
from pspo_jax.planning import memory as plan
from pspo_jax.runs.verdicts import NoVerdictError
from pspo_jax.training.loop import NotFiniteError, train

DESCRIPTION = """RL post-training with verifiable rewards, in JAX.

--plan [TARGET]: print the memory that the run would need on each device of TARGET, such as v5e-8, h100x8 or h200, and
run nothing; without TARGET, on this machine."""


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code is 0 when the run has finished or was asked to stop, 1 when it cannot go on.

    Raises:
      ConfigError: bad input.
      StorageError: files cannot be read or written now.
    """
    argv, target = plan.take_target(argv)
    config = command_line.parse(argv, "python -m pspo_jax.train", DESCRIPTION)
    if config.run.print_config:
        print(command_line.to_yaml(config), end="")
        return 0
    if target is not None:
        return plan.show(config, target)
    try:
        train(config, as_command=True)
    except (NoVerdictError, NotFiniteError):
        return 1  # The loop has printed why.
    return 0
