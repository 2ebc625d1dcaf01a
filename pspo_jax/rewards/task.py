"""The task that a config names: its prompts with the reward function of their completions."""

from __future__ import annotations

from collections.abc import Callable

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.synthetic import arithmetic, segments
from pspo_jax.data.synthetic.countdown import CHARACTERS, VOCAB, countdown_task
from pspo_jax.data.task import Task
from pspo_jax.data.text import text_task
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.model.architecture import Vision
from pspo_jax.rewards.text_reward import reward_functions, text_reward
from pspo_jax.verifiers.workers.pool import Pool


def make_char_tokenizer(config: Config) -> CharTokenizer:
    """The tokenizer of a task with one token per character."""
    own = {"arithmetic": arithmetic.TOKENIZER, "segments": segments.TOKENIZER}
    return own.get(config.task.name) or CharTokenizer(CHARACTERS, VOCAB)


def embedded_tower(config: Config) -> Vision | None:
    """The vision tower of a model with random weights; None = the task has no images."""
    return segments.TOWER if config.task.name == "segments" else None


def make_task(
    config: Config,
    tokenizer: TextTokenizer | CharTokenizer,
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Task:
    """The task that a config names.

    Args:
      pool: verifies text; None = rewards are not needed, as in a plan.
      say: told of what takes long.
    Raises:
      ConfigError: the data cannot be read, or leave too few prompts, or the task is one that only a program has.
    """
    if config.task.name == "own":
        raise ConfigError("task.name=own: only the program that gave its task to pspo_jax.train has it; name another")
    if not isinstance(tokenizer, CharTokenizer):
        reward_fn = text_reward(pool, tokenizer, config)
        return text_task(config, tokenizer, reward_fn, pool, reward_functions(config), say)
    if config.task.name == "arithmetic":
        return arithmetic.arithmetic(config.task, config.rollout.prompt_bucket)
    if config.task.name == "segments":
        return segments.segments(config.task, config.rollout.prompt_bucket)
    return countdown_task(config.task, config.rollout.prompt_bucket, config.rollout.max_new_tokens)
