"""The ids and images of chosen prompts, from which a batch for the devices is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pspo_jax.data.images.prompt_images import PromptImage
from pspo_jax.data.task import PromptDataset


class ImageBatch(NamedTuple):
    """B prompts with their images, on the host."""

    tokens: Int[np.ndarray, "B P"]
    """Token ids, padded on the right; a run of the image token stands for each image."""
    lengths: Int[np.ndarray, "B"]
    """Tokens of each prompt."""
    images: Sequence[Sequence[PromptImage]]
    """Images of each prompt in the order of their tokens; none where a prompt has none."""


def image_batch(prompts: PromptDataset, rows: Int[np.ndarray, "B"]) -> ImageBatch:
    """The prompts of a data set with these rows.

    Patches are read from the cache of patches, through a memory map; an image that is not there any more is decoded
    again.
    """
    tokens, lengths = prompts.tokens[rows], prompts.lengths[rows]
    if prompts.images is None:
        return ImageBatch(tokens, lengths, [[] for _ in rows])
    of = prompts.images.of
    found = [of(int(row), ids[:n].tolist()) for row, ids, n in zip(rows, tokens, lengths, strict=True)]
    return ImageBatch(tokens, lengths, found)
