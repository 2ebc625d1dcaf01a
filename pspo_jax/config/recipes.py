"""The recipes that come with the package: YAML files with the settings of a whole run, found by their names."""

from __future__ import annotations

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from pspo_jax.config.fields import ConfigError

_SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def config_file(name: str) -> Traversable:
    """The file that --config names: a file of the user's, or else the recipe of this name.

    A name with a folder or a suffix is never a recipe's, even where there is no such file.

    Raises:
      ConfigError: there is neither; the message lists the recipes with the nearest names.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in _SUFFIXES or len(path.parts) != 1:
        if not path.exists() and path.stem in recipe_names():
            raise ConfigError(f"--config {name}: there is no such file; the package's recipe is --config {path.stem}")
        return path
    return recipe(name, "--config")


def recipe(name: str, flag: str) -> Traversable:
    """The file of a recipe.

    Args:
      flag: the flag that names it, for messages.
    Raises:
      ConfigError: there is no recipe of this name.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(names)}"
        raise ConfigError(f"{flag} {name}: there is no file or recipe of this name; {advice}")
    return _folder() / f"{name}.yaml"


def _folder() -> Traversable:
    return files("pspo_jax") / "recipes"
