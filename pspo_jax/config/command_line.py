"""Command line and YAML -> `Config`.

A typed flag and a file's field take the same way into the config as a value given to `replace`: by the field's name and
type (`fields.py`), so all of them fail in the same words and have the same defaults. tyro writes `--help`, with every
field's docstring, type and default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import tyro
import yaml

from pspo_jax.config import fields
from pspo_jax.config.defaults import COUNTDOWN_DEFAULTS, LORA_DEFAULTS, TEXT_DEFAULTS, check_name, flatten, with_given
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import CHOICES, resolve
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate
from pspo_jax.system.storage import StorageError, exhausted
from pspo_jax.system.terminal import terminal

_ALLOW_CHANGE = "--allow-data-change"


def parse(argv: Sequence[str], prog: str, description: str) -> Config:
    """Resolved and validated config from `[--config FILE.yaml] [--stage.field value ...]`.

    Typed flags win over files, the later file over the earlier one, whatever their order among each other; what neither
    sets follows the task and the algorithm.

    Raises:
      ConfigError: one line that names the field, the value and the fix.
      SystemExit: after `--help`.
    """
    if any(word in ("-h", "--help") for word in argv):
        _help(prog, description)
    files: dict[str, Any] = {}
    typed: dict[str, Any] = {}
    config = Config()
    for name, text in _flags(argv):
        if name == "config":
            files |= read_yaml(config, text)
        else:
            typed[name] = fields.parse(name, _kind(config, name), text)
    config = with_given(config, files | typed)
    validate(config)
    return resolve(config)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints take the same one-line way out as all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def run(main: Any, prog: str) -> None:
    """Call `main(argv)`; bad input becomes one line on stderr and exit code 2, a disk's error the same and code 1."""
    shown = sys.excepthook
    sys.excepthook = lambda *error: None if _is_late_callback(*error) else shown(*error)
    try:
        with terminal(prog):
            sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError, StorageError) as error:
        told = error if isinstance(error, StorageError) else exhausted(error)
        if told is None:
            raise
        print(f"{prog}: error: {told}", file=sys.stderr)
        # Orbax's threads may wait for minutes on a file system that takes nothing, and an ordinary end waits for them.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)


def _is_late_callback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> bool:
    """Whether an error is that of a read or write which ends after Orbax has given up on the others beside it.

    Orbax has closed the event loop then, and Python would print a traceback for each answer of TensorStore, from a
    thread of TensorStore's own. What Orbax has raised already says why.
    """
    in_main = threading.current_thread() is threading.main_thread()
    return kind is RuntimeError and not in_main and str(error) == "Event loop is closed"


def to_yaml(config: Config) -> str:
    """The config as YAML, in the order of its fields."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flatten(config).items():
        stage, _, name = key.partition(".")
        nested.setdefault(stage, {})[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field or "config", its value as text) for each flag of a command line."""
    words = iter(argv)
    for word in words:
        if word == _ALLOW_CHANGE:
            yield "task.allow_change", "true"
            continue
        flag, equals, text = word.partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{word!r}: is no flag; write --stage.field value, and put values with spaces in quotes")
        name = flag[2:].replace("-", "_")
        if name != "config":
            _check_flag(flag, name)
        if not equals:
            text = next(words, "--")
            if text == "--" or _is_flag(text):
                raise ConfigError(
                    f"{flag}: needs a value, such as {flag} {'FILE.yaml' if name == 'config' else 'VALUE'}"
                )
        yield name, text


def _is_flag(word: str) -> bool:
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    return word.startswith("--") and (name in flatten(Config()) or name == "config" or word == _ALLOW_CHANGE)


def _check_flag(flag: str, name: str) -> None:
    known = flatten(Config())
    if name not in known:
        near = fields.nearest(name, [*known, "config"]).replace("mean ", "mean --")
        raise ConfigError(f"{flag}: there is no such field{near or '; --help lists them'}")


def _kind(config: Config, name: str) -> fields.Kind:
    stage, _, field = check_name(config, name).partition(".")
    return fields.kinds(getattr(config, stage))[field]


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                where = f"line {key.start_mark.line + 1}"
                raise ConfigError(f"{key.value}: stands twice in one mapping ({where}); keep one of them")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(config: Config, path: str) -> dict[str, Any]:
    """The fields that a file sets, by their dotted names, as their fields hold them.

    Raises:
      ConfigError: it cannot be read, is no mapping of stages, or names a field that is not there.
    """
    where = f"--config {path}"
    if not path:
        raise ConfigError("--config: needs the name of a YAML file")
    try:
        # The loader is a safe one: it makes plain values alone.
        values = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a YAML file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ConfigError) else f"not YAML: {' '.join(str(error).split())}"
        raise ConfigError(f"{where}: {what}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping of stages, such as `run: {{steps: 80}}`")
    try:
        return {name: fields.from_yaml(name, _kind(config, name), value) for name, value in _leaves(config, values)}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _leaves(config: Config, values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of nested stages; a stage with nothing under it sets nothing."""
    stages = {name.partition(".")[0] for name in flatten(config)}
    for stage, inside in values.items():
        if isinstance(stage, str) and "." in stage:
            yield check_name(config, stage), inside
            continue
        if stage not in stages:
            raise ConfigError(f"{stage}: there is no such stage{fields.nearest(str(stage), stages)}")
        if inside is not None and not isinstance(inside, dict):
            raise ConfigError(f"{stage}={str(inside)[:80]}: must be a mapping of fields, such as `run: {{steps: 80}}`")
        for field, value in (inside or {}).items():
            yield check_name(config, f"{stage}.{field}"), value


def _help(prog: str, description: str) -> NoReturn:
    """Print every field, and end."""
    stages = []
    for stage in dataclasses.fields(Config):
        if stage.name == "given":
            continue
        kind = _with_choices(stage.name, type(getattr(Config(), stage.name)))
        stages.append((stage.name, kind, dataclasses.field(default_factory=kind)))
    shown = dataclasses.make_dataclass("Config", stages, frozen=True)
    text = (
        f"{description}\n\n"
        "--config FILE.yaml: fields from a file, as stages of fields. It may stand several times; a later file "
        "overrides an earlier one, and flags override all files, wherever they stand. Both override the presets of "
        "algorithm.name, and these the defaults below.\n\n"
        f"{_ALLOW_CHANGE}: the same as --task.allow_change true.\n\n"
        f"Defaults of a task of text: {_listed(TEXT_DEFAULTS)}. Of countdown in its own alphabet: "
        f"{_listed(COUNTDOWN_DEFAULTS)}. With lora.rank: {_listed(LORA_DEFAULTS)}."
    )
    tyro.cli(
        shown, args=["--help"], prog=prog, description=text, config=(tyro.conf.FlagConversionOff,), use_underscores=True
    )
    raise SystemExit(0)


def _with_choices(stage: str, kind: type) -> type:
    """A stage whose fields that name entries of a table list them."""
    chosen: list[Any] = []
    for field in dataclasses.fields(kind):
        if table := CHOICES.get(f"{stage}.{field.name}"):
            names: Any = Literal[tuple(table)]
            hint = names if field.default is not None else names | None
            chosen.append((field.name, hint, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(kind.__name__, chosen, bases=(kind,), frozen=True) if chosen else kind


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
