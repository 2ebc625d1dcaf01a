"""Supervised fine-tuning alone: what it prepares, and the model that it leaves."""

from __future__ import annotations

from pathlib import Path

import jax

from pspo_jax.commands.export import write_model
from pspo_jax.config.defaults import replace, uses_char_tokenizer
from pspo_jax.config.schema import Config
from pspo_jax.data.demonstrations import demonstration_task
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.distributed import processes
from pspo_jax.model.huggingface.save import write_folder
from pspo_jax.runs import history
from pspo_jax.runs.home import shown
from pspo_jax.system.progress import Progress
from pspo_jax.training.architectures import architecture_for
from pspo_jax.training.first_params import FirstParams
from pspo_jax.training.setup import Setup, prepare
from pspo_jax.verifiers.workers.pool import Pool


def prepare_supervised(config: Config, pool: Pool | None, progress: Progress) -> Setup:
    """The setup of supervised training.

    A language model has no RL task here, and the fields of one must not restrict the mesh.
    """
    if uses_char_tokenizer(config):
        return prepare(config, pool=pool, say=progress.say)
    _, tokenizer, _ = architecture_for(config)
    assert isinstance(tokenizer, TextTokenizer)
    idle = {
        "rollout.prompts": len(jax.devices()),
        "rollout.chunks": 1,
        "rollout.slots": None,
        "rollout.stages": None,
        "rollout.longest_first": False,
        "rollout.dynamic_sampling_rounds": 1,
        "rollout.oversampling": 1.0,
        "loss.minibatches": 1,
    }
    config = replace(config, idle)
    return prepare(config, pool=pool, say=progress.say, task=demonstration_task(config, tokenizer))


def write_supervised(setup: Setup, first: FirstParams, folder: Path, progress: Progress) -> int:
    """Write a language model as a checkpoint, and print how training can begin from it."""
    c = setup.config
    progress.say(f"{first.origin} in {shown(folder / 'cold_start', folder)}")
    fields = [f"--sft.{name} {getattr(c.sft, name)}" for name in ("steps", "batch", "learning_rate", "warmup")]
    same = f"train with the same settings ({' '.join(fields)}) and a --run.dir beside it"
    if processes.is_primary():
        history.write_config(folder, c)
    if uses_char_tokenizer(c):
        progress.say(same)
        return 0
    params = processes.to_host(first.params)
    if processes.is_primary():
        out = folder / "model"
        write_folder(out, lambda place: write_model(place, c, params), replace=True)
        progress.say(
            f"{shown(out, folder)} is the model in Hugging Face's format: train it with --model.source {out}, or {same}"
        )
    processes.wait_for_all("model")
    return 0
