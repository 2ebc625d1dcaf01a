"""The embeddings of all images of a run, computed before its first step by a vision tower that does not train.

They are computed before the first step and not as batches need them: every step then takes as long as the next one,
no step holds pixels, and a run that ends and carries on reads what the first one wrote.

Images are encoded in programs of few shapes, some images at a time: those of up to 1, 4, 16, 64, ... windows each have
a program of their own. An image then costs at most four times its own windows, and what the tower makes of it does not
depend on the other images of the data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from pspo_jax.arrays.images import PatchLayout, PlacedImage, lay_out
from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.arrays.state import TrainState
from pspo_jax.checkpoint.checksums import named_checksums
from pspo_jax.data.image_batches import EmbeddingRoom, EmbeddingTable
from pspo_jax.data.images.embedding_cache import EmbeddingCache, digest_of, embedding_cache
from pspo_jax.data.images.prompt_images import PromptImages
from pspo_jax.data.loading import cache_folder
from pspo_jax.data.task import PromptDataset
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import ROWS, batch_sharding, replicated, size_along
from pspo_jax.model import Architecture, Model
from pspo_jax.system.progress import Progress
from pspo_jax.training.setup import Setup

_WINDOWS_AT_A_TIME = 64
"""Windows that each device encodes at a time, unless one image has room for more."""
_STEP = 4
"""Factor between the windows for which two programs have room."""
_WRITERS = 8
"""Threads that write files, which mostly wait for the disk."""


class _Image(NamedTuple):
    """A distinct image of the data."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    tokens: int
    read: Callable[[], UInt8[np.ndarray, "n c"]]
    """A function that reads its patches."""


def with_embeddings(setup: Setup, state: TrainState, progress: Progress, stop: Callable[[], bool]) -> Setup | None:
    """The setup with the embeddings of its images, if its batches hold any; None if a stop was asked for meanwhile."""
    if setup.embeddings is None:
        return setup
    parts, folder = (setup.task.train, setup.task.heldout), cache_folder(setup.config.task)
    made = setup.embeddings, setup.model, setup.architecture, state.weights, setup.mesh
    filled = fill(*made, parts, folder, progress, stop)
    return None if filled is None else setup._replace(embeddings=filled)


def fill(
    room: EmbeddingRoom,
    model: Model,
    architecture: Architecture,
    weights: PyTree,
    mesh: Mesh,
    parts: Sequence[PromptDataset],
    folder: Path,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> EmbeddingRoom | None:
    """The room with the embeddings of all images of these data sets; None if a stop was asked for meanwhile.

    Those that are not in the cache are computed, and also those that are damaged or that processes have differently.
    All processes must call it, and all write what is computed to their own caches.

    Args:
      weights: the weights that the model's functions take.
      mesh: the mesh, which must be the one in context; its devices share the images.
      folder: the cache folder, task.cache.
      stop: says whether to stop, the same on all processes; what is computed by then is kept.
    Raises:
      StorageError: the cache cannot be written.
    """
    began = time.monotonic()
    found, digests = _distinct(parts)
    cache = embedding_cache(folder, _tower(architecture, weights), room.width, room.dtype)
    names = list(found)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        kept = list(threads.map(lambda name: cache.checksum(name, found[name].tokens), names))
    there = processes.equal_everywhere(np.array(kept, np.uint32)) & (np.array(kept) != 0)
    missing = [name for name, is_there in zip(names, there.tolist(), strict=True) if not is_there]
    images = {name: found[name] for name in missing}
    if missing and not _compute(cache, images, model, architecture, weights, mesh, progress, stop):
        return None
    progress.say(
        f"images: {len(names):,} distinct ones stand in batches as what the frozen vision tower makes of them, "
        f"{len(missing):,} of which were computed now, in {time.monotonic() - began:.1f} s (kept in {cache.folder})"
    )
    return room._replace(table=EmbeddingTable(cache, digests))


def _tower(a: Architecture, weights: PyTree) -> str:
    """A text that changes with the sizes and the weights of the vision tower."""
    whole = weights.frozen if isinstance(weights, SplitParams) else weights
    return f"{a.vision} {sorted(named_checksums(whole['vision']).items())}"


def _distinct(parts: Sequence[PromptDataset]) -> tuple[dict[str, _Image], dict[str, str]]:
    """Digest -> image of the distinct images of data sets, and key -> digest of all of them.

    Raises:
      ValueError: two different images have one key.
    """
    every: list[tuple[str, PromptImages, int]] = []
    for part in parts:
        if part.images is not None:
            number_of = {key: number for number, key in enumerate(part.images.keys)}
            every += [(key, part.images, number) for key, number in number_of.items()]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        names = list(threads.map(lambda item: digest_of(item[1].read(item[2]), item[1].grid(item[2])), every))
    found: dict[str, _Image] = {}
    digests: dict[str, str] = {}
    for name, (key, images, number) in zip(names, every, strict=True):
        if digests.setdefault(key, name) != name:
            raise ValueError(f"two different images of the data have the key {key}; give each a key of its own")
        grid = images.grid(number)
        found.setdefault(name, _Image(grid, images.processor.num_tokens(grid), partial(images.read, number)))
    return found, digests


def _compute(
    cache: EmbeddingCache,
    missing: Mapping[str, _Image],
    model: Model,
    architecture: Architecture,
    weights: PyTree,
    mesh: Mesh,
    progress: Progress,
    stop: Callable[[], bool],
) -> bool:
    """Compute and keep the embeddings of images, digest -> image; False if a stop was asked for meanwhile."""
    assert model.encode_images is not None and architecture.vision is not None
    program, rows = jax.jit(model.encode_images, out_shardings=replicated(mesh)), batch_sharding(mesh)
    layout, numbers = architecture.vision.layout, architecture.vision.patch_numbers
    stopped = False
    with (
        progress.phase("image embeddings", len(missing)) as bar,
        ThreadPoolExecutor(_WRITERS) as threads,
    ):
        writes: list[Future[None]] = []
        for windows, names in _batches(missing, layout, size_along(mesh.shape, ROWS)):
            if stopped := stop():
                break
            images = [PlacedImage(0, *missing[name].grid, missing[name].read()) for name in names]
            lengths = [missing[name].tokens for name in names]
            laid_out = lay_out([[x] for x in images], lengths, windows * layout.units, windows, numbers, layout)
            embeddings = processes.to_host(program(weights, processes.to_global(laid_out, rows)))
            units = np.asarray(laid_out.unit)
            # The last batch of a shape repeats its last image, which is written once.
            for i, name in enumerate(dict.fromkeys(names)):
                writes.append(threads.submit(cache.keep, name, embeddings[i, units[i, : lengths[i]]]))
            bar(len(set(names)), "")
        for write in writes:
            write.result()
    return not stopped


def _batches(images: Mapping[str, _Image], layout: PatchLayout, shards: int) -> Iterator[tuple[int, list[str]]]:
    """Windows for which a batch's images have room, and the digests of as many images as the shape holds.

    Args:
      shards: number of devices that split a batch.
    """
    by_windows: dict[int, list[str]] = {}
    for name, image in images.items():
        needed, windows = layout.num_windows(*image.grid), 1
        while windows < needed:
            windows *= _STEP
        by_windows.setdefault(windows, []).append(name)
    for windows, names in sorted(by_windows.items()):
        size = shards * max(1, _WINDOWS_AT_A_TIME // windows)
        for start in range(0, len(names), size):
            some = names[start : start + size]
            yield windows, some + some[-1:] * (size - len(some))
