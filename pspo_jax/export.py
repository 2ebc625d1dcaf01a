"""Entry point of export: `python -m pspo_jax.export --run RUN --out DIR [--step N|latest|best|all] [--adapter-only]
[--push-to ID [--private]]`.

It writes a run as a Hugging Face checkpoint: safetensors, config, tokenizer, generation config and a model card. It
computes on the CPU, so that it can run beside a training job, and the folder appears when it is complete. Started as
several processes, as training is (--distributed.coordinator and so on), process 0 writes, and the others wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from pspo_jax.commands.export import copy_finished_model, exporter, publisher, refuse_existing
from pspo_jax.config import command_line
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.distributed import processes
from pspo_jax.model.huggingface.save import write_folder
from pspo_jax.runs.access import choose_steps, read_config
from pspo_jax.runs.home import local_path
from pspo_jax.runs.mirror import reading

_SECONDS = 86400.0
"""Seconds that the other processes wait for the one that writes."""


def main(argv: Sequence[str]) -> int:
    args, overrides = _arguments(argv)
    jax.config.update("jax_platforms", "cpu")
    local_path("--out", args.out)
    processes.initialize(command_line.parse(overrides, command_line.program("export"), ""))
    with processes.fail_together():
        if processes.is_primary():
            with reading(args.run, model=True) as (args.run, _):
                _export(args)
        processes.wait_for_all("export", _SECONDS)
    return 0


def _export(args: argparse.Namespace) -> None:
    """Write the checkpoints that the arguments name."""
    config = read_config(args.run)
    if args.base is not None:
        if config.model.source is None:
            raise ConfigError(
                f"--base {args.base}: this run started from random weights (model.source=None); leave it out"
            )
        config = replace(config, {"model.source": args.base})
    if copy_finished_model(args):
        return
    steps = choose_steps(args.run, args.step)
    if args.push_to and len(steps) > 1:
        raise ConfigError(f"--push-to {args.push_to}: uploads one checkpoint at a time; choose a --step")
    refuse_existing(args.out)
    write = exporter(config, args.run, args.dtype, args.adapter_only)
    publish = publisher(args.push_to, args.private)
    for step in steps:
        out = args.out if args.step != "all" else args.out / f"step_{step:06d}"
        write_folder(out, lambda folder, step=step: write(folder, step))  # type: ignore[misc]
        print(out)
        publish(out, f"Upload step {step} of {args.run.resolve().name}")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The export's own arguments, and the words that say which of several processes this is."""
    parser = command_line.Parser(
        prog=command_line.program("export"), description="Write a run as a Hugging Face checkpoint."
    )
    parser.add_argument("--run", metavar="RUN", required=True, help="run folder or gs:// URL, as run.dir in training")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="new folder; with --step all, a folder of folders"
    )
    parser.add_argument("--step", metavar="N", default="latest", help="a step, latest (default), best or all")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights (default: the source's)",
    )
    parser.add_argument("--adapter-only", action="store_true", help="write adapters in PEFT's layout, not merged")
    parser.add_argument("--base", metavar="SOURCE", help="new place of the run's model.source, if it has moved")
    parser.add_argument(
        "--push-to", metavar="ID", help="hub repository to upload to as well; it is made if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="make the repository of --push-to a private one")
    args, rest = parser.parse_known_args(argv)
    others = [word for word in rest if word.startswith("-") and not word.startswith("--distributed.")]
    if others or (rest and not rest[0].startswith("-")):
        raise ConfigError(f"{(others or rest)[0]}: export knows no such flag; --help lists those that it knows")
    return args, rest


def command() -> None:
    """`pspo-export`, which is `python -m pspo_jax.export`."""
    command_line.run_command(main, "export")


if __name__ == "__main__":
    command()
