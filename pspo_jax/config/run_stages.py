"""The stages of the configuration that say how long a run lasts, and what it evaluates, saves and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pspo_jax.config.fields import Range


@dataclass(frozen=True)
class RunConfig:
    """The run folder, its length and its seed."""

    dir: str = "runs/default"
    """Run folder: config.yaml, metrics.jsonl, summary.json, checkpoints/, completions/, report.html. A run resumes from
    a checkpoint in it. gs://BUCKET/FOLDER names a folder in a bucket of Google Cloud Storage; it needs the package
    gcsfs."""
    steps: Annotated[int, Range(1)] = 150
    """Number of training steps. One step rolls out rollout.prompts x rollout.group_size completions."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of the initial weights, the cold start, the choice of prompts and the sampling of tokens."""
    hours: Annotated[float | None, Range(above=0.0)] = None
    """Hours of wall-clock time after which this start of the run has ended, saved, with exit code 75; the same command
    carries the run on. It ends before a step that might not fit into the hours. None = no limit."""
    profile: str | None = None
    """Steps, such as "10:12" for 10, 11 and 12, of which the JAX profiler writes a trace to profile/ in the run folder;
    None = no trace."""
    profile_memory: bool = False
    """Whether a profile of device memory is written in the update of the last step of run.profile."""
    fingerprint: bool = False
    """Whether metrics.jsonl holds checksums (CRC) of prompt ids, tokens, parameters and strategy state."""
    print_config: bool = False
    """Whether to print the resolved configuration as YAML and exit."""
    start_over: bool = False
    """Whether to begin at step 0 in a folder that already holds a run; the old files then move to set_aside/ inside the
    folder. config.yaml does not keep this field."""
    compilation_cache: str | None = None
    """Folder of XLA's persistent compilation cache; None = ~/.cache/pspo_jax/xla; "off" = no cache."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out prompts during training."""

    every: Annotated[int, Range(0)] = 20
    """Number of steps between evaluations on held-out prompts; 0 = only before the first and after the last step."""
    samples: Annotated[int, Range(1)] = 4
    """Number of completions for each held-out prompt in the sampled accuracy, at rollout.temperature."""
    patience: Annotated[int, Range(0)] = 0
    """Number of evaluations in a row without a better greedy accuracy than the best before them after which the run
    ends; 0 = no limit."""
    target: Annotated[float | None, Range(above=0.0, high=1.0)] = None
    """Greedy held-out accuracy, in (0, 1], with which the run ends; None = no target."""
    other_images: bool = False
    """Whether held-out prompts are also answered greedily with each other's images. Such answers can only be guessed,
    and a high accuracy shows that the text alone gives answers away."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: Annotated[int, Range(1)] = 20
    """Number of steps between checkpoints. The last step and a requested stop are always saved."""
    keep: Annotated[int, Range(1)] = 3
    """Number of latest checkpoints to keep."""
    keep_best: Annotated[int, Range(0)] = 1
    """Number of checkpoints to keep in addition, those with the best greedy held-out accuracy. A checkpoint whose
    accuracy is not finite is not ranked."""
    on_error: Literal["stop", "retry"] = "stop"
    """Reaction to a run folder that cannot be written, as on a full disk: the run ends with one line (stop), or it
    waits and tries again with the state in memory (retry)."""
    retry_minutes: Annotated[float, Range(above=0.0)] = 60.0
    """Minutes of trying again (on_error=retry) after which the run ends."""


@dataclass(frozen=True)
class LogConfig:
    """Progress, metrics and reports."""

    progress: bool = True
    """Whether to show progress bars on a terminal, or plain lines elsewhere."""
    to: str = "tensorboard"
    """Loggers that receive the metrics, separated by commas: tensorboard (events in the run folder), wandb, trackio,
    mlflow; none = no logger. The last three also receive the configuration, completions and the report, and each needs
    the extra of its name, as in pip install 'pspo-jax[wandb]'."""
    project: str = "pspo_jax"
    """Name of the project in wandb and trackio, and of the experiment in mlflow."""
    name: str | None = None
    """Name of the run in wandb, trackio and mlflow; None = the last part of run.dir."""
    completions_every: Annotated[int, Range(0)] = 10
    """Number of steps between dumps of sample completions; 0 = no dumps."""
    completions: Annotated[int, Range(1)] = 4
    """Number of groups in one dump; the first of them is also printed."""
    selection_every: Annotated[int, Range(0)] = 10
    """Number of steps between summaries of all prompts (priorities, visits, pools); 0 = only after the last step."""
    completions_format: Literal["jsonl", "parquet"] = "jsonl"
    """File format of the dumps in the run folder's completions/."""
    report: bool = True
    """Whether to write report.html at the end."""
