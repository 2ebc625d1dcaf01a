"""The tokenizer and chat template of a checkpoint, which make a prompt of a question."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig
from pspo_jax.data.conversations import IMAGE_PLACE, Conversation, content_of
from pspo_jax.data.images.prompts import (
    IMAGES_FOR_TEXT,
    VisualInput,
    as_tokens,
    expanded,
    place_images,
    visual_input,
)
from pspo_jax.data.images.settings import is_visual
from pspo_jax.data.rendering import OWN_SYSTEM, SEVERAL_TURNS, PromptError, render, render_whole
from pspo_jax.data.stop_ids import describe, stop_ids
from pspo_jax.data.templates import ANSWER_BEGINNINGS, QUESTIONS, SYSTEM_PROMPTS, TEXTS
from pspo_jax.model.huggingface.json_files import check_side_files, read_json
from pspo_jax.model.huggingface.load import fetch, import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTokenizer:
    """A tokenizer of transformers as tasks use it, with the ids that a run needs.

    Args:
      hf: transformers' tokenizer.
      folder: the folder from which it was read.
      stop_ids: ids that end a completion.
      vocab_size: rows of the embedding.
      visual: what it knows about images; None = the model reads text alone.
    """

    def __init__(
        self,
        hf: PreTrainedTokenizerBase,
        folder: Path,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        visual: VisualInput | None = None,
    ):
        self.hf = hf
        self.visual = visual
        # Prompts that are too long are counted and listed; a warning per tokenizer would add nothing.
        hf.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.folder = folder
        self.stop_ids = stop_ids
        """Ids that end a completion, as `stop_ids.stop_ids` finds them."""
        self.vocab_size = vocab_size
        """Rows of the embedding; the tokenizer may have fewer ids, or a few more, which are never drawn."""
        self.eos_token_id = stop_ids[0]
        self.pad_token_id = _padding_id(hf, stop_ids)
        self._before = _ids_before_text(hf)

    def identity(self) -> str:
        """Hash of everything that encoding depends on."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        model = backend.to_str() if backend is not None else json.dumps(self.hf.get_vocab(), sort_keys=True)
        visual = "" if self.visual is None else f"\0{self.visual.identity()}"
        return hashlib.sha256(f"{model}\0{self.hf.chat_template}\0{self.stop_ids}{visual}".encode()).hexdigest()[:16]

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Ids that no completion may hold: rows of the embedding without a token, and tokens of images."""
        used = set(self.hf.get_vocab().values()) - {*(self.visual.forbidden if self.visual else ())}
        return tuple(i for i in range(self.vocab_size) if i not in used)

    def stop_line(self) -> str:
        """A line that says which tokens end a completion."""
        return f"a completion ends with {describe(self.hf, self.stop_ids)}"

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without BOS or EOS."""
        return list(self.hf.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text with its special tokens, so that every token that was drawn can be seen."""
        return str(self.hf.decode(list(ids), skip_special_tokens=False))

    def completion_text(self, ids: list[int]) -> str:
        """Text of a completion without stop and padding tokens, for a verifier.

        Other special tokens stay: some checkpoints have `<think>` and `<answer>` among them.
        """
        ends = {*self.stop_ids, self.pad_token_id}
        return self.decode(i for i in ids if i not in ends)

    def answer_beginning(self, config: PromptConfig) -> str:
        """The part of the answer that the prompt already holds; rewards see it before the completion.

        Some chat templates, such as DeepSeek-R1-Distill's, write the opening <think> themselves.
        """
        if config.template in ANSWER_BEGINNINGS:
            return ANSWER_BEGINNINGS[config.template] + config.prefill
        rendered = self.decode(self.prompt("?", config)).removesuffix(config.prefill)
        return next((tag for tag in ("<think>\n", "<think>") if rendered.endswith(tag)), "") + config.prefill

    def prompt(
        self, prompt: str | Conversation, config: PromptConfig, grids: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Ids of a question or conversation as the model sees it, up to the place where its answer begins.

        They begin with one BOS, or whatever the tokenizer puts before a text.

        Args:
          grids: rows and columns of patches of each of the prompt's images.
        Raises:
          PromptError: the template has no place for the conversation, or refuses it; or its images are not as many as
            its marks for them, or the model reads text alone.
        """
        if config.template == "chat":
            ids = self.encode(self.chat(prompt, config, len(grids)) + config.prefill)
        elif isinstance(prompt, list):
            raise PromptError(SEVERAL_TURNS)
        else:
            text = self._plain(_message(prompt, config), len(grids))
            if config.template in TEXTS:
                ids = self.encode(TEXTS[config.template].replace("{question}", text) + config.prefill)
            else:
                ids = self.encode(text) + self.encode(config.prefill)
        if self.visual is not None:
            ids = expanded(ids, self.visual, grids)
        return ids if ids[: len(self._before)] == self._before else self._before + ids

    def chat(self, prompt: str | Conversation, config: PromptConfig, images: int = 0) -> str:
        """A question or conversation in the chat template, with the config's messages; each image has one token.

        Raises:
          PromptError: the template refuses it or leaves out a turn, or it has a system message beside prompt.system.
        """
        messages: Conversation = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if messages[-1]["role"] == "user":
            last = {**messages[-1], "content": _message(content_of(messages[-1]), config)}
            messages = [*messages[:-1], last]
        messages = self.placed(messages, images)
        if config.system is not None:
            if any(message["role"] == "system" for message in messages):
                raise PromptError(OWN_SYSTEM)
            system = SYSTEM_PROMPTS.get(config.system, config.system)
            messages = [{"role": "system", "content": system}, *messages]
        if isinstance(prompt, list) or images:
            return render_whole(self.hf, messages, config)
        return render(self.hf, messages, config)

    def placed(self, messages: Conversation, images: int) -> Conversation:
        """A conversation with the places of its images, of which a model that reads text alone has none.

        Raises:
          PromptError: its marks are not as many as its images, or the model reads text alone.
        """
        if self.visual is not None:
            return place_images(messages, images)
        if images or any(IMAGE_PLACE in content_of(m) for m in messages):
            raise PromptError(IMAGES_FOR_TEXT)
        return messages

    def _plain(self, text: str, images: int) -> str:
        """A text with the tokens of its images, for templates that are no chat templates."""
        return as_tokens(content_of(self.placed([{"role": "user", "content": text}], images)[0]))


def _message(question: str, config: PromptConfig) -> str:
    """The user's message around a question."""
    return QUESTIONS.get(config.question, config.question).replace("{question}", question)


def _ids_before_text(hf: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text, such as BOS."""
    bare, whole = (list(hf.encode("a", add_special_tokens=special)) for special in (False, True))
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:place]


def _padding_id(hf: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> int:
    """The id that fills padding. It may be a stop id, because masks come from lengths, but never an ordinary token."""
    pad, backend = hf.pad_token_id, getattr(hf, "backend_tokenizer", None)
    if pad is None or backend is None:
        return stop_ids[0]
    # Naming an ordinary token as padding makes it "special"; that it comes from the vocabulary proper gives it away.
    ordinary = hf.convert_ids_to_tokens(pad) in backend.get_vocab(with_added_tokens=False)
    return stop_ids[0] if ordinary else int(pad)


def load_tokenizer(config: Config, source: Path | None, embedding_rows: int | None) -> TextTokenizer:
    """The tokenizer of `model.tokenizer` or, without one, of the checkpoint.

    Args:
      source: the checkpoint's folder.
      embedding_rows: V of the checkpoint; None = as many as the tokenizer has entries.
    Raises:
      ConfigError: it cannot be read, has no stop token in the embedding, no chat template or one that cannot render
        the config's prompts, or rollout.stop names no token of it.
    """
    name = config.model.tokenizer or config.model.source
    field = "model.tokenizer" if config.model.tokenizer else "model.source"
    assert name is not None
    folder = fetch(name, None, field, weights=False) if config.model.tokenizer or source is None else source
    check_side_files(folder, f"{field}={name}")
    hf = read_tokenizer(folder, f"{field}={name}")
    # Gemma 3 1B's tokenizer has one id more than the embedding has rows; a prompt that holds it is refused.
    rows = embedding_rows or max(hf.get_vocab().values()) + 1
    visual = _visual(hf, source, config)
    stop = stop_ids(hf, [folder, *([source] if source else [])], config.prompt, config.rollout.stop)
    if not stop:
        raise ConfigError(f"{field}={name}: neither tokenizer, generation config nor template names an EOS token")
    if bad := [i for i in stop if i >= rows]:
        raise ConfigError(
            f"{field}={name}: stop ids {bad} lie beyond the embedding: the tokenizer has {len(hf):,} entries, the "
            f"embedding only {rows:,} rows; use the checkpoint's own tokenizer"
        )
    tokenizer = TextTokenizer(hf, folder, stop, rows, visual)
    if "{question}" not in _message("{question}", config.prompt):
        raise ConfigError(
            f"prompt.question={config.prompt.question!r}: must hold {{question}}, or be one of {', '.join(QUESTIONS)}"
        )
    if config.prompt.template == "chat":
        _check_chat(tokenizer, config.prompt, name)
    return tokenizer


def _visual(hf: PreTrainedTokenizerBase, source: Path | None, config: Config) -> VisualInput | None:
    """What the tokenizer knows about images, if the checkpoint has a vision tower.

    The released checkpoints have their chat template in a file that AutoTokenizer does not read; it is set here.

    Raises:
      ConfigError: bounds on pixels are set for a model that reads text alone, or the processor is not supported.
    """
    where = f"model.source={config.model.source}"
    if source is None or not is_visual(source, where):
        for name in ("min_pixels", "max_pixels"):
            if (value := getattr(config.prompt, name)) is not None:
                raise ConfigError(f"prompt.{name}={value}: {where} reads text alone; drop it, or name a visual model")
        return None
    legacy = source / "chat_template.json"
    if config.model.tokenizer is None and legacy.exists() and not (source / "chat_template.jinja").exists():
        hf.chat_template = read_json(legacy, where).get("chat_template") or hf.chat_template
    return visual_input(hf.get_vocab(), source, config.prompt, where)


def _check_chat(tokenizer: TextTokenizer, prompt: PromptConfig, name: str) -> None:
    """Refuse a chat template that cannot write this config's prompts."""
    if not tokenizer.hf.chat_template:
        raise ConfigError(f"prompt.template=chat: the tokenizer of {name} has no chat template; use none")
    probe = "What is 2 + 2?"
    plain = dataclasses.replace(prompt, system=None)
    try:
        text = tokenizer.chat(probe, plain)
        if tokenizer.visual is not None:
            tokenizer.prompt([{"role": "user", "content": f"{IMAGE_PLACE}{probe}"}], plain, [(2, 2)])
    except PromptError as error:
        raise ConfigError(
            f"prompt.template=chat: {name} cannot render a question ({error}); choose another prompt.template, or "
            "another model.tokenizer"
        ) from error
    if probe not in text:
        raise ConfigError(
            f"prompt.template=chat: the chat template of {name} leaves the question out; choose another prompt.template"
        )
    if prompt.system is None:
        return
    system, advice = SYSTEM_PROMPTS.get(prompt.system, prompt.system), "drop it, and put its text into prompt.question"
    try:
        text = tokenizer.chat(probe, prompt)
    except PromptError as error:
        raise ConfigError(
            f"prompt.system={prompt.system[:60]!r}: {name} cannot render a system message ({error}); {advice}"
        ) from error
    if system.strip() not in text:
        raise ConfigError(
            f"prompt.system={prompt.system[:60]!r}: the chat template of {name} leaves system messages out; {advice}"
        )


def read_tokenizer(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a folder; `where` begins the error's message."""
    transformers = import_transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: its tokenizer cannot be read: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
