"""What commands read from a run folder: its config, the steps of its checkpoints, its metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pspo_jax.checkpoint.reading import saved_steps
from pspo_jax.config import command_line
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.runs.run_folder import read_lines
from pspo_jax.system.storage import writing


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
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "holds no config.yaml" if run.is_dir() else "no such folder"
        raise ConfigError(f"{flag} {run}: {what}; {again}") from error
    except OSError as error:
        raise ConfigError(f"{flag} {run}: its config.yaml cannot be read ({error.strerror}); {again}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{flag} {run}: its config.yaml is damaged ({why}); restore it, or {again}") from error
    if not isinstance(stages, dict):
        raise ConfigError(f"{flag} {run}: its config.yaml is damaged (no mapping of stages); restore it, or {again}")
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


def choose_steps(run: Path, wanted: str, flag: str = "--step") -> list[int]:
    """Steps of a run's checkpoints that a flag's value means."""
    steps = saved_steps(run / "checkpoints")
    if not steps and (run / "model").is_dir():
        raise ConfigError(f"--run {run}: holds one finished model and no checkpoints; name the model, {run / 'model'}")
    if not steps:
        raise ConfigError(f"--run {run}: has no checkpoints yet; wait for the first one (checkpoint.every)")
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


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; none if there are none, and those that are damaged or being written are left out."""
    return read_lines(run / "metrics.jsonl")[0]
