"""The history of the run in a folder: its settings, their changes, and how far it came."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from pspo_jax.config import command_line
from pspo_jax.config.defaults import flatten, replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.runs.access import read_lines, read_settings
from pspo_jax.runs.home import home_of
from pspo_jax.runs.lock import NAME as LOCK
from pspo_jax.system.buckets import Place, children, exists, move
from pspo_jax.system.storage import append_whole, write_whole

_NOT_KEPT = {"run.start_over": False, "run.print_config": False, "task.allow_change": False}
"""Fields that hold for one command and are never kept, with the value that the folder keeps instead."""
_UNSAID = (
    *("run.dir", "run.hours", "run.profile", "run.profile_memory", "run.fingerprint", "run.compilation_cache"),
    *("sft.share", "task.cache", *_NOT_KEPT),
)
"""Fields that only say where files are, what is shown and how long one start may last, with every field of
`_UNSAID_STAGES`. A resumed run may change them without a record."""
_UNSAID_STAGES = ("distributed.", "runtime.", "log.")
_DATA = (
    "task.train_data",
    "task.heldout_data",
    "task.subset",
    "task.train_split",
    "task.heldout_split",
    "task.revision",
)
"""Fields that say where data are; the contents of the data decide whether the run can be carried on."""
MAY_CHANGE = (
    "run.steps",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.schedule",
    "optimizer.final_fraction",
    "optimizer.max_skipped",
    "model.source",
    "model.revision",
    "model.tokenizer",
    "model.remat",
    "model.scan_unroll",
    "model.attention",
    "model.decode_attention",
    "sft.data",
    "teacher.source",
    "teacher.revision",
    "teacher.step",
    "judge.url",
    "judge.api_key_variable",
    "judge.concurrency",
    "judge.deadline",
    "judge.retries",
    "rollout.chunks",
    "rollout.weights",
    "rollout.slots",
    "rollout.stages",
    "loss.microbatch_rows",
    "loss.microbatch_tokens",
    "loss.logits_mib",
    "loss.packing",
    "loss.share_prompts",
    *_DATA,
)
"""Fields that a resumed run may change, with every field of `_FREE_STAGES`; each change is printed and recorded."""
_FREE_STAGES = ("mesh.", "eval.", "checkpoint.", "verifier.")


class Change(NamedTuple):
    """A setting that a resumed run has changed."""

    field: str
    old: object
    new: object


def settings(config: Config) -> dict[str, object]:
    """The config as a folder and its checkpoints keep it: dotted field -> value."""
    return dict(json.loads(json.dumps(flatten(replace(config, _NOT_KEPT)))))


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, atomically.

    Raises:
      StorageError: it cannot be written; the one before is still there.
    """
    write_whole(folder / "config.yaml", command_line.to_yaml(replace(config, _NOT_KEPT)).encode())


def changes(folder: Path, saved: dict[str, object], config: Config) -> list[Change]:
    """The changes since a checkpoint was saved that a resumed run may make.

    Raises:
      ConfigError: another setting differs, which would make it another run.
    """
    now = settings(config)
    free = (*_FREE_STAGES, "task.") if config.task.allow_change else _FREE_STAGES
    found, refused = [], []
    for key in {**saved, **now}:
        old, new = saved.get(key), now.get(key)
        if old == new or key in _UNSAID or key.startswith(_UNSAID_STAGES):
            continue
        if key in MAY_CHANGE or key.startswith(free) or (key == "task.mixture" and _same_mixture(old, new)):
            found.append(Change(key, old, new))
        else:
            refused.append(f"{key}={old} there, {new} now")
    if refused:
        raise ConfigError(
            f"run.dir={folder}: holds a run of another config ({'; '.join(refused)}); choose another --run.dir or "
            "restore these values"
        )
    return found


def _same_mixture(old: object, new: object) -> bool:
    """Whether two mixtures differ in where their data are alone."""
    places = {name.removeprefix("task.") for name in _DATA}

    def bare(text: object) -> list[dict[str, object]]:
        return [{name: value for name, value in part.items() if name not in places} for part in json.loads(str(text))]

    return bool(old and new and bare(old) == bare(new))


def record(folder: Path, step: int, found: list[Change]) -> list[str]:
    """Append changes to changes.jsonl; returns a line on each for the screen.

    Raises:
      StorageError: they cannot be written.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lines = [json.dumps({"step": step, "time": when, "field": c.field, "old": c.old, "new": c.new}) for c in found]
    if lines:
        append_whole(folder / "changes.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return [f"{c.field}: {c.old} up to step {step}, {c.new} from here on (noted in changes.jsonl)" for c in found]


def refuse_lost(folder: Path) -> None:
    """Raise ConfigError where a run has left traces and there is no checkpoint of it."""
    traces = []
    damaged = [p.name for p in children(home_of(folder) / "checkpoints.damaged")]
    if damaged:
        traces.append(f"checkpoints.damaged holds {', '.join(damaged)}")
    for name in ("metrics.jsonl", "strategy.jsonl"):
        last = max((line["step"] for line in read_lines(folder / name)[0]), default=0)
        if last > 0:
            traces.append(f"{name} reaches step {last}")
    if (folder / "summary.json").exists():
        traces.append("summary.json is there")
    if traces:
        raise ConfigError(
            f"run.dir={folder}: a run was here ({'; '.join(traces)}), and there is no checkpoint to carry it on from; "
            "put its checkpoints back, choose another --run.dir, or begin anew here with --run.start_over true, which "
            "moves these files to set_aside/"
        )


def start_over(home: Place) -> Place | None:
    """Move a run's files to set_aside/<number> inside its folder or bucket; None if there are none.

    The cold start stays: it says itself which settings it belongs to.

    Raises:
      StorageError: they cannot be moved.
    """
    keep = ("set_aside", "cold_start", "cold_start.progress", "workers.log")
    found = [p for p in children(home) if p.name not in keep and p.suffix != Path(LOCK).suffix]
    if not found:
        return None
    number = 1
    while exists(target := home / "set_aside" / str(number)):
        number += 1
    for path in found:
        move(path, target / path.name)
    return target


def config_is_whole(folder: Path) -> bool:
    """Whether config.yaml is a mapping; true if there is none."""
    try:
        read_settings(folder / "config.yaml")
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True
