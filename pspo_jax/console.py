"""The commands that an installation has beside `python -m`: pspo-train, pspo-sft, pspo-evaluate, pspo-export and
pspo-report. Each imports what it runs when it is called.
"""

from __future__ import annotations

from pspo_jax.config import command_line


def train() -> None:
    """`pspo-train`, which is `python -m pspo_jax.train`."""
    from pspo_jax.commands.train import main

    command_line.run(main, "pspo-train")


def sft() -> None:
    """`pspo-sft`, which is `python -m pspo_jax.sft`."""
    from pspo_jax.sft import main

    command_line.run(main, "pspo-sft")


def evaluate() -> None:
    """`pspo-evaluate`, which is `python -m pspo_jax.evaluate`."""
    from pspo_jax.evaluate import main

    command_line.run(main, "pspo-evaluate")


def export() -> None:
    """`pspo-export`, which is `python -m pspo_jax.export`."""
    from pspo_jax.export import main

    command_line.run(main, "pspo-export")


def report() -> None:
    """`pspo-report`, which is `python -m pspo_jax.report`."""
    from pspo_jax.report import main

    command_line.run(main, "pspo-report")
