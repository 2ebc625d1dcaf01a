"""Command line and YAML -> `Config`.

tyro does the parsing. Of the maintained libraries for nested dataclasses it was the one whose errors name the nearest
key and whose `--help` shows every field's docstring with its type and default; draccus reads YAML itself but
prints tracebacks for wrong types and no suggestions, OmegaConf has no help. A YAML file's leaves become the same dotted
flags that a user could type, ahead of the typed ones, so a file and a flag fail in the same words.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from pspo_jax.algorithms import resolve
from pspo_jax.config import COUNTDOWN_DEFAULTS, LORA_DEFAULTS, TEXT_DEFAULTS, Config, ConfigError, flatten
from pspo_jax.io.terminal import terminal
from pspo_jax.validation import validate

_TEXT_FIELDS = ("policy.source", "policy.tokenizer")
_WORDS = {"true": "True", "false": "False", "null": "None"}
_FORMER = {"--policy.remat=True": "--policy.remat=full", "--policy.remat=False": "--policy.remat=none"}
"""Values of former versions, which run folders still hold."""


def parse(argv: Sequence[str], prog: str, description: str) -> Config:
    """Resolved and validated config from `[--config FILE.yaml] [--stage.field value ...]`.

    Raises:
      ConfigError: one line that names the field, the value and the fix.
      SystemExit: after `--help`.
    """
    flags, rest = _config_flags(list(argv))
    flags = _defaults(flags + rest) + flags
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                Config,
                args=flags + [_normal(a) for a in rest],
                prog=prog,
                description=description + "\n\n--config FILE.yaml: fields from a file; flags override it.",
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(errors.getvalue())) from stop
    validate(config)
    return resolve(config)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints take the same one-line way out as all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def run(main: Any, prog: str) -> None:
    """Call `main(argv)`; bad input becomes one line on stderr and exit code 2."""
    try:
        with terminal(prog):
            sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def to_yaml(config: Config) -> str:
    """The config as YAML, in the order of its fields."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flatten(config).items():
        stage, name = key.split(".")
        nested.setdefault(stage, {})[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def _config_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take every --config FILE out of argv; return its fields as flags, and what is left."""
    flags: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--allow-data-change":
            rest.append("--task.allow_change=True")
        elif word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
            flags += _yaml_flags(path)
        else:
            rest.append(word)
    return flags, rest


def _defaults(words: list[str]) -> list[str]:
    """Flags that stand before all others, by the kind of task: the typed ones and a file's override them.

    A mixture or a policy of text makes the task one of text.
    """

    def last(name: str, default: str) -> str:
        found = [
            word.partition("=")[2] if "=" in word else next(iter(words[i + 1 : i + 2]), "")
            for i, word in enumerate(words)
            if word.partition("=")[0] == name
        ]
        return found[-1] if found else default

    values: dict[str, Any] = {}
    name = last("--task.name", "arithmetic")
    of_text = any(last(f"--{field}", "None") not in ("None", "null", "") for field in _TEXT_FIELDS)
    if name == "countdown" and not of_text:
        values |= COUNTDOWN_DEFAULTS
    elif name != "arithmetic" or last("--task.mixture", "None") not in ("None", "null"):
        values |= TEXT_DEFAULTS
    if last("--lora.rank", "0") != "0":
        values |= LORA_DEFAULTS
    return [f"--{key}={value}" for key, value in values.items()]


def _yaml_flags(path: str) -> list[str]:
    if not path:
        raise ConfigError("--config: needs the name of a YAML file")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; name a YAML file that can be read") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return []
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must be a mapping of stages, such as `run: {{steps: 80}}`")
    flags = [f"--{key}={_flag(v)}" for key, v in flatten(values).items()]
    return [_FORMER.get(flag, flag) for flag in flags]


def _flag(value: Any) -> str:
    """A YAML value as a flag's; a list becomes JSON."""
    return "None" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def _normal(word: str) -> str:
    """YAML's words for truth values and nothing, in tyro's spelling."""
    flag, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{flag}={_WORDS.get(value, value)}"
    return _WORDS.get(word, word)


def _one_line(box: str) -> str:
    """tyro's boxed message as one line, without its title, the frame and the pointer to --help."""
    lines = [line for line in box.splitlines() if not line.startswith("╭")]
    text = " ".join(re.sub(r"[╰╯│─━]+", " ", line) for line in lines)
    text = " ".join(text.split()).split("For full helptext")[0].strip()
    return text or "the arguments could not be read; see --help"
