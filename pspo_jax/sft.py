"""Entry point: supervised fine-tuning alone.

    python -m pspo_jax.sft --sft.data examples.jsonl --run.dir runs/sft

trains the policy on lines {"prompt": ..., "completion": ...} and leaves it in <run.dir>/cold_start, where
`python -m pspo_jax.train` with the same settings, in the same or a sibling folder, finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pspo_jax import cli
from pspo_jax.io.progress import Progress
from pspo_jax.io.run_folder import open_folder
from pspo_jax.io.stop import stop_requests
from pspo_jax.run_date import with_date
from pspo_jax.setup import configure_runtime, first_params, prepare, verifiers


def main(argv: Sequence[str]) -> int:
    config = cli.parse(argv, "python -m pspo_jax.sft", "Supervised fine-tuning of the policy on demonstrations.")
    if config.run.print_config:
        print(cli.to_yaml(config), end="")
        return 0
    progress = Progress(config.log.progress)
    folder = open_folder(config.run.dir)
    with verifiers(config, folder / "workers.log") as pool:
        configure_runtime(config)
        config = with_date(config, folder / "config.yaml")
        setup = prepare(config, pool=pool, say=progress.say)
    with stop_requests() as stop, jax.set_mesh(setup.mesh):
        first = first_params(setup, folder, progress, stop)
    if first.params is None:
        progress.say("stopped before the end; the same command begins again")
        return 0
    progress.say(f"{first.origin} in {folder / 'cold_start'}; train with the same settings and a --run.dir beside it")
    return 0


if __name__ == "__main__":
    cli.run(main, "pspo_jax.sft")
