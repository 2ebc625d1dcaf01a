"""Tokenizer and chat template of a checkpoint, and how a question becomes a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pspo_jax.config import Config, ConfigError, PromptConfig
from pspo_jax.policy.json_files import check_side_files
from pspo_jax.policy.pretrained import fetch, import_transformers
from pspo_jax.tasks.templates import BEGUN, QUESTIONS, SYSTEM_PROMPTS, TEXTS


class TextTokenizer:
    """A transformers tokenizer as tasks use it, with the ids that a run needs to know."""

    def __init__(self, hf: Any, folder: Path, stop_ids: tuple[int, ...], vocab_size: int):
        self.hf = hf
        # Prompts that are too long are counted and listed; a warning per tokenizer would add nothing.
        hf.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.folder = folder
        self.stop_ids = stop_ids
        """Ids that end a completion: those of the tokenizer, generation config and config together."""
        self.vocab_size = vocab_size
        """Rows of the embedding; ids from len(hf) on belong to no token."""
        self.eos_token_id = stop_ids[0]
        self.pad_token_id = _filler(hf, stop_ids)

    def identity(self) -> str:
        """Hash of what encoding depends on."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        model = backend.to_str() if backend is not None else json.dumps(self.hf.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{model}\0{self.hf.chat_template}\0{self.stop_ids}".encode()).hexdigest()[:16]

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Rows of the embedding that no token uses."""
        return tuple(range(len(self.hf), self.vocab_size))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without BOS or EOS."""
        return list(self.hf.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text with its special tokens, so that what was drawn can be read."""
        return str(self.hf.decode(list(ids), skip_special_tokens=False))

    def answer(self, ids: list[int]) -> str:
        """Text of a completion without stop and padding tokens, for a verifier.

        Other special tokens stay: some checkpoints have `<think>` and `<answer>` among them.
        """
        ends = {*self.stop_ids, self.pad_token_id}
        return self.decode(i for i in ids if i not in ends)

    def begun(self, config: PromptConfig) -> str:
        """The part of the answer that the prompt already holds; rewards see it before the completion.

        Some chat templates, such as DeepSeek-R1-Distill's, write the opening <think> themselves.
        """
        if config.template in BEGUN:
            return BEGUN[config.template] + config.prefill
        rendered = self.decode(self.prompt("?", config)).removesuffix(config.prefill)
        return next((tag for tag in ("<think>\n", "<think>") if rendered.endswith(tag)), "") + config.prefill

    def prompt(self, question: str, config: PromptConfig) -> list[int]:
        """Ids of a question as the policy sees it, ready for the answer to begin."""
        question = QUESTIONS.get(config.question, config.question).replace("{question}", question)
        if config.template in TEXTS:
            text = TEXTS[config.template].replace("{question}", question)
            return self.encode(text + config.prefill)
        if config.template == "none":
            ids = list(self.hf.encode(question, add_special_tokens=True))
            if ids and ids[-1] in self.stop_ids:
                ids.pop()
            return ids + self.encode(config.prefill)
        messages = [{"role": "user", "content": question}]
        if config.system is not None:
            system = SYSTEM_PROMPTS.get(config.system, config.system)
            messages.insert(0, {"role": "system", "content": system})
        extra = {} if config.thinking is None else {"enable_thinking": config.thinking}
        text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
        return self.encode(text + config.prefill)


def _filler(hf: Any, stop_ids: tuple[int, ...]) -> int:
    """The id that fills padding. Masks come from lengths, so it may be a stop id, but never an ordinary token."""
    pad, backend = hf.pad_token_id, getattr(hf, "backend_tokenizer", None)
    if pad is None or backend is None:
        return stop_ids[0]
    # Naming an ordinary token as padding makes it "special"; that it comes from the vocabulary proper gives it away.
    ordinary = hf.convert_ids_to_tokens(pad) in backend.get_vocab(with_added_tokens=False)
    return stop_ids[0] if ordinary else int(pad)


def load_tokenizer(config: Config, source: Path | None, embedding_rows: int | None) -> TextTokenizer:
    """The tokenizer of `policy.tokenizer` or, without one, of the checkpoint.

    Args:
      source: the checkpoint's folder.
      embedding_rows: V of the checkpoint; None = as many as the tokenizer has entries.
    Raises:
      ConfigError: it cannot be read, has no stop token or chat template, or is larger than the embedding.
    """
    name = config.policy.tokenizer or config.policy.source
    field = "policy.tokenizer" if config.policy.tokenizer else "policy.source"
    assert name is not None
    folder = fetch(name, None, field, weights=False) if config.policy.tokenizer or source is None else source
    check_side_files(folder, f"{field}={name}")
    hf = _read(folder, f"{field}={name}")
    if embedding_rows is not None and len(hf) > embedding_rows:
        raise ConfigError(
            f"{field}={name}: the tokenizer has {len(hf):,} entries, the embedding only {embedding_rows:,} rows; "
            "use the checkpoint's own tokenizer"
        )
    rows = embedding_rows or len(hf)
    stop = _stop_ids(hf, [folder, *([source] if source else [])])
    if not stop:
        raise ConfigError(f"{field}={name}: neither tokenizer nor generation config names an EOS token")
    if bad := [i for i in stop if i >= rows]:
        raise ConfigError(f"{field}={name}: stop ids {bad} lie beyond the embedding's {rows:,} rows")
    tokenizer = TextTokenizer(hf, folder, stop, rows)
    if config.prompt.template == "chat" and not hf.chat_template:
        raise ConfigError(f"prompt.template=chat: the tokenizer of {name} has no chat template; use none")
    if "{question}" not in QUESTIONS.get(config.prompt.question, config.prompt.question):
        raise ConfigError(
            f"prompt.question={config.prompt.question!r}: must hold {{question}}, or be one of {', '.join(QUESTIONS)}"
        )
    return tokenizer


def _read(folder: Path, where: str) -> Any:
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


def _stop_ids(hf: Any, folders: list[Path]) -> tuple[int, ...]:
    """The tokenizer's EOS first, then those of generation_config.json and config.json."""
    found: list[int] = [] if hf.eos_token_id is None else [int(hf.eos_token_id)]
    for folder in folders:
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            if path.exists():
                try:
                    value = json.loads(path.read_text()).get("eos_token_id")
                except (json.JSONDecodeError, AttributeError) as error:
                    raise ConfigError(f"policy.source={folder}: {name} is not a JSON object") from error
                found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(int(i) for i in found))
