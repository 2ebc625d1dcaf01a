"""`python -m pspo_jax.train`: its arguments, and its exit code."""

from __future__ import annotations

from collections.abc import Sequence

from pspo_jax.config import command_line

DESCRIPTION = """RL post-training of language models with verifiable rewards, in JAX.

A laptop trains a small model on the embedded task:
  python -m pspo_jax.train --run.dir runs/demo
A language model, your own rows {"problem": ..., "answer": ...}; with --plan h100 it says first whether the run fits:
  python -m pspo_jax.train --task.name math --task.train_data rows.jsonl \\
      --model.source Qwen/Qwen2.5-1.5B-Instruct --run.dir runs/mine

--plan [TARGET] prints the memory that the run would need on each device of TARGET, such as v5e-8, h100x8, h200 or, for
two slices, 2xv5e-8, and trains nothing. Without TARGET, it plans for this machine."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Its exit code is 0 when the run has finished or was asked to stop, 75 when run.hours stopped it, and 1 when it
    cannot go on.

    Raises:
      ConfigError: bad input.
      StorageError: files cannot be read or written now.
    """
    prog = command_line.program("train")
    command_line.show_help(argv, prog, DESCRIPTION)
    command_line.show_recipe(argv)
    # These import JAX, which takes seconds; the help text needs none of it.
    from pspo_jax.planning import memory
    from pspo_jax.runs.verdicts import NoVerdictError
    from pspo_jax.training.loop import train
    from pspo_jax.training.run_end import OUT_OF_TIME, NotFiniteError

    argv, target = memory.take_target(argv)
    config = command_line.parse(argv, prog, DESCRIPTION)
    if config.run.print_config:
        print(command_line.to_yaml(config), end="")
        return 0
    if target is not None:
        return memory.show(config, target)
    try:
        result = train(config, as_command=True)
    except (NoVerdictError, NotFiniteError):
        return 1  # The loop has printed why.
    return OUT_OF_TIME if result.ended_by == "run.hours" else 0


def command() -> None:
    """`pspo-train`, which is `python -m pspo_jax.train`."""
    command_line.run_command(main, "train")
