"""Where prompts come from and what a right answer is."""

from pspo_jax.tasks.arithmetic import arithmetic
from pspo_jax.tasks.base import PromptSet, Task

TASKS = {"arithmetic": arithmetic}

__all__ = ["TASKS", "PromptSet", "Task", "arithmetic"]
