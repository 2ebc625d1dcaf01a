"""Random valid configurations for scripts/chaos.py, and the small files that their runs read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_checkpoint import QWEN2, make

from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.data.synthetic.arithmetic import TOKENIZER

Fields = dict[str, Any]
"""Dotted field -> value, as on the command line; `devices` and `distributed.processes` say how the run is started."""

BASE: Fields = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 16,
    "task.train_prompts": 24,
    "task.heldout_prompts": 8,
    "rollout.prompts": 8,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 8,
    "sft.steps": 0,
    "run.steps": 6,
    "run.fingerprint": True,
    "checkpoint.every": 2,
    "eval.every": 3,
    "eval.samples": 1,
    "log.completions_every": 2,
    "log.selection_every": 3,
    "log.report": False,
    "log.to": "none",
}
"""A run of a few seconds; random fields come on top."""

TEXT: Fields = {
    "task.name": "gsm8k",
    "task.train_data": "rows.jsonl",
    "task.train_prompts": 0,
    "task.cache": "cache",
    "prompt.template": "none",
    "reward.require_end": False,
    "verifier.workers": 2,
    "rollout.max_new_tokens": 2,
    "rollout.prompt_bucket": 8,
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "optimizer.learning_rate": 1e-4,
}
"""A run whose completions are verified by worker processes."""

_ALGORITHMS = (
    "grpo",
    "dr_grpo",
    "rloo",
    "maxrl",
    "ers",
    "pps",
    "pspo",
    "prioritized_replay",
    "mopps",
    "posterior_mixed",
    "spo",
    "greso",
    "difficulty_pools",
    "dapo",
    "grpo_filter",
    "popo",
    "aper",
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "selection.cooldown": (1,),
    "selection.exploration": (0.25,),
    "selection.replacement": (True,),
    "replay.name": ("filter", "popo", "aper"),
    "replay.order": ("variance", "random", "kl"),
    "replay.capacity": (16,),
    "replay.memory": ("pinned_host",),
    "rollout.chunks": (2,),
    "rollout.slots": (8,),
    "rollout.oversampling": (1.5,),
    "loss.name": ("cispo", "gspo", "reinforce"),
    "loss.packing": (True,),
    "loss.microbatch_rows": (8, 0),
    "loss.num_iterations": (2,),
    "loss.minibatches": (2,),
    "loss.kl_coef": (0.01,),
    "model.param_dtype": ("bfloat16",),
    "model.compute_dtype": ("bfloat16",),
    "checkpoint.every": (1, 3),
    "checkpoint.keep": (1,),
    "log.to": ("tensorboard",),
    "log.completions_format": ("parquet",),
}
"""Fields that a random configuration may set, with their values."""
_MESHES: tuple[Fields, ...] = (
    {"devices": 2, "mesh.data": 2},
    {"devices": 2, "mesh.fsdp": 2},
    {"devices": 4, "mesh.fsdp": 2, "mesh.tensor": 2},
    {"devices": 2, "mesh.context": 2},
    {"devices": 2, "distributed.processes": 2, "mesh.data": 2},
)


def draw(rng: random.Random, world: Path, start: Callable[[Fields], str | None]) -> Fields:
    """A random configuration that the program accepts; fields that it refuses are dropped.

    Args:
    start: starts a configuration and returns the field that the program then refuses, or None.
    """
    fields = {"algorithm.name": rng.choice(_ALGORITHMS)}
    fields |= {name: rng.choice(values) for name, values in _CHOICES.items() if rng.random() < 0.15}
    family = rng.choice(("made", "made", "made", "supervised", "text", "lora"))
    if family == "supervised":
        fields |= {"sft.steps": 20}
    elif family == "text":
        fields |= TEXT | {"model.tokenizer": "tokenizer"}
    elif family == "lora":
        fields |= TEXT | {"model.source": "checkpoint", "lora.rank": 2}
    if rng.random() < 0.3:
        fields |= rng.choice(_MESHES)
    return accepted(BASE | fields, world, start)


def without_shape(fields: Fields) -> Fields:
    """`fields` without a model's own, where its checkpoint has them."""
    if "model.source" not in fields:
        return fields
    return {k: v for k, v in fields.items() if not k.startswith("model.") or k == "model.source"}


def accepted(fields: Fields, world: Path, start: Callable[[Fields], str | None]) -> Fields:
    """`fields` without those that the program refuses in this combination."""
    fields = without_shape(fields)
    while (named := _refused(flags(fields, world / "run")) or start(fields)) is not None:
        if named not in fields:
            raise ValueError(f"the program refuses {named}, which no choice set: {fields}")
        fields = {k: v for k, v in fields.items() if k != named}
    return fields


def _refused(words: list[str]) -> str | None:
    """Name of the field that the command line refuses; None = it accepts all fields."""
    try:
        command_line.parse(words, "chaos", "")
    except ConfigError as error:
        return refused_field(str(error))
    return None


def refused_field(message: str) -> str:
    """Name of the field with which a message of the program begins."""
    return message.partition("=")[0].strip()


def flags(fields: Fields, folder: Path) -> list[str]:
    """Flags of the command."""
    values = {k: v for k, v in fields.items() if k not in ("devices", "distributed.processes")}
    return [word for k, v in (values | {"run.dir": folder}).items() for word in (f"--{k}", str(v))]


def write_world(world: Path, say: Callable[[str], None] = print) -> None:
    """Write the files that runs read: rows, a tokenizer of 16 characters, and a checkpoint of random weights for it."""
    if (world / "ready").exists():
        return
    world.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{a}+{b}=", "answer": f"#### {2 + 3 * (a % 2)}"} for a in range(10, 26) for b in (1, 2)]
    (world / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    TOKENIZER.to_hf().save_pretrained(world / "tokenizer")
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": len(TOKENIZER.to_hf()), "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    make(world / "checkpoint", QWEN2 | size | heads | ids, "float32", world / "tokenizer", config_only=False)
    (world / "checkpoint" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["eos_token_id"]}))
    (world / "ready").write_text("")
    say(f"wrote {world}")
