"""Tokenizers of tasks that have an alphabet of their own: one token a character."""

from __future__ import annotations

from typing import Any

from pspo_jax.config.fields import ConfigError


class CharTokenizer:
    """One token a character; `$` ends a completion and `_` pads.

    Args:
      characters: the alphabet, with `$` and `_`.
      vocab_size: rows of the embedding; those beyond the alphabet are never drawn.
    """

    def __init__(self, characters: str, vocab_size: int):
        self.characters = characters
        self.vocab_size = vocab_size
        self.eos_token_id = characters.index("$")
        self.pad_token_id = characters.index("_")
        self.forbidden = (self.pad_token_id, *range(len(characters), vocab_size))

    def encode(self, text: str) -> list[int]:
        if unknown := set(text) - set(self.characters):
            raise ConfigError(f"text {text!r}: no token for {sorted(unknown)}; the task knows {self.characters!r}")
        return [self.characters.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] if i < len(self.characters) else "?" for i in ids)

    def to_hf(self) -> Any:
        """The same tokenizer for transformers."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.characters)}, unk_token="_"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        inner.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", pad_token="_")
