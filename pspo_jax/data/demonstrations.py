"""Demonstrations from a JSONL file, as token ids: rows of prompt and completion, or of messages, with their images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig
from pspo_jax.data.conversations import IMAGE_PLACE, Conversation, content_of, image_parts, read_prompt, read_turns
from pspo_jax.data.images.cache import PatchCache, keep_all, patch_cache
from pspo_jax.data.images.processor import ImageError
from pspo_jax.data.images.prompt_images import PromptImages, first_of
from pspo_jax.data.images.prompts import IMAGES_FOR_TEXT, VisualInput, expanded
from pspo_jax.data.images.reading import Loaded, image_bytes, listed_images, load, part_image
from pspo_jax.data.loading import IMAGE_COLUMNS, VIDEO_COLUMNS, cache_folder
from pspo_jax.data.rendering import PromptError, render
from pspo_jax.data.task import (
    CompletionBatch,
    Demonstrations,
    PromptDataset,
    PromptEncoder,
    RewardResult,
    Task,
    Tokenizer,
    json_lines,
)
from pspo_jax.data.tokenising import unusable
from pspo_jax.data.tokenizer import TextTokenizer
from pspo_jax.system.storage import StorageError

_FORMS = '{"prompt": ..., "completion": ...} or {"messages": [..., {"role": "assistant", "content": ...}]}'
_DECODED_AT_A_TIME = 64
"""Images whose bytes are in memory together."""


class Example(NamedTuple):
    """A row as token ids."""

    prompt: list[int]
    """Ids of the prompt, in which a run of the image token stands for each image."""
    completion: list[int]
    """Ids of the completion, with the token that ends it."""
    images: Sequence[Loaded] = ()
    """The images of the prompt in the order of their tokens."""


class _Row(NamedTuple):
    """A row before it is tokenised."""

    prompt: str | Conversation
    completion: str
    images: Sequence[object]
    """The images, as `image_bytes` reads them."""


class _Undecoded(NamedTuple):
    """An image whose patches are not in the cache."""

    line: int
    """Number of the line that holds it, from 1."""
    value: object
    """The image, as `image_bytes` reads it."""
    grid: tuple[int, int]
    """Rows and columns of its patches."""


def read_text(path: Path) -> str:
    """The text of the file that sft.data names.

    Raises:
      ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"sft.data={path}: {error.strerror}; name a JSONL file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"sft.data={path}: is not UTF-8 ({error}); convert it") from error


def example_patches(config: Config, tokenizer: Tokenizer) -> PatchCache | None:
    """The cache of patches for the images of demonstrations; None = the model reads text alone."""
    visual = _visual(tokenizer)
    return None if visual is None else patch_cache(cache_folder(config.task), visual.processor)


def read_examples(
    path: Path,
    tokenizer: Tokenizer,
    encode_prompt: PromptEncoder,
    stop_ids: tuple[int, ...],
    config: PromptConfig,
    patches: PatchCache | None = None,
) -> list[Example]:
    """The examples of a file, one a line; a completion without a stop token gets EOS at its end.

    A row is `{"prompt": text, "completion": text}`, whose prompt is put into the template of the config, or messages,
    which the tokenizer's chat template renders: `{"messages": [...]}` or `{"conversations": [...]}`, of which the last
    one is the assistant's and the only one that is learnt, or `{"prompt": [...], "completion": [...]}`. The images of
    the prompt are in a column `images` or `image`, or among the parts of its messages; paths are relative to the file.

    Args:
      patches: the cache that all images are in afterwards; None = the model reads text alone.
    Raises:
      ConfigError: a line has another form, an image cannot be used, or there is no line.
      StorageError: the cache cannot be written.
    """
    found: list[Example] = []
    undecoded: dict[str, _Undecoded] = {}
    for number, line in enumerate(json_lines(read_text(path)), 1):
        where = f"sft.data={path} line {number}"
        try:
            row = _row(json.loads(line))
            example = _tokenised(row, path.parent, tokenizer, encode_prompt, stop_ids, config)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except PromptError as error:
            raise ConfigError(f"{where}: its prompt {error}") from error
        except ImageError as error:
            raise ConfigError(f"{where}: {unusable(error)}") from error
        except (json.JSONDecodeError, UnicodeError, KeyError, TypeError, IndexError) as error:
            reason = f" ({error})" if isinstance(error, TypeError) else ""
            raise ConfigError(f"{where}: needs {_FORMS}, got {line[:60]!r}{reason}") from error
        found.append(example)
        if patches is not None:
            for value, image in zip(row.images, example.images, strict=True):
                if patches.find(image.key, image.grid) is None:
                    undecoded[image.key] = _Undecoded(number, value, image.grid)
            if len(undecoded) >= _DECODED_AT_A_TIME:
                _decode(path, undecoded, patches)
                undecoded = {}
    if not found:
        raise ConfigError(f"sft.data={path}: holds no rows; name another")
    if patches is not None:
        _decode(path, undecoded, patches)
    return found


def example_images(
    examples: Sequence[Example], tokenizer: Tokenizer, patches: PatchCache | None
) -> PromptImages | None:
    """The images of the examples' prompts, whose patches are in the cache; None if they have none."""
    visual = _visual(tokenizer)
    images = [image for example in examples for image in example.images]
    if patches is None or visual is None or not images:
        return None

    def read(number: int) -> UInt8[np.ndarray, "n c"]:
        found = patches.find(*images[number])
        if found is None:
            raise StorageError(f"{patches.path(images[number].key)}: is lost; the same command makes it again")
        return found

    return PromptImages(
        first_of([len(example.images) for example in examples]),
        np.array([image.grid for image in images], np.int32),
        [image.key for image in images],
        read,
        visual.processor,
        visual.image_id,
    )


def _visual(tokenizer: Tokenizer) -> VisualInput | None:
    return tokenizer.visual if isinstance(tokenizer, TextTokenizer) else None


def _tokenised(
    row: _Row,
    folder: Path,
    tokenizer: Tokenizer,
    encode_prompt: PromptEncoder,
    stop_ids: tuple[int, ...],
    config: PromptConfig,
) -> Example:
    """A row's ids and images.

    Args:
      folder: the folder to which paths are relative.
    Raises:
      ConfigError, PromptError: the prompt cannot be encoded.
      ImageError: an image cannot be read.
    """
    visual, images = _visual(tokenizer), list[Loaded]()
    if row.images and visual is None:
        raise PromptError(f"{IMAGES_FOR_TEXT}; take them out, or name a checkpoint with a vision tower")
    if visual is not None:
        images = [load(value, folder, visual.processor) for value in row.images]
    grids = [image.grid for image in images]
    if not isinstance(row.prompt, str):
        prompt, completion = _turns(tokenizer, row.prompt, row.completion, stop_ids, config, grids)
    elif images and isinstance(tokenizer, TextTokenizer):
        prompt, completion = tokenizer.prompt(row.prompt, config, grids), tokenizer.encode(row.completion)
    else:
        prompt, completion = encode_prompt(row.prompt), tokenizer.encode(row.completion)
    ended = completion if completion and completion[-1] in stop_ids else [*completion, tokenizer.eos_token_id]
    return Example(prompt, ended, images)


def _decode(path: Path, images: Mapping[str, _Undecoded], patches: PatchCache) -> None:
    """Puts the patches of images, by their keys, into the cache.

    Raises:
      ConfigError: an image is broken.
      StorageError: the cache cannot be written.
    """

    def read(key: str) -> bytes:
        data = image_bytes(images[key].value, path.parent)
        if hashlib.sha256(data).hexdigest() != key:
            raise ImageError("its file has changed since the prompts were tokenised")
        return data

    broken = keep_all(patches, {key: image.grid for key, image in images.items()}, read)
    for key, error in broken.items():
        raise ConfigError(f"sft.data={path} line {images[key].line}: {unusable(error)}")


def _row(record: object) -> _Row:
    """Prompt, completion and images of a record: two texts, or messages and the assistant's text.

    Raises:
      KeyError, TypeError, IndexError: the row has another form.
      PromptError: it has videos.
      ConfigError: its completion holds an image.
    """
    if not isinstance(record, dict):
        raise TypeError("no object")
    if any(listed_images(record.get(name)) for name in VIDEO_COLUMNS):
        raise PromptError("has videos, and only still images are read")
    turns = record.get("messages", record.get("conversations"))
    images = next((found for name in IMAGE_COLUMNS if (found := listed_images(record.get(name)))), [])
    if turns is None and not isinstance(record["prompt"], list):
        if not isinstance(record["prompt"], str) or not isinstance(record["completion"], str):
            raise TypeError("no text")
        return _Row(record["prompt"], record["completion"], images)
    if turns is None:
        completion = record["completion"]
        if not isinstance(completion, list) or len(completion) != 1:
            completion = [{"role": "assistant", "content": completion}]
        turns = [*record["prompt"], *completion]
    if not isinstance(turns, list) or len(turns) < 2:
        raise TypeError("no messages")
    *prompt, last = read_turns(turns)
    if last["role"] != "assistant" or not content_of(last):
        raise TypeError("the last message is to be the assistant's answer to another one")
    if IMAGE_PLACE in content_of(last):
        raise ConfigError("its completion holds an image; only prompts may have images")
    held = [image for part in image_parts(turns[:-1]) if (image := part_image(part)) is not None]
    return _Row(prompt, content_of(last), images or held)


def _turns(
    tokenizer: Tokenizer,
    messages: Conversation,
    completion: str,
    stop_ids: tuple[int, ...],
    config: PromptConfig,
    grids: Sequence[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """Ids of a conversation up to the assistant's turn, and of that turn up to the token that ends it."""
    if not isinstance(tokenizer, TextTokenizer) or not tokenizer.hf.chat_template:
        raise ConfigError("has messages, and the tokenizer has no chat template; write prompt and completion as text")
    messages = tokenizer.placed(messages, len(grids))
    try:
        before = render(tokenizer.hf, messages, config)
        whole = render(tokenizer.hf, [*messages, {"role": "assistant", "content": completion}], config, generate=False)
    except PromptError as error:
        raise ConfigError(f"its messages: {error}") from error
    # A template may rewrite the assistant's turn, for example with a block of thought; then the row's text is taken.
    ids = tokenizer.encode(whole.removeprefix(before) if whole.startswith(before) else completion)
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    prompt = tokenizer.encode(before)
    return prompt if tokenizer.visual is None else expanded(prompt, tokenizer.visual, grids), ids[: end + 1]


def demonstration_task(config: Config, tokenizer: TextTokenizer) -> Task:
    """A task for supervised fine-tuning alone: its prompts are placeholders, and it has no reward."""

    def encode(prompt: object) -> list[int]:
        return tokenizer.prompt(prompt if isinstance(prompt, str) else read_prompt(prompt), config.prompt)

    assert config.sft.data is not None
    patches = example_patches(config, tokenizer)
    examples = read_examples(Path(config.sft.data), tokenizer, encode, tokenizer.stop_ids, config.prompt, patches)
    bucket = config.rollout.prompt_bucket
    width = -(-min(max(len(example.prompt) for example in examples), config.prompt.max_tokens) // bucket) * bucket
    rows = config.rollout.prompts
    placeholders = PromptDataset(
        np.full((rows, width), tokenizer.pad_token_id, np.int32), np.ones(rows, np.int32), [""] * rows
    )
    return Task(
        name="sft",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        forbidden=tokenizer.forbidden,
        stop_ids=tokenizer.stop_ids,
        train=placeholders,
        heldout=placeholders,
        reward_fn=_no_reward,
        demonstrations=_no_demonstrations,
        encode_prompt=encode,
    )


def _no_demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
    raise ConfigError("sft.data=None: needs a JSONL file; a task of text has no demonstrations of its own")


def _no_reward(completions: CompletionBatch) -> Callable[[], RewardResult]:
    raise ConfigError("task: supervised fine-tuning alone has no reward; name a task")
