"""Entry point of supervised fine-tuning without RL.

    python -m pspo_jax.sft --model.source Qwen/Qwen2.5-0.5B --sft.data examples.jsonl --run.dir runs/sft
    python -m pspo_jax.sft --run.dir runs/sft

The first command trains a language model on lines {"prompt": ..., "completion": ...} or {"messages": [...]}, with
images if it has a vision tower; it needs no other data. The second trains the embedded model on demonstrations of its
task. If sft.steps is not set, a language model passes through the file three times. The weights are written to
<run.dir>/cold_start, where `python -m pspo_jax.train` with the same settings, in the same or a sibling folder, finds
them. A language model is also written to <run.dir>/model, a folder in Hugging Face's format that model.source accepts
and `python -m pspo_jax.export` copies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import yaml

from pspo_jax.commands.sft import prepare_supervised, write_supervised
from pspo_jax.config import command_line
from pspo_jax.config.defaults import uses_char_tokenizer
from pspo_jax.config.fields import ConfigError, Value
from pspo_jax.config.schema import Config
from pspo_jax.data.demonstrations import read_text
from pspo_jax.data.task import json_lines
from pspo_jax.distributed import processes
from pspo_jax.runs.mirror import mirrored
from pspo_jax.runs.run_date import with_date
from pspo_jax.runs.run_folder import open_folder
from pspo_jax.system.progress import Progress
from pspo_jax.system.time_limit import TimeLimit
from pspo_jax.training.first_params import first_params
from pspo_jax.training.run_end import OUT_OF_TIME, stop_reason
from pspo_jax.training.setup import started

DESCRIPTION = "Supervised fine-tuning of a model on demonstrations."
EPOCHS = 3
"""Passes through the file if sft.steps is not set."""
_NO_DATA = "sft.data=None: a language model needs demonstrations; name a JSONL file"
MOST_BATCH, MOST_WARMUP = 16, 10
TEXT_DEFAULTS: dict[str, Value] = {"batch": MOST_BATCH, "learning_rate": 1e-5, "warmup": MOST_WARMUP}
"""Fields of `sft` for a language model, where the user does not set them; a file of few lines lowers batch and warm-up.
The number of steps follows from the number of lines."""
_UNSET = 2**30
"""Value of sft.steps that stands for "not set"; no user asks for as many steps."""


def main(argv: Sequence[str]) -> int:
    config = read_config(argv)
    if config.run.print_config:
        print(command_line.to_yaml(config), end="")
        return 0
    if config.run.start_over:
        raise ConfigError(
            "run.start_over=true: applies to pspo_jax.train only; drop it, as a cold start with other settings is set "
            "aside anyway"
        )
    folder, limit = open_folder(config.run.dir), TimeLimit(config.run.hours)
    say = Progress(config.log.progress).say
    with started(config, folder) as (pool, stop_requested), mirrored(folder, say, processes.is_primary()):
        config = with_date(config, folder / "config.yaml")
        progress = Progress(config.log.progress and processes.is_primary(), quiet=not processes.is_primary())
        setup = prepare_supervised(config, pool, progress)
        with jax.set_mesh(setup.mesh):
            first = first_params(
                setup, folder, progress, lambda: processes.any_process(stop_requested() or limit.over())
            )
            if first.params is None:
                return OUT_OF_TIME if stop_reason(stop_requested, limit) == "run.hours" else 0
            return write_supervised(setup, first, folder, progress)


def read_config(argv: Sequence[str]) -> Config:
    """The config of a command line. A language model that learns from sft.data needs no task.

    Raises:
      ConfigError: a field is invalid, as in `command_line.parse`, or there are no demonstrations.
    """
    command_line.show_help(argv, command_line.program("sft"), DESCRIPTION)
    typed = {word.partition("=")[0] for word in argv}
    if typed & {"--model.source", "--model.tokenizer"} and not typed & {"--sft.data", "--config"}:
        raise ConfigError(_NO_DATA)
    try:
        config = _parse({"task": {"name": "countdown"}, "sft": TEXT_DEFAULTS | {"steps": _UNSET, "warmup": 0}}, argv)
    except ConfigError as error:
        try:
            config = command_line.parse(argv, command_line.program("sft"), DESCRIPTION)  # fields of a character task
        except ConfigError:
            raise error from None
    if uses_char_tokenizer(config):
        return _checked(command_line.parse(argv, command_line.program("sft"), DESCRIPTION))
    if config.sft.data is None:
        raise ConfigError(_NO_DATA)
    lines = len(json_lines(read_text(Path(config.sft.data))))
    if not lines:
        raise ConfigError(f"sft.data={config.sft.data}: contains no rows; name another file")
    batch = min(config.sft.batch, lines)
    steps = -(-EPOCHS * lines // batch) if config.sft.steps == _UNSET else config.sft.steps
    few = {"batch": min(MOST_BATCH, lines), "warmup": min(MOST_WARMUP, steps // 10)}
    defaults = TEXT_DEFAULTS | few | {"steps": steps}
    return _checked(_parse({"task": {"name": "countdown"}, "sft": defaults}, argv))


def _checked(config: Config) -> Config:
    """The config, if it has steps to train."""
    if not config.sft.steps:
        raise ConfigError("sft.steps=0: leaves nothing to train; raise it")
    return config


def _parse(defaults: Mapping[str, Mapping[str, Value]], argv: Sequence[str]) -> Config:
    """`command_line.parse` with a file of defaults, stage -> field -> value, before all other files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defaults.yaml"
        path.write_text(yaml.safe_dump({stage: dict(values) for stage, values in defaults.items()}))
        return command_line.parse(["--config", str(path), *argv], command_line.program("sft"), DESCRIPTION)


def command() -> None:
    """`pspo-sft`, which is `python -m pspo_jax.sft`."""
    command_line.run_command(main, "sft")


if __name__ == "__main__":
    command()
