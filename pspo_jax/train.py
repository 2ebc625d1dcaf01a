"""Entry point: `python -m pspo_jax.train [--config FILE.yaml] [--stage.field value ...]`.

Without arguments it trains the embedded default with PSPO. In a run folder that holds a checkpoint it carries on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pspo_jax import cli
from pspo_jax.loop import train


def main(argv: Sequence[str]) -> int:
    config = cli.parse(argv, "python -m pspo_jax.train", "RL post-training with verifiable rewards, in JAX.")
    if config.run.print_config:
        print(cli.to_yaml(config), end="")
        return 0
    return train(config)


if __name__ == "__main__":
    cli.run(main, "pspo_jax.train")
