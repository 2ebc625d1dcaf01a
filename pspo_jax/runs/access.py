"""Reads run folders: settings, logs, summary, and the steps of checkpoints."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import yaml

from pspo_jax.checkpoint.reading import saved_steps
from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.runs.home import home_of
from pspo_jax.system.storage import StorageError, os_reason, unread, writing


class RunSummary(TypedDict):
    """The contents of summary.json."""

    eval: dict[str, float]
    """Held-out scores after the last step: greedy, sampled, no_verdict, and greedy/LABEL and sampled/LABEL."""
    steps: int
    rollouts: int
    tokens: int
    """Tokens generated."""
    seconds: dict[str, float]
    """Seconds by phase, and in total."""


Record = dict[str, Any]
"""A line of a log: numbers, histograms, or None where a number was not finite."""


def read_settings(path: Path) -> dict[str, Any]:
    """Stage -> fields of a run's config.yaml, or of an evaluation's settings.json, as they were written.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: it is no mapping of stages; the message says why.
      StorageError: it cannot be read now.
    """
    try:
        stages = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unread(path, error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    if not isinstance(stages, dict):
        raise ValueError("no mapping of stages")
    return stages


def read_config(run: Path, overrides: Sequence[str] = (), flag: str = "--run", prog: str = "export") -> Config:
    """The config of a run folder, with flags that override it, for a command on whatever machine this is.

    What belongs to the machine and the processes that trained is left out: the mesh, the other processes, the folder
    of compiled programs. Overrides may set it.

    Raises:
      ConfigError: there is no such run, or its config.yaml cannot be read.
    """
    path = run / "config.yaml"
    again = "name the run.dir of a training run"
    try:
        stages = read_settings(path)
    except FileNotFoundError as error:
        what = "holds no config.yaml" if run.is_dir() else "no such folder"
        raise ConfigError(f"{flag} {run}: {what}; {again}") from error
    except StorageError as error:
        reason = os_reason(error) or error
        raise ConfigError(f"{flag} {run}: its config.yaml cannot be read ({reason}); {again}") from error
    except ValueError as error:
        raise ConfigError(f"{flag} {run}: its config.yaml is damaged ({error}); restore it, or {again}") from error
    for stage in ("mesh", "distributed"):
        stages.pop(stage, None)
    if isinstance(stages.get("run"), dict):
        stages["run"].pop("compilation_cache", None)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "config.yaml"
        with writing(kept):
            kept.write_text(yaml.safe_dump(stages), encoding="utf-8")
        try:
            return command_line.parse(["--config", str(kept), *overrides], f"python -m pspo_jax.{prog}", "")
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(kept), str(path))) from error


def choose_steps(run: Path, wanted: str, flag: str = "--step", named_by: str = "--run") -> list[int]:
    """Steps of a run's checkpoints that a flag's value means.

    Args:
      named_by: the flag that named the run, for messages.
    """
    steps = saved_steps(home_of(run) / "checkpoints")
    if not steps and (run / "model").is_dir():
        raise ConfigError(
            f"{named_by} {run}: holds one finished model and no checkpoints; name the model, {run / 'model'}"
        )
    if not steps:
        raise ConfigError(f"{named_by} {run}: has no checkpoints yet; wait for the first one (checkpoint.every)")
    if wanted == "all":
        return steps
    if wanted == "latest":
        return steps[-1:]
    if wanted == "best":
        scores = {line["step"]: line["eval/greedy"] for line in metrics_of(run) if line.get("eval/greedy") is not None}
        evaluated = [step for step in steps if step in scores]
        if not evaluated:
            raise ConfigError(
                f"{flag} best: none of the checkpoints {steps} has been evaluated; name a step, or latest"
            )
        return [max(evaluated, key=lambda step: scores[step])]
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise ConfigError(
            f"{flag} {wanted}: no such checkpoint; there are {', '.join(map(str, steps))}, latest, best, all"
        )
    return [int(wanted)]


def metrics_of(run: Path) -> list[Record]:
    """The records of metrics.jsonl, without lines that are damaged or half written; an empty list without the file."""
    return read_lines(run / "metrics.jsonl")[0]


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a JSONL log that have a step, and the number of other lines; a last line without end is ignored.

    Raises:
      StorageError: it cannot be read now.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise unread(path, error) from error
    records, broken = [], 0
    for line in data.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no record of a step")
            records.append(record)
        except ValueError:
            broken += 1
    return records, broken


def read_summary(folder: Path) -> RunSummary | None:
    """summary.json; None if it is not there or is damaged."""
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_bytes())
        whole = {"steps", "eval", "rollouts", "tokens", "seconds"} <= set(found)
        return cast(RunSummary, found) if whole and {"greedy", "sampled"} <= set(found["eval"]) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    except OSError as error:
        raise unread(path, error) from error
