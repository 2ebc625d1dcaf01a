"""A user's own selector or advantage estimator, which a field names as module:function."""

from __future__ import annotations

import importlib
from typing import Any

from pspo_jax.config.fields import ConfigError


def is_plugin(name: str) -> bool:
    """Whether a name has the form module:function."""
    module, colon, function = name.partition(":")
    return bool(module and colon and function)


def load_plugin(field: str, name: str) -> Any:
    """The function that a field names as module:function.

    Raises:
      ConfigError: the module cannot be imported, or does not have the function.
    """
    module, _, function = name.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{field}={name}: {error}; name a module on PYTHONPATH and a function in it") from error
    if not callable(found):
        raise ConfigError(f"{field}={name}: {function} is not a function; name one")
    return found
