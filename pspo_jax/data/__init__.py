"""Where prompts come from and what a right answer is."""

from collections.abc import Callable

from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.synthetic.arithmetic import TOKENIZER, arithmetic
from pspo_jax.data.synthetic.countdown import CHARACTERS, VOCAB, countdown_task
from pspo_jax.data.task import PromptSet, Task
from pspo_jax.data.text import text_task
from pspo_jax.data.tokenizer import TextTokenizer, load_tokenizer
from pspo_jax.verifiers.workers.pool import Pool


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
