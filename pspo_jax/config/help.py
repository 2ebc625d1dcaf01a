"""The text of `--help`, which lists the common fields, and of `--help-all`, which lists every field."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Sequence

from pspo_jax.config.defaults import COUNTDOWN_DEFAULTS, LORA_DEFAULTS, TEXT_DEFAULTS
from pspo_jax.config.fields import PATH_FIELDS, FieldType, Value, field_types
from pspo_jax.config.presets import CHOICES
from pspo_jax.config.recipes import recipe_names
from pspo_jax.config.schema import Config

COMMON = (
    *("run.dir", "run.steps", "run.seed", "algorithm.name"),
    *("task.name", "task.train_data", "task.heldout_data", "task.prompt_column", "task.answer_column"),
    *("prompt.template", "prompt.system", "model.source", "lora.rank", "reward.terms"),
    *("rollout.prompts", "rollout.group_size", "rollout.max_new_tokens", "rollout.temperature"),
    *("loss.name", "loss.kl_coef", "loss.microbatch_rows", "optimizer.learning_rate"),
    *("mesh.fsdp", "eval.every", "checkpoint.every"),
)
"""Fields that `--help` lists."""
_WORDS = ("-h", "--help", "--help-all")
_CONFIG = (
    "Fields from a YAML file, nested by stage, or from a recipe that comes with the package: {recipes}. It may be "
    "given several times: a later file overrides an earlier one, and flags override all files. Both override the "
    "presets of algorithm.name, and these override the defaults below."
)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for one of the two help texts."""
    return any(word in _WORDS for word in argv)


def help_text(argv: Sequence[str], prog: str, description: str) -> str:
    """The help text that `argv` asks for.

    Args:
      argv: command line for which `wants_help` holds.
      description: text before the options, which is printed as it is laid out.
    """
    everything = "--help-all" in argv
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE.yaml|RECIPE] [--stage.field VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    options = parser.add_argument_group("options")
    options.add_argument("--config", metavar="FILE|RECIPE", help=_CONFIG.format(recipes=", ".join(recipe_names())))
    if prog.endswith("train"):
        options.add_argument("--recipe", metavar="NAME", help="Print a recipe, to copy and change, and exit.")
    options.add_argument(
        "--allow-data-change", action="store_true", help="The same as --task.allow_change true: resume on changed data."
    )
    options.add_argument("-h", "--help", action="store_true", help="Show the common fields and exit.")
    options.add_argument("--help-all", action="store_true", help="Show all fields and exit.")
    if everything:
        for stage, section in vars(Config()).items():
            if dataclasses.is_dataclass(section):
                names = [f"{stage}.{field.name}" for field in dataclasses.fields(section)]
                _add_fields(parser.add_argument_group(stage, inspect.getdoc(type(section))), names)
    else:
        group = parser.add_argument_group("start here", "The common fields; --help-all lists all of them.")
        _add_fields(group, COMMON)
    return parser.format_help()


def _add_fields(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Add an argument for each dotted field name to a group of the help text."""
    config = Config()
    for name in names:
        stage, _, field = name.partition(".")
        section = getattr(config, stage)
        described: type = type(section)
        field_type = field_types(section)[field]
        text = f"{field_docs(described)[field]} ({_facts(name, field_type, getattr(section, field))})"
        group.add_argument(f"--{name}", metavar=_metavar(name, field_type), help=text.replace("%", "%%"))


def _metavar(name: str, field_type: FieldType) -> str:
    """The placeholder of a field's value."""
    if _choices(name, field_type):
        return "NAME"
    if name in PATH_FIELDS:
        return "PATH"
    return {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT"}[field_type.base]


def _choices(name: str, field_type: FieldType) -> tuple[str, ...]:
    """The texts that a field may hold; () = any value."""
    return field_type.choices or tuple(CHOICES.get(name, ()))


def _facts(name: str, field_type: FieldType, default: Value) -> str:
    """Choices, range and defaults of a field."""
    choices = _choices(name, field_type)
    facts = [f"one of {', '.join(choices)}"] if choices else []
    facts += [bounds for interval in field_type.ranges if (bounds := interval.words())]
    facts.append(f"default: {_shown(default)}")
    for values, where in (
        (TEXT_DEFAULTS, "for text tasks"),
        (COUNTDOWN_DEFAULTS, "for countdown without a checkpoint"),
        (LORA_DEFAULTS, "with adapters"),
    ):
        if name in values:
            facts.append(f"{_shown(values[name])} {where}")
    return "; ".join(facts)


def _shown(value: Value) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


@functools.cache
def field_docs(stage: type) -> dict[str, str]:
    """Field name -> the docstring below the field, for a stage of the configuration."""
    (definition,) = ast.parse(inspect.getsource(stage)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs
