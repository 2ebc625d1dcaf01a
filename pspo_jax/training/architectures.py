"""From a config to the checkpoint, the tokenizer and the architecture that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pspo_jax.config.defaults import uses_char_tokenizer
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.tokenizer import TextTokenizer, load_tokenizer
from pspo_jax.model import Architecture, built_in
from pspo_jax.model.architecture import lora_of
from pspo_jax.model.huggingface.load import Source, read_source
from pspo_jax.rewards.task import embedded_tower, make_char_tokenizer


def architecture_for(
    config: Config, weights: bool = True
) -> tuple[Source | None, TextTokenizer | CharTokenizer, Architecture]:
    """The checkpoint if there is one, the tokenizer, and the model's architecture with its adapters."""
    if config.task.name == "own" and config.model.source is None:
        raise ConfigError("task.name=own: only the program that gave its task to pspo_jax.train has its tokenizer")
    if uses_char_tokenizer(config):
        own = make_char_tokenizer(config)
        return None, own, built_in(config.model, own.vocab_size, own.forbidden, embedded_tower(config))
    source = read_source(config.model, weights) if config.model.source is not None else None
    rows = source.architecture.vocab_size if source else None
    tokenizer = load_tokenizer(config, source.folder if source else None, rows)
    if source is None:
        return None, tokenizer, built_in(config.model, tokenizer.vocab_size, tokenizer.forbidden)
    return source, tokenizer, as_trained(source.architecture, config, tokenizer.forbidden)


def as_trained(a: Architecture, config: Config, forbidden: Sequence[int]) -> Architecture:
    """A checkpoint's architecture with the parts of it that train, and the ids that are never drawn.

    Args:
      forbidden: ids of the task that are never drawn; those of images are added to them.
    """
    return dataclasses.replace(
        a,
        forbidden=tuple(sorted({*forbidden, *a.forbidden})),
        lora=lora_of(config.lora),
        freezes_vision=config.model.vision == "frozen",
    )
