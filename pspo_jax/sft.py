"""Entry point: supervised fine-tuning alone.

    python -m pspo_jax.sft --policy.source Qwen/Qwen2.5-0.5B --sft.data examples.jsonl --run.dir runs/sft
    python -m pspo_jax.sft --run.dir runs/sft

The first trains a language model on lines {"prompt": ..., "completion": ...} or {"messages": [...]}; it needs no other
data. The second trains the embedded policy on demonstrations of its task. Without sft.steps a language model goes
through the file three times. What was learnt is left in <run.dir>/cold_start, where `python -m pspo_jax.train` with the
same settings, in the same or a sibling folder, finds it. A language model is also written to <run.dir>/model, a folder
in Hugging Face's format, which policy.source takes and `python -m pspo_jax.export` copies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import yaml

from pspo_jax import cli
from pspo_jax.config import Config, ConfigError, embedded, replace
from pspo_jax.demonstrations import demonstration_task, read_text
from pspo_jax.export import write_model
from pspo_jax.io import history
from pspo_jax.io.hf_folder import write_folder
from pspo_jax.io.lock import locked
from pspo_jax.io.progress import Progress
from pspo_jax.io.run_folder import open_folder
from pspo_jax.io.stop import stop_requests
from pspo_jax.parallel import hosts
from pspo_jax.run_date import with_date
from pspo_jax.setup import FirstParams, Setup, architecture_for, configure_runtime, first_params, prepare, verifiers
from pspo_jax.tasks import TextTokenizer
from pspo_jax.tasks.base import json_lines

PROG = "python -m pspo_jax.sft"
DESCRIPTION = "Supervised fine-tuning of the policy on demonstrations."
EPOCHS = 3
_NO_DATA = "sft.data=None: a language model needs demonstrations; name a JSONL file"
TEXT_DEFAULTS: dict[str, Any] = {"batch": 16, "learning_rate": 1e-5, "warmup": 10}
"""What fields of `sft` are at most for a language model if they are not set: a file of few lines lowers batch and
warm-up. Steps that are not set follow from the file's lines."""
_UNSET = 2**30
"""Steps that nobody sets."""


def main(argv: Sequence[str]) -> int:
    config = read_config(argv)
    if config.run.print_config:
        print(cli.to_yaml(config), end="")
        return 0
    if config.run.start_over:
        raise ConfigError(
            "run.start_over=true: is for pspo_jax.train; a cold start of other settings is set aside anyway"
        )
    folder = open_folder(config.run.dir)
    with ExitStack() as held, stop_requests() as asked:
        progress = Progress(config.log.progress)
        # As in training: where only a cluster knows who leads, the lock waits until all have joined.
        number = hosts.number_before_joining(config)
        if number is not None:
            held.enter_context(locked(folder, progress.say, number))
        pool = held.enter_context(verifiers(config, folder / "workers.log"))
        hosts.initialize(config)
        with hosts.failing_together():
            if number is None and hosts.leads():
                held.enter_context(locked(folder, progress.say))
            configure_runtime(config)
            config = with_date(config, folder / "config.yaml")
            progress = Progress(config.log.progress and hosts.leads(), quiet=not hosts.leads())
            setup = _prepare(config, pool, progress)
            with jax.set_mesh(setup.mesh):
                first = first_params(setup, folder, progress, lambda: hosts.any_says(asked()))
                return 0 if first.params is None else _finish(setup, first, folder, progress)


def read_config(argv: Sequence[str]) -> Config:
    """The config of a command line. A policy of text that is to learn from sft.data needs no task.

    Raises:
      ConfigError: as `cli.parse`, or there is nothing to learn from.
    """
    typed = {word.partition("=")[0] for word in argv}
    if typed & {"--policy.source", "--policy.tokenizer"} and not typed & {"--sft.data", "--config", "-h", "--help"}:
        raise ConfigError(_NO_DATA)
    try:
        config = _parse({"task": {"name": "countdown"}, "sft": TEXT_DEFAULTS | {"steps": _UNSET, "warmup": 0}}, argv)
    except ConfigError as error:
        try:
            config = cli.parse(argv, PROG, DESCRIPTION)  # fields of another task that has its own alphabet
        except ConfigError:
            raise error from None
    if embedded(config):
        return _checked(cli.parse(argv, PROG, DESCRIPTION))
    if config.sft.data is None:
        raise ConfigError(_NO_DATA)
    lines = len(json_lines(read_text(Path(config.sft.data))))
    if not lines:
        raise ConfigError(f"sft.data={config.sft.data}: holds no rows; name another")
    batch = min(config.sft.batch, lines)
    steps = -(-EPOCHS * lines // batch) if config.sft.steps == _UNSET else config.sft.steps
    few = {"batch": min(TEXT_DEFAULTS["batch"], lines), "warmup": min(TEXT_DEFAULTS["warmup"], steps // 10)}
    defaults = TEXT_DEFAULTS | few | {"steps": steps}
    return _checked(_parse({"task": {"name": "countdown"}, "sft": defaults}, argv))


def _checked(config: Config) -> Config:
    if not config.sft.steps:
        raise ConfigError("sft.steps=0: there is nothing to train; raise it")
    return config


def _parse(defaults: dict[str, Any], argv: Sequence[str]) -> Config:
    """`cli.parse` with a file of defaults before all others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defaults.yaml"
        path.write_text(yaml.safe_dump(defaults))
        return cli.parse(["--config", str(path), *argv], PROG, DESCRIPTION)


def _prepare(config: Config, pool: Any, progress: Progress) -> Setup:
    """What training needs; for a language model without a task of RL, whose fields its mesh must not depend on."""
    if embedded(config):
        return prepare(config, pool=pool, say=progress.say)
    _, tokenizer, _ = architecture_for(config)
    assert isinstance(tokenizer, TextTokenizer)
    idle = {
        "rollout.prompts": len(jax.devices()),
        "rollout.chunks": 1,
        "rollout.slots": None,
        "rollout.max_rounds": 1,
        "rollout.oversampling": 1.0,
        "objective.minibatches": 1,
    }
    config = replace(config, idle)
    return prepare(config, pool=pool, say=progress.say, task=demonstration_task(config, tokenizer))


def _finish(setup: Setup, first: FirstParams, folder: Path, progress: Progress) -> int:
    """Write a language model as a checkpoint, and say what can be done with what was learnt."""
    c = setup.config
    progress.say(f"{first.origin} in {folder / 'cold_start'}")
    fields = [f"--sft.{name} {getattr(c.sft, name)}" for name in ("steps", "batch", "learning_rate", "warmup")]
    same = f"train with the same settings ({' '.join(fields)}) and a --run.dir beside it"
    if embedded(c):
        progress.say(same)
        return 0
    params = hosts.whole(first.params)
    if hosts.leads():
        history.write_config(folder, c)
        out = folder / "model"
        write_folder(out, lambda place: write_model(place, c, params), replace=True)
        progress.say(f"{out} is the model in Hugging Face's format: train it with --policy.source {out}, or {same}")
    hosts.wait_for_all("model")
    return 0


if __name__ == "__main__":
    cli.run(main, "pspo_jax.sft")
