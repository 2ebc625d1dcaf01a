"""Entry point of training: `python -m pspo_jax.train [--config FILE.yaml] [--stage.field value ...] [--plan [TARGET]]`.

Without arguments it trains a small model on the embedded task. In a run folder that holds a checkpoint, it resumes.
`--plan` prints the memory that the run would need on each device, and trains nothing (`planning/memory.py`).

`pspo_jax.train` is also the name of a function, which an import of this module would hide. So it is never imported.
"""

from pspo_jax.commands.train import command

if __name__ == "pspo_jax.train":
    raise ImportError(
        "pspo_jax.train is a function: write `import pspo_jax` and call pspo_jax.train(config). The module of this "
        "name is for `python -m pspo_jax.train`; its main is pspo_jax.commands.train.main"
    )

if __name__ == "__main__":
    command()
