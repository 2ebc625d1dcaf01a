"""Entry point of training: `python -m pspo_jax.train [--config FILE.yaml] [--stage.field value ...] [--plan [TARGET]]`.

Without arguments it trains a small model on the embedded task. In a run folder that holds a checkpoint, it resumes.
`--plan` prints the memory that the run would need on each device, and trains nothing (`planning/memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pspo_jax.config import command_line

PROG = "python -m pspo_jax.train"
DESCRIPTION = """RL post-training of language models with verifiable rewards, in JAX.

A laptop trains a small model on the embedded task:
  python -m pspo_jax.train --run.dir runs/demo
A language model, your own rows {"problem": ..., "answer": ...}; with --plan h100 it says first whether the run fits:
  python -m pspo_jax.train --task.name math --task.train_data rows.jsonl \\
      --model.source Qwen/Qwen2.5-1.5B-Instruct --run.dir runs/mine

--plan [TARGET] prints the memory that the run would need on each device of TARGET, such as v5e-8, h100x8 or h200, and
trains nothing. Without TARGET, it plans for this machine."""


def main(argv: Sequence[str]) -> int:
    command_line.show_help(argv, PROG, DESCRIPTION)
    # These import JAX, which takes seconds; the help text needs none of it.
    from pspo_jax.planning import memory
    from pspo_jax.training.loop import train

    argv, target = memory.take_target(argv)
    config = command_line.parse(argv, PROG, DESCRIPTION)
    if config.run.print_config:
        print(command_line.to_yaml(config), end="")
        return 0
    if target is not None:
        return memory.show(config, target)
    return train(config)


if __name__ == "__main__":
    command_line.run(main, "pspo_jax.train")
