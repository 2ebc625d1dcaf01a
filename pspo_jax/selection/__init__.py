"""Which prompts next. A selector is pure functions over its own per-prompt state; a new one is a file and a line."""

from pspo_jax.selection.base import Selector
from pspo_jax.selection.pps import pps
from pspo_jax.selection.uniform import uniform

SELECTORS = {"uniform": uniform, "pps": pps}

__all__ = ["SELECTORS", "Selector", "pps", "uniform"]
