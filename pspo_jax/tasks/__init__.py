"""Where prompts come from and what a right answer is."""

from collections.abc import Callable

from pspo_jax.config import Config
from pspo_jax.tasks.arithmetic import CharTokenizer, arithmetic
from pspo_jax.tasks.base import PromptSet, Task
from pspo_jax.tasks.gsm8k import gsm8k
from pspo_jax.tasks.tokenizer import TextTokenizer, load_tokenizer

TEXT_TASKS: dict[str, Callable[[Config, TextTokenizer], Task]] = {"gsm8k": gsm8k}
"""Tasks that speak a checkpoint's language."""


def make_task(config: Config, tokenizer: TextTokenizer | CharTokenizer) -> Task:
    """The task that a config names; arithmetic has an alphabet of its own."""
    if isinstance(tokenizer, CharTokenizer):
        return arithmetic(config.task, config.rollout.prompt_bucket)
    return TEXT_TASKS[config.task.name](config, tokenizer)


__all__ = ["TEXT_TASKS", "PromptSet", "Task", "TextTokenizer", "arithmetic", "load_tokenizer", "make_task"]
