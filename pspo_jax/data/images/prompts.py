"""The places of images in prompts: from marks in the text to runs of tokens, one token for each unit of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.conversations import IMAGE_MARK, IMAGE_PLACE, Conversation, content_of
from pspo_jax.data.images.processor import ImageProcessor
from pspo_jax.data.images.settings import read_processor
from pspo_jax.data.rendering import PromptError

IMAGES_FOR_TEXT = "has images, and the model reads text alone"
_START, _PAD, _END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_OTHERS = ("<|vision_pad|>", "<|video_pad|>")


class VisualInput(NamedTuple):
    """What the tokenizer of a checkpoint with a vision tower knows about images."""

    processor: ImageProcessor
    image_id: int
    """Id of the token that stands for a unit of an image."""
    forbidden: tuple[int, ...]
    """Ids that stand around or for images and videos, and that no completion may hold."""
    line: str
    """A line that says which bounds on pixels images have."""

    def identity(self) -> str:
        """A text that changes with everything on which the ids and patches of images depend."""
        return f"{self.processor.identity()} {self.image_id}"


def visual_input(vocab: Mapping[str, int], folder: Path, prompt: PromptConfig, where: str) -> VisualInput:
    """What a visual checkpoint's tokenizer and processor say about images.

    Args:
      vocab: token -> id.
      folder: the checkpoint's folder.
      where: the config field that names it, with its value, for messages.
    Raises:
      ConfigError: the tokenizer lacks the tokens of images, or the processor is not supported.
    """
    if missing := [token for token in (_START, _PAD, _END) if token not in vocab]:
        raise ConfigError(
            f"{where}: its tokenizer has no token {missing[0]} for images; use the checkpoint's own tokenizer"
        )
    processor, line = read_processor(folder, prompt, where)
    forbidden = tuple(vocab[token] for token in (_START, _PAD, _END, *_OTHERS) if token in vocab)
    return VisualInput(processor, vocab[_PAD], forbidden, line)


def place_images(messages: Conversation, count: int) -> Conversation:
    """A conversation with IMAGE_PLACE where its images go, in their order.

    Images are where its parts have them; or else where IMAGE_MARK is; or else, if nothing marks them, at the beginning
    of the first turn of the user.

    Raises:
      PromptError: it has marks for more images or for fewer than `count`.
    """
    places = sum(content_of(m).count(IMAGE_PLACE) for m in messages)
    marks = sum(content_of(m).count(IMAGE_MARK) for m in messages)
    if places:
        if places != count:
            raise PromptError(f"has {_number(places, 'image')} among its turns, and {count} in its column")
        return messages
    if marks:
        if marks != count:
            marked = _number(marks, f"mark {IMAGE_MARK}", f"marks {IMAGE_MARK}")
            raise PromptError(f"has {marked} for {_number(count, 'image')}")
        return [{**m, "content": content_of(m).replace(IMAGE_MARK, IMAGE_PLACE)} for m in messages]
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    before = {**messages[first], "content": IMAGE_PLACE * count + content_of(messages[first])}
    return [*messages[:first], before, *messages[first + 1 :]]


def as_tokens(text: str) -> str:
    """A text in which each IMAGE_PLACE is replaced by the tokens that chat templates write for an image."""
    return text.replace(IMAGE_PLACE, _START + _PAD + _END)


def expanded(ids: list[int], visual: VisualInput, grids: Sequence[tuple[int, int]]) -> list[int]:
    """Ids in which each image's one token is repeated for each of its units.

    Args:
      grids: rows and columns of patches of each image, in the order of the images.
    Raises:
      PromptError: the ids do not hold exactly one token for each image.
    """
    found = ids.count(visual.image_id)
    if found != len(grids):
        raise PromptError(
            f"has {_number(len(grids), 'image')}, and {found} {_PAD} once the template is filled in; the template may "
            "be one for text alone, or the text may hold this token"
        )
    numbers = iter([visual.processor.num_tokens(grid) for grid in grids])
    return [i for token in ids for i in ([token] * next(numbers) if token == visual.image_id else [token])]


def first_tokens(ids: Sequence[int], image_id: int, numbers: Sequence[int]) -> list[int]:
    """The index of the first token of each image among expanded ids.

    Args:
      numbers: tokens of each image, in the order of the images.
    """
    out: list[int] = []
    place = 0
    for number in numbers:
        place = next(i for i in range(place, len(ids)) if ids[i] == image_id)
        out.append(place)
        place += number
    return out


def _number(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"
