"""The run folder: config.yaml, metrics.jsonl, strategy.jsonl, completions/, summary.json, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from tensorboardX import SummaryWriter

from pspo_jax import cli
from pspo_jax.algorithms import resolve
from pspo_jax.config import Config, ConfigError, flatten, replace
from pspo_jax.io.completions import print_completions, write_completions
from pspo_jax.parallel import hosts

MAY_CHANGE = (
    "run.dir",
    "run.fingerprint",
    "run.print_config",
    "run.compilation_cache",
    "sft.share",
    "task.allow_change",
    "task.cache",
    "policy.remat",
    "policy.scan_unroll",
    "policy.attention",
    "rollout.chunks",
    "rollout.weights",
    "rollout.slots",
    "objective.microbatch_rows",
    "objective.logits_mib",
    "objective.packing",
    "objective.share_prompts",
)
"""Fields that a resumed run may change, with every field of the stages below."""
_FREE_STAGES = ("mesh.", "distributed.", "runtime.", "eval.", "checkpoint.", "log.", "verifier.")


def open_folder(path: str) -> Path:
    """The folder, made and writable, or ConfigError."""
    if not path.strip():
        raise ConfigError("run.dir='': must name a folder")
    folder = Path(path)
    probe = folder / f".write-test-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.dir={path}: {error.strerror}; choose a folder that can be written") from error
    return folder


def with_type_of(folder: Path, config: Config) -> Config:
    """`config` with the policy.compute_dtype that the folder's run began with, where nobody set it.

    A run that goes on must not change its rounding because another machine is fast with another type.
    """
    path = folder / "config.yaml"
    if config.policy.compute_dtype is not None or not path.exists():
        return config
    try:
        kept = flatten(yaml.safe_load(path.read_text())).get("policy.compute_dtype")
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"run.dir={folder}: its config.yaml cannot be read; choose another --run.dir") from error
    return config if kept is None else replace(config, {"policy.compute_dtype": kept})


def check_config(folder: Path, config: Config) -> None:
    """Refuse to resume a run under settings that would change what it learns; say which differ."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    try:
        # A field that is younger than the run has had its default all along, or what its presets say.
        read = flatten(yaml.safe_load(path.read_text()))
        known = {name: value for name, value in read.items() if name in flatten(Config())}
        saved = read | flatten(yaml.safe_load(cli.to_yaml(resolve(replace(Config(), known)))))
    except (yaml.YAMLError, AttributeError, KeyError) as error:
        raise ConfigError(f"run.dir={folder}: its config.yaml cannot be read; choose another --run.dir") from error
    now = flatten(yaml.safe_load(cli.to_yaml(config)))
    free = (*_FREE_STAGES, "task.") if config.task.allow_change else _FREE_STAGES
    differs = [
        f"{key}={saved.get(key)} there, {now.get(key)} now"
        for key in {**saved, **now}
        if saved.get(key) != now.get(key) and key not in MAY_CHANGE and not key.startswith(free)
    ]
    if differs:
        raise ConfigError(
            f"run.dir={folder}: holds a run of another config ({'; '.join(differs)}); choose another --run.dir or "
            "restore these values"
        )


class RunLog:
    """Appends to the run folder's logs. After a resume, lines beyond the restored step are dropped first.

    Of several processes the leading one writes: `writes=False` makes all of it nothing.
    """

    def __init__(
        self, folder: Path, resume_step: int, tensorboard: bool, console: Console | None = None, writes: bool = True
    ):
        self._writes = writes
        self._seen: set[str] = set()
        if not writes:
            return
        self._folder = folder
        self._console = console
        self._metrics = folder / "metrics.jsonl"
        self._strategy = folder / "strategy.jsonl"
        for path in (self._metrics, self._strategy):
            _truncate(path, resume_step)
        self._file = self._metrics.open("a", buffering=1)
        self._events = SummaryWriter(str(folder), purge_step=resume_step + 1, flush_secs=10) if tensorboard else None

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        if self._events:
            self._events.close()

    def metrics(self, step: int, values: dict[str, float | int]) -> None:
        """One line of metrics.jsonl, and the same numbers as TensorBoard scalars."""
        if not self._writes:
            return
        clean = {k: _number(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        if self._events:
            for name, value in clean.items():
                if value is not None and not name.startswith("crc/"):
                    self._events.add_scalar(name, value, step)

    def strategy(self, step: int, histograms: dict[str, dict[str, Any]]) -> None:
        """Histograms over all prompts, each with counts and edges, such as of priorities."""
        if not histograms or not self._writes:
            return
        line = {name: {k: np.asarray(v).tolist() for k, v in h.items()} for name, h in histograms.items()}
        with self._strategy.open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")

    def completions(self, step: int, lines: list[dict[str, Any]], file_format: str) -> None:
        """Sample completions of one step, to the folder and the screen."""
        if not self._writes:
            return
        write_completions(self._folder / "completions", step, lines, file_format)
        if self._console is not None:
            print_completions(self._console, lines)

    def errors(self, step: int, tracebacks: Sequence[str]) -> None:
        """Keep what rewards raised, whole, each once; its last line goes to the screen."""
        for text in tracebacks:
            if text in self._seen:
                continue
            self._seen.add(text)
            if not self._writes:
                print(f"step {step}: a reward raised\n{text}", file=sys.stderr)
                continue
            with (self._folder / "reward_errors.log").open("a") as file:
                file.write(f"step {step}\n{text}\n")
            if self._console is not None:
                last = text.strip().rpartition("\n")[2]
                self._console.print(f"a reward raised {last} (whole in reward_errors.log)", markup=False)


def write_json(path: Path, value: Any) -> None:
    """Write atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


def crc(tree: Any) -> int:
    """CRC-32 over the bytes of every array of a tree, in order."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = zlib.crc32(np.ascontiguousarray(hosts.whole(leaf)).tobytes(), value)
    return value


def _number(value: Any) -> float | int | None:
    """A JSON number; None for what is not finite, as JSON has no word for it."""
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _truncate(path: Path, last_step: int) -> None:
    """Drop lines after `last_step`, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > last_step:
            break
        kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.rename(path)
