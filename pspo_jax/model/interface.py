"""The contract between a language model and everything that uses one: the sampler, the trainer, the checkpoints.

A model is a `Model`: a tuple of pure functions over its weights. Each function has a Protocol here that gives its
signature, with shapes. Letters: R rows, S positions of a row, B prompts of a batch, G completions of a prompt, P the
longest prompt, T the longest completion, D the width of the hidden states, V the vocabulary.

A model that reads images has `Model.encode_images`, and its other functions take images too. A model of text is never
given any.

Rows are compact: a prompt, its completion right behind it, then padding on the right. Causal attention alone is
therefore right for every real token, positions are 0, 1, 2, ..., and no function takes a padding mask.

`pspo_jax.model.custom` makes a `Model` from any function that returns logits; docs/extending/model.md shows how to
write one with a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.distributed.mesh import whole_to_index

MASKED = -1e30
"""Logit of a token that must never be drawn: exp() of it is 0 in float32, and it is finite, so 0 * MASKED is 0."""
_MASKED_BY_COMPARISON = 4
"""Largest number of runs of forbidden ids that are masked by comparisons, which cost less than a lookup."""


class Packed(NamedTuple):
    """Where the tokens of several rows lie that stand one behind another in one long row, a bin.

    A token attends to earlier tokens of its own row. Rows that share a prompt do not repeat it: one of them, the prompt
    row, holds it, and the others hold their completion alone and attend to the prompt there too. losses/packing.py
    draws an example.
    """

    row_of: Int[Array, "R S"]
    """Index, within the bin, of the row that each token belongs to; the padding at the end has an index of its own."""
    positions: Int[Array, "R S"]
    """Position of each token in its row, from 0. A row whose prompt stands elsewhere begins at the prompt's length."""
    prompt_row: Int[Array, "R S"] | None = None
    """Index of the row that holds the prompt of each token's row; None = every row holds its own prompt."""
    in_prompt_of: Int[Array, "R S"] | None = None
    """Index of the row whose prompt each token is part of, -1 for tokens of completions and for padding; None with
    `prompt_row`."""


class ImageTokens(NamedTuple):
    """Where rows hold tokens of images, and their embeddings."""

    embeddings: Float[Array, "N D"]
    """Embeddings of the units of all images in these rows, in any order, with some that no token stands for."""
    embedding_of: Int[Array, "R S"]
    """Index, among `embeddings`, of the one that each token has; -1 = the token is text and has that of its id."""
    positions: Int[Array, "R S 3"]
    """Position of each token on three axes, by which queries and keys are rotated; see arrays/images.py."""


class InitFn(Protocol):
    """Draws the weights that train: all of them or, for a model with adapters, the adapters."""

    def __call__(self, key: Key[Array, ""]) -> PyTree: ...


class HiddenFn(Protocol):
    """Runs the model over whole rows, up to the hidden states from which `LogitsFn` computes logits.

    `packed` is given only to a model with `Model.packs`, its `prompt_row` only to one with `Model.shares`, and `images`
    only to one with `Model.encode_images`. D is the model's own choice; the trainer does nothing with hidden states but
    select positions of them.
    """

    def __call__(
        self,
        params: PyTree,
        tokens: Int[Array, "R S"],
        packed: Packed | None = None,
        images: ImageTokens | None = None,
    ) -> Float[Array, "R S D"]: ...


class EncodeImagesFn(Protocol):
    """Runs the vision tower over the images of each prompt, up to one embedding for each unit.

    `ImageEmbeddings`, which batches hold where the tower does not train, are given back as they are.
    """

    def __call__(self, params: PyTree, images: Images) -> Float[Array, "B U D"]: ...


class LogitsFn(Protocol):
    """Turns hidden states into float32 logits of the next token, with forbidden ids at MASKED.

    The trainer calls it on chunks of positions, so that logits of all positions never exist at once.
    """

    def __call__(self, params: PyTree, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]: ...


class DecodeStep(Protocol):
    """Appends one token to every completion and returns the logits of the next one, and the new cache.

    `tokens` become token `t` of their completions; `t` is traced and counts from 0. It is a scalar in a decoder of
    `DecoderFn`, and [B], a number for the completions of each prompt, in one of `ResumeFn`.
    """

    def __call__(
        self, cache: PyTree, tokens: Int[Array, "B G"], t: Int[Array, "*B"]
    ) -> tuple[Float[Array, "B G V"], PyTree]: ...


class Decoder(NamedTuple):
    """A batch of prompts that have been read, ready to be continued."""

    logits: Float[Array, "B V"]
    """Logits of the first token of each prompt's completions."""
    cache: PyTree
    """The tokens so far, in the form that `step` needs. The sampler carries it through a `lax.while_loop`: a step
    returns the same shapes and types."""
    step: DecodeStep


class DecoderFn(Protocol):
    """Reads each prompt once, for `group_size` completions of at most `max_new_tokens` tokens each.

    The logits of the decoder are those of `LogitsFn`, with the same ids forbidden: the sampler's log-probs are then the
    ones that the trainer computes. `images` is given only to a model with `Model.encode_images`; None = all prompts are
    text.
    """

    def __call__(
        self,
        params: PyTree,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        group_size: int,
        max_new_tokens: int,
        images: Images | None = None,
    ) -> Decoder: ...


class Begun(NamedTuple):
    """The tokens of completions that have begun and go on."""

    tokens: Int[Array, "B G W"]
    """The first W tokens of each completion; none has more. What is behind its end means nothing."""
    lengths: Int[Array, "B G"]
    """Tokens that each completion has; 0 = it has none yet, or does not go on."""


class ResumeFn(Protocol):
    """`DecoderFn` for completions that have begun (`rollout.carry`): reads each prompt, and the tokens of `begun`.

    The cache then holds all tokens of `begun`. The logits are those of the first token, as in a `DecoderFn`; for the
    next token of a completion with n tokens, `step` is called with its last token and `t` = n - 1, once more. All
    completions of a prompt that go on have the same number of tokens.
    """

    def __call__(
        self,
        params: PyTree,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        begun: Begun,
        max_new_tokens: int,
    ) -> Decoder: ...


class ResizeFn(Protocol):
    """Returns the cache of a `Decoder` with room for `max_new_tokens` tokens of each completion, more or fewer."""

    def __call__(self, cache: PyTree, max_new_tokens: int) -> PyTree: ...


class EmptySlotsFn(Protocol):
    """Returns a cache without rows, of `rows` rows a shard whose completions have room for `columns` tokens."""

    def __call__(self, rows: int, columns: int) -> PyTree: ...


class LoadRowFn(Protocol):
    """Gives one slot of each shard another row: its prompt and, if it has waited, its completion so far.

    Args:
      cache: the rows of the slots.
      slot: the slot of each shard; one that is out of bounds = the shard loads none.
      prompt: index of the row's prompt among the prompts of its shard.
      waiting: the completions of the rows that wait; None = the row has no token in a cache.
      place: index of the row among the waiting ones of its shard.
    """

    def __call__(
        self, cache: PyTree, slot: Int[Array, "n"], prompt: Int[Array, "n"], waiting: PyTree, place: Int[Array, "n"]
    ) -> PyTree: ...


class SaveRowFn(Protocol):
    """Copies the completion of one slot of each shard to the completions that wait.

    Args:
      waiting: the completions of the rows that wait.
      place: the index in `waiting` that is replaced; one that is out of bounds = the shard saves none.
    """

    def __call__(self, waiting: PyTree, place: Int[Array, "n"], cache: PyTree, slot: Int[Array, "n"]) -> PyTree: ...


class SlotStep(Protocol):
    """Appends one token to the row of every slot and returns the logits of the next one, and the new cache.

    Args:
      cache: the rows of the slots, up to the token before `tokens`.
      tokens: token `t` of each slot's completion.
      t: index of that token in its completion; slots differ, since their rows began at different times. The token of
        a slot without room for it is not kept, and the slot's logits are arbitrary.
    """

    def __call__(
        self, cache: PyTree, tokens: Int[Array, "n s"], t: Int[Array, "n s"]
    ) -> tuple[Float[Array, "n s V"], PyTree]: ...


class SlotDecoder(NamedTuple):
    """A batch of prompts that have been read, and what decodes their completions in slots, one row after another."""

    logits: Float[Array, "B V"]
    """Logits of the first token of each prompt's completions."""
    slots: EmptySlotsFn
    """Makes the cache of slots, in the form that `step` needs."""
    waiting: EmptySlotsFn
    """Makes the cache of completions that wait for a slot."""
    load: LoadRowFn
    save: SaveRowFn
    step: SlotStep


class SlotDecoderFn(Protocol):
    """Reads each prompt once and prepares decoding in slots (rollout/continuous.py).

    Args:
      shards: number n of parts of the batch, one for each device that holds a part of it. Prompts are in n equal parts,
        and a slot takes rows of its own shard's prompts alone.
      images: given only to a model with `Model.encode_images`; None = the prompts are text.
    """

    def __call__(
        self,
        params: PyTree,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        shards: int,
        images: Images | None = None,
    ) -> SlotDecoder: ...


class Model(NamedTuple):
    """A causal language model as pure functions over its weights.

    The first six fields are required. The others make a model faster or smaller, and each has a default that asks
    nothing of it.
    """

    init: InitFn
    """`init(key) -> params`."""
    hidden: HiddenFn
    """`hidden(params, tokens [R, S], packed=None, images=None) -> [R, S, D]`."""
    logits: LogitsFn
    """`logits(params, hidden [..., D]) -> float32 [..., V]`."""
    decoder: DecoderFn
    """`decoder(params, prompts [B, P], lengths [B], group_size, max_new_tokens, images=None) -> Decoder`."""
    axes: PyTree
    """A pytree like params whose leaves are tuples: the logical axis of each dimension of a weight, or None for a
    dimension that is not split (distributed/mesh.py); None in place of the pytree replicates all weights."""
    vocab_size: int
    """V."""
    frozen_axes: PyTree | None = None
    """`axes` of the weights that do not train; None = all weights train. With frozen weights, the functions take a
    `SplitParams` in place of params."""
    resize: ResizeFn | None = None
    """Lets the sampler begin with a small cache and grow it; None = the cache has its full size from the start."""
    packs: bool = False
    """Whether `hidden` takes `packed`, so that short rows can share a bin."""
    slots: SlotDecoderFn | None = None
    """Continuous batching; None = rollout.slots is refused."""
    resume: ResumeFn | None = None
    """Reads completions that have begun; None = rollout.carry is refused."""
    shares: bool = False
    """Whether packed rows may share a prompt."""
    encode_images: EncodeImagesFn | None = None
    """The vision tower; None = the model reads text alone."""
    trains_encoder: bool = False
    """Whether weights that train are among those that `encode_images` reads."""


def mask_logits(logits: Float[Array, "*n V"], forbidden: Sequence[int]) -> Float[Array, "*n V"]:
    """The logits in float32, with those of the forbidden ids at MASKED."""
    logits = logits.astype(jnp.float32)
    if not forbidden:
        return logits
    runs = _runs(forbidden)
    if len(runs) <= _MASKED_BY_COMPARISON:
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        of_runs = [(token >= first) & (token <= last) for first, last in runs]
        return jnp.where(functools.reduce(jnp.logical_or, of_runs), MASKED, logits)
    is_forbidden = whole_to_index(jnp.zeros(logits.shape[-1], bool)).at[jnp.asarray(forbidden)].set(True)
    return jnp.where(whole_to_index(is_forbidden), MASKED, logits)


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """First and last id of each run of ids that follow one another; a padded embedding's last rows are one run."""
    found = set(ids)
    first = sorted(i for i in found if i - 1 not in found)
    last = sorted(i for i in found if i + 1 not in found)
    return list(zip(first, last, strict=True))
