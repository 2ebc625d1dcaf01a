"""The run folder: config.yaml, metrics.jsonl, strategy.jsonl, completions/, summary.json, TensorBoard events. Loggers
beside it are fed from here."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import ArrayLike, PyTree
from rich.console import Console

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.distributed import processes
from pspo_jax.runs import verdicts
from pspo_jax.runs.access import read_lines, read_settings
from pspo_jax.runs.completions import Line, print_completions, write_completions
from pspo_jax.runs.home import checked_url, stand_for, working_folder
from pspo_jax.runs.loggers.sender import Sender, end_all
from pspo_jax.system.buckets import is_url
from pspo_jax.system.json_values import json_number
from pspo_jax.system.storage import REFUSED, Persist, append_whole, unwritten, write_whole, writing

if TYPE_CHECKING:
    from pspo_jax.runs.events import Events

_ERRORS_BYTES = 2**20
"""Bytes up to which reward_errors.log grows."""
_ERROR_KINDS = 200
"""Kinds of traceback that are kept at most; tracebacks through the same lines of code are of one kind."""


def open_folder(path: str) -> Path:
    """Make the folder if need be, and check that it can be written; for a URL, the working folder that stands for it.

    Raises:
      ConfigError: it is no folder that this process may write to.
      StorageError: it cannot be written now, as on a full disk.
    """
    if not path.strip():
        raise ConfigError("run.dir='': must name a folder")
    url = checked_url(path) if is_url(path) else None
    folder = Path(path) if url is None else working_folder(url)
    _check_writable(path, folder)
    if url is not None:
        stand_for(folder, url)
    return folder


def _check_writable(path: str, folder: Path) -> None:
    """Make the folder that run.dir=`path` means, and write a file to it; raises as `open_folder`."""
    probe = folder / f".write-test-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (*REFUSED, errno.EEXIST):
            if Path(path) != folder:
                raise ConfigError(
                    f"run.dir={path}: {folder}, which stands for it on this machine: {error.strerror}; make it writable"
                ) from error
            raise ConfigError(f"run.dir={path}: {error.strerror}; choose a folder that can be written") from error
        raise unwritten(folder / "config.yaml", error, 4096) from error


def with_type_of(folder: Path, config: Config) -> Config:
    """`config` with the model.compute_dtype that the folder's run began with, where nobody set it.

    A run that goes on must not change its rounding because another machine is fast with another type.
    """
    if config.model.compute_dtype is not None:
        return config
    kept = processes.text_from_primary(_kept_type(folder / "config.yaml") if processes.is_primary() else "")
    return replace(config, {"model.compute_dtype": kept}) if kept else config


def _kept_type(path: Path) -> str:
    """model.compute_dtype in a run's config.yaml; "" where no run has begun, or the file is damaged."""
    try:
        kept = read_settings(path)["model"]["compute_dtype"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""
    return kept if kept in ("float32", "bfloat16") else ""


class RunLog:
    """Appends to the run folder's logs. After a resume, lines beyond the restored step are dropped first.

    Of several processes the leading one writes: `writes=False` makes all of it nothing. A line is written whole or not
    at all; `persist` says what follows on a write that fails.

    Args:
      strategy_lines: lines that strategy.jsonl had when the restored step was saved.
      senders: senders to loggers, which begin once the logs are truncated.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        tensorboard: bool,
        console: Console | None = None,
        writes: bool = True,
        persist: Persist | None = None,
        say: Callable[[str], None] = lambda _: None,
        strategy_lines: int = 0,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        senders: Sequence[Sender] = (),
    ):
        self._warn = warn
        self._writes = writes
        self._seen: set[str] = set()
        self._persist = persist or Persist()
        self._events: Events | None = None
        self._said: set[tuple[str, str]] = set()
        self.senders = senders if writes else ()
        """Senders to the loggers beside the run folder."""
        if not writes:
            return
        self._folder = folder
        self._console = console
        self._metrics = folder / "metrics.jsonl"
        self._strategy = folder / "strategy.jsonl"
        for path in (self._metrics, self._strategy):
            self._persist(lambda path=path: _truncate(path, resume_step, say))  # type: ignore[misc]
        reached = max((record["step"] for record in read_lines(self._metrics)[0]), default=-1)
        if 0 < resume_step != reached:
            say(f"{self._metrics}: ends at step {reached}, and the checkpoint is of step {resume_step}; lines are lost")
        if (there := len(read_lines(self._strategy)[0])) < strategy_lines:
            say(f"{self._strategy}: {strategy_lines - there} of its {strategy_lines} lines are lost")
        if tensorboard:
            from pspo_jax.runs.events import Events  # its packages are imported where they are used

            self._persist(lambda: setattr(self, "_events", Events(folder, resume_step + 1)))
        for sender in self.senders:
            sender.start()

    def begun(self) -> bool:
        """Whether metrics.jsonl has a line already."""
        return self._writes and bool(read_lines(self._metrics)[0])

    def metrics(self, step: int, values: dict[str, float | int]) -> None:
        """One line of metrics.jsonl, and the same numbers as TensorBoard scalars."""
        if not self._writes:
            return
        clean = {k: json_number(v) for k, v in values.items()}
        line = (json.dumps({"step": step, **clean}) + "\n").encode()
        self._persist(lambda: append_whole(self._metrics, line))
        if (events := self._events) is not None:
            shown = {k: v for k, v in clean.items() if v is not None and not k.startswith("crc/")}
            self._persist(lambda: events.scalars(step, shown))
        for sender in self.senders:
            sender.wake()

    def strategy(self, step: int, histograms: dict[str, dict[str, ArrayLike]]) -> None:
        """Histograms over all prompts, each with counts and edges, such as of priorities."""
        if not histograms or not self._writes:
            return
        line = {name: {k: np.asarray(v).tolist() for k, v in h.items()} for name, h in histograms.items()}
        self._persist(lambda: append_whole(self._strategy, (json.dumps({"step": step, **line}) + "\n").encode()))

    def completions(self, step: int, lines: list[Line], file_format: str) -> None:
        """Sample completions of one step, to the folder and the screen."""
        if not self._writes:
            return
        self._persist(lambda: write_completions(self._folder / "completions", step, lines, file_format))
        for sender in self.senders:
            sender.completions(step, lines)
        if self._console is not None:
            print_completions(self._console, lines)

    def close(self, finished: bool) -> None:
        """End the run in the loggers; `finished` says whether it is at its end. What cannot be sent is said."""
        end_all(self.senders, finished)

    def errors(self, step: int, tracebacks: Sequence[str]) -> None:
        """Keep what rewards raised, each place in the code once; its last line goes to the screen.

        Texts that differ in what they print alone count as one. The log ends at a megabyte, with a line that says so.
        """
        for text in tracebacks:
            kind = _kind(text)
            if kind in self._seen or len(self._seen) >= _ERROR_KINDS:
                continue
            self._seen.add(kind)
            if not self._writes:
                self._warn(f"step {step}: a reward raised\n{_printable(text)}")
                continue
            path = self._folder / "reward_errors.log"
            there = path.stat().st_size if path.exists() else 0
            line = f"step {step}\n{text}\n".encode("utf-8", "backslashreplace")
            if there + len(line) > _ERRORS_BYTES:
                line = f"step {step}\nwhat rewards raise is no longer kept: this file has reached 1 MiB\n".encode()
            if there <= _ERRORS_BYTES:
                self._persist(lambda line=line, path=path: append_whole(path, line))  # type: ignore[misc]
            if self._console is not None:
                last = _printable(text).strip().rpartition("\n")[2]
                self._console.print(f"a reward raised {last} (whole in reward_errors.log)", markup=False)

    def no_verdicts(self, step: int, missing: Mapping[str, Counter[str]]) -> None:
        """Say for each reward term and each kind of reason, once, that values are missing."""
        for kind, line in verdicts.lines(missing):
            if kind in self._said:
                continue
            self._said.add(kind)
            if not self._writes or self._console is None:
                self._warn(f"step {step}: {line}")
            else:
                self._console.print(f"step {step}: {line}", markup=False)


def _kind(traceback: str) -> str:
    """The kind of a traceback: its lines of code and the name of the exception."""
    lines = traceback.strip().split("\n")
    places = [line for line in lines if re.match(r'\s*File "', line)]
    return "\n".join([*places, re.split(r"[:\s]", lines[-1], maxsplit=1)[0]])


def _printable(text: str) -> str:
    """The text with lone surrogates, which no terminal takes, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically.

    Raises:
      StorageError: it cannot be written.
    """
    write_whole(path, json.dumps(value, indent=1).encode())


def crc(tree: PyTree) -> int:
    """CRC-32 over the bytes of every array of a tree, in order."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = zlib.crc32(np.ascontiguousarray(processes.to_host(leaf)).tobytes(), value)
    return value


def _truncate(path: Path, last_step: int, say: Callable[[str], None]) -> None:
    """Drop records after `last_step`, and a last line that was cut off.

    A log with other damaged lines is first copied to <name>.damaged.
    """
    records, broken = read_lines(path)
    if not path.exists():
        return
    if broken:
        aside, number = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.damaged{number}")
        with writing(aside):
            aside.write_bytes(path.read_bytes())
        say(f"{path}: {broken} lines are damaged and left out; the file as it was is {aside.name}")
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["step"] <= last_step and (not kept or record["step"] > kept[-1]["step"]):
            kept.append(record)
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
