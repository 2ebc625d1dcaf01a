"""Command line and YAML -> `Config`.

Flags and YAML fields enter the config as values given to `replace` do: by the field's name and type (`fields.py`), so
that all three have the same defaults and fail with the same messages. `help.py` writes `--help`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import yaml

from pspo_jax.config import fields
from pspo_jax.config.defaults import check_name, flatten, with_given
from pspo_jax.config.fields import ConfigError, Value
from pspo_jax.config.help import help_text, wants_help
from pspo_jax.config.presets import resolve
from pspo_jax.config.recipes import config_file, recipe, recipe_names
from pspo_jax.config.schema import Config
from pspo_jax.config.validation import validate
from pspo_jax.system.storage import StorageError, exhausted
from pspo_jax.system.terminal import terminal

_ALLOW_CHANGE = "--allow-data-change"


def parse(argv: Sequence[str], prog: str, description: str) -> Config:
    """Resolved and validated config from `[--config FILE.yaml|RECIPE] [--stage.field value ...]`.

    Flags override files, wherever they are placed, and a later file overrides an earlier one. Fields that neither sets
    follow the task and the algorithm.

    Raises:
      ConfigError: one line that names the field, the value and the fix.
      SystemExit: after `--help` or `--help-all`.
    """
    show_help(argv, prog, description)
    files: dict[str, Value] = {}
    typed: dict[str, Value] = {}
    config = Config()
    for name, text in _flags(argv):
        if name == "config":
            files |= read_yaml(config, text)
        else:
            typed[name] = fields.parse(name, _field_type(config, name), text)
    config = with_given(config, files | typed)
    validate(config)
    return resolve(config)


def program(command: str) -> str:
    """The words that start a command such as "train": pspo-train if that was typed, else python -m pspo_jax.train."""
    script = f"pspo-{command}"
    return script if Path(sys.argv[0]).stem == script else f"python -m pspo_jax.{command}"


def show_recipe(argv: Sequence[str]) -> None:
    """Print a recipe of the package and exit if the command line is `--recipe NAME`.

    Raises:
      ConfigError: there is no such recipe.
      SystemExit: after the recipe.
    """
    if not argv or argv[0] != "--recipe":
        return
    if len(argv) != 2:
        raise ConfigError(f"--recipe: needs one name, and nothing else; the recipes are {', '.join(recipe_names())}")
    print(recipe(argv[1], "--recipe").read_text(encoding="utf-8"), end="")
    raise SystemExit(0)


def show_help(argv: Sequence[str], prog: str, description: str) -> None:
    """Print a help text and exit if a command line asks for one; `description` is printed as it is laid out.

    Raises:
      SystemExit: after `--help` or `--help-all`.
    """
    if wants_help(argv):
        print(help_text(argv, prog, description))
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ConfigErrors, and so are printed in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def run_command(main: Callable[[Sequence[str]], int], command: str) -> None:
    """Call `main(argv)` of a command such as "train", and exit as `run` does."""
    run(main, program(command).removeprefix("python -m "))


def run(main: Callable[[Sequence[str]], int], prog: str) -> None:
    """Call `main(argv)` and exit with its code.

    Bad input is printed to stderr in one line, with exit code 2; an error of storage likewise, with exit code 1.
    """
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
        # Orbax's threads may wait for minutes on a full file system, and an ordinary exit would wait for them.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)


def _is_late_callback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> bool:
    """Whether an error comes from a read or write that ends after Orbax has given up on the whole operation.

    Orbax has closed its event loop by then, and Python would print a traceback for each reply of TensorStore, from one
    of TensorStore's threads. The error that Orbax raised already states the cause.
    """
    in_main = threading.current_thread() is threading.main_thread()
    return kind is RuntimeError and not in_main and str(error) == "Event loop is closed"


def to_yaml(config: Config) -> str:
    """The config as YAML, in the order of its fields."""
    nested: dict[str, dict[str, Value]] = {}
    for key, value in flatten(config).items():
        stage, _, name = key.partition(".")
        nested.setdefault(stage, {})[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted field or "config", value as text) for each flag of a command line."""
    words = iter(argv)
    for word in words:
        if word == _ALLOW_CHANGE:
            yield "task.allow_change", "true"
            continue
        flag, equals, text = word.partition("=")
        if not flag.startswith("--"):
            raise ConfigError(
                f"{word!r}: is not a flag; write --stage.field value, and put values with spaces in quotes"
            )
        name = flag[2:].replace("-", "_")
        if name != "config":
            _check_flag(flag, name)
        if not equals:
            text = next(words, "--")
            if text == "--" or _is_flag(text):
                raise ConfigError(
                    f"{flag}: needs a value, such as {flag} {'FILE.yaml or a recipe' if name == 'config' else 'VALUE'}"
                )
        yield name, text


def _is_flag(word: str) -> bool:
    """Whether a word of the command line is a flag of this program."""
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    return word.startswith("--") and (name in flatten(Config()) or name == "config" or word == _ALLOW_CHANGE)


def _check_flag(flag: str, name: str) -> None:
    """Raise ConfigError for a flag that names no field."""
    known = flatten(Config())
    if name not in known:
        near = fields.nearest(name, [*known, "config"]).replace("mean ", "mean --")
        raise ConfigError(f"{flag}: there is no such field{near or '; --help-all lists all fields'}")


def _field_type(config: Config, name: str) -> fields.FieldType:
    """The type of a field, by its dotted name."""
    stage, _, field = check_name(config, name).partition(".")
    return fields.field_types(getattr(config, stage))[field]


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses a mapping with a repeated key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                where = f"line {key.start_mark.line + 1}"
                raise ConfigError(f"{key.value}: appears twice in one mapping ({where}); keep one of them")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(config: Config, path: str) -> dict[str, Value]:
    """Dotted field name -> value, for the fields that a file sets.

    Args:
      path: a file, or the name of one of the package's recipes.
    Raises:
      ConfigError: the file cannot be read, is not a mapping of stages, or names a field that does not exist.
    """
    where = f"--config {path}"
    if not path:
        raise ConfigError("--config: needs the name of a YAML file")
    file = config_file(path)
    try:
        # The loader is safe: it constructs only plain values.
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a YAML file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"is not YAML: {' '.join(str(error).split())}"
        raise ConfigError(f"{where}: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping of stages, such as `run: {{steps: 80}}`")
    try:
        return {
            name: fields.from_yaml(name, _field_type(config, name), value) for name, value in _leaves(config, values)
        }
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _leaves(config: Config, values: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """(dotted field, value) for each field of the nested stages; an empty stage sets nothing."""
    stages = {name.partition(".")[0] for name in flatten(config)}
    for stage, inside in values.items():
        if isinstance(stage, str) and "." in stage:
            yield check_name(config, stage), inside
            continue
        if stage not in stages:
            raise ConfigError(f"{stage}: there is no such stage{fields.nearest(str(stage), stages)}")
        if inside is not None and not isinstance(inside, dict):
            raise ConfigError(f"{stage}={str(inside)[:80]}: must be a mapping of fields, such as `run: {{steps: 80}}`")
        fields_inside = inside if isinstance(inside, dict) else {}
        for field, value in fields_inside.items():
            yield check_name(config, f"{stage}.{field}"), value
