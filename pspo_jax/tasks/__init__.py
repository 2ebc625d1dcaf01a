"""Where prompts come from and what a right answer is."""

from collections.abc import Callable

from pspo_jax.config import Config
from pspo_jax.rewards.pool import Pool
from pspo_jax.tasks.alphabet import CharTokenizer
from pspo_jax.tasks.arithmetic import TOKENIZER, arithmetic
from pspo_jax.tasks.base import PromptSet, Task
from pspo_jax.tasks.countdown import CHARACTERS, VOCAB, countdown_task
from pspo_jax.tasks.text import text_task
from pspo_jax.tasks.tokenizer import TextTokenizer, load_tokenizer


def own_tokenizer(config: Config) -> CharTokenizer:
    """The tokenizer of a task that has an alphabet of its own."""
    return TOKENIZER if config.task.name == "arithmetic" else CharTokenizer(CHARACTERS, VOCAB)


def make_task(
    config: Config,
    tokenizer: TextTokenizer | CharTokenizer,
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task that a config names. `pool` judges text; None = nothing is judged, as in a plan."""
    if not isinstance(tokenizer, CharTokenizer):
        return text_task(config, tokenizer, pool, say)
    if config.task.name == "arithmetic":
        return arithmetic(config.task, config.rollout.prompt_bucket)
    return countdown_task(config.task, config.rollout.prompt_bucket, config.rollout.max_new_tokens)


__all__ = [
    "CharTokenizer",
    "PromptSet",
    "Task",
    "TextTokenizer",
    "arithmetic",
    "load_tokenizer",
    "make_task",
    "own_tokenizer",
]
