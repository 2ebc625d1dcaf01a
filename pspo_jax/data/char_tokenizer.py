"""A tokenizer with one token per character, for tasks that need no checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pspo_jax.config.fields import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CharTokenizer:
    """One token per character; `$` ends a completion and `_` pads.

    Args:
      characters: the alphabet, with `$` and `_`.
      vocab_size: rows of the embedding; the ones beyond the alphabet are never drawn.
      of_prompts: characters that stand in prompts alone, such as those of images, and are never drawn either.
    """

    def __init__(self, characters: str, vocab_size: int, of_prompts: str = ""):
        self.characters = characters
        self.vocab_size = vocab_size
        self.eos_token_id = characters.index("$")
        self.pad_token_id = characters.index("_")
        never = sorted({self.pad_token_id, *map(characters.index, of_prompts)})
        self.forbidden = (*never, *range(len(characters), vocab_size))

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
          ConfigError: the text has a character that is not in the alphabet.
        """
        if unknown := set(text) - set(self.characters):
            raise ConfigError(f"text {text!r}: no token for {sorted(unknown)}; the task knows {self.characters!r}")
        return [self.characters.index(c) for c in text]

    def encode_prompt(self, prompt: object) -> list[int]:
        """The ids of a question, which must be a text.

        Raises:
          TypeError: it is no text.
          ConfigError: it has a character that is not in the alphabet.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"{type(prompt).__name__} is no text")
        return self.encode(prompt)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; `?` stands for ids beyond the alphabet."""
        return "".join(self.characters[i] if i < len(self.characters) else "?" for i in ids)

    def to_hf(self) -> PreTrainedTokenizerFast:
        """The same tokenizer for transformers."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.characters)}, unk_token="_"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        inner.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", pad_token="_")
