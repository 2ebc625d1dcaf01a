"""What both token loops share: settings, the completions so far, and the draw of one token for every row.

`sampler.py` decodes all rows at once, [B, G]; `continuous.py` decodes some rows at a time in slots, [n, s].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.state import Prompts
from pspo_jax.config.schema import RolloutConfig
from pspo_jax.model.interface import Model
from pspo_jax.rollout.token_sampling import draw_tokens


class SamplingParams(NamedTuple):
    """Settings of a draw. All are traced: a changed value never recompiles."""

    temperature: Float[Array, ""] | float
    """Divisor of the logits; 0 = greedy."""
    top_p: Float[Array, ""] | float
    """Share of the probability from which tokens are drawn, see `draw_tokens`; 1 = all."""
    top_k: Int[Array, ""] | int
    """Number of tokens from which one is drawn; 0 = all."""
    stop_ids: Int[Array, "k"]
    """Ids of the tokens that end a row; padded with -1."""
    max_new_tokens: Int[Array, ""] | int
    """Largest number of tokens of a completion, at most the T of the sampler."""

    @staticmethod
    def of(
        config: RolloutConfig, stop_ids: Sequence[int] | Int[np.ndarray, "k"], temperature: float | None = None
    ) -> SamplingParams:
        """A config's settings as arrays of fixed types; greedy decoding (temperature 0) truncates nothing.

        Args:
          temperature: a value that replaces the config's; None = the config's.
        """
        t = config.temperature if temperature is None else temperature
        values = (
            np.float32(t),
            np.float32(config.top_p if t else 1.0),
            np.int32(config.top_k if t else 0),
            np.asarray(stop_ids, np.int32),
            np.int32(config.max_new_tokens),
        )
        return SamplingParams(*jax.device_put(values))


class RolloutShape(NamedTuple):
    """Static settings of a sampler."""

    group_size: int
    """Completions of a prompt, G."""
    max_new_tokens: int
    """Tokens for which a completion has room, T."""
    pad_id: int
    """Token id behind the end of a completion."""


class Samples(NamedTuple):
    """Completions of all rows; the leading dimensions are [B, G] or, in slots, [n, rows of a shard]."""

    tokens: Int[Array, "*rows T"]
    """Token ids; the pad id behind a completion's end."""
    log_probs: Float[Array, "*rows T"]
    """Log-prob of each token under the model at the temperature of the draw."""
    sampling_log_probs: Float[Array, "*rows T"]
    """Log-prob of each token under the distribution it was drawn from, top-k and top-p included."""
    lengths: Int[Array, "*rows"]
    """Tokens of each completion, the stop token included."""
    ended: Bool[Array, "*rows"]
    """Whether a stop token ended the row."""
    steps: Int[Array, "J"]
    """Decoding steps of each stage or of each size of the cache; a step computes one token of every row or slot."""


class DrawnTokens(NamedTuple):
    """One token for each row or slot."""

    token: Int[Array, "*rows"]
    log_prob: Float[Array, "*rows"]
    sampling_log_prob: Float[Array, "*rows"]


def images_of(model: Model, prompts: Prompts) -> tuple[()] | tuple[Images]:
    """The last arguments of `Model.decoder` and `Model.slots`: the prompts' images, if they have any.

    Raises:
      ValueError: the prompts have images, and the model reads text alone.
    """
    if prompts.images is None:
        return ()
    if model.encode_images is None:
        raise ValueError("the prompts have images, and this model has no `encode_images`; choose one that reads them")
    return (prompts.images,)


def no_samples(rows: tuple[int, ...], max_new_tokens: int, pad_id: int) -> Samples:
    """Samples before the first token."""
    zeros = jnp.zeros((*rows, max_new_tokens))
    return Samples(
        tokens=jnp.full(zeros.shape, pad_id, jnp.int32),
        log_probs=zeros,
        sampling_log_probs=zeros,
        lengths=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        steps=jnp.zeros(0, jnp.int32),
    )


def draw_row_tokens(
    logits: Float[Array, "n m V"], row_keys: Key[Array, "n m"], t: Int[Array, "..."], settings: SamplingParams
) -> DrawnTokens:
    """Token t of each row, by the row's own key: it does not depend on the other rows.

    Args:
      t: position in the completion, a scalar or [n, m].
    """

    def uniform_number(key: Key[Array, ""], t: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(key, t))

    axes = (0, 0 if t.ndim else None)
    uniform = jax.vmap(jax.vmap(uniform_number, axes), axes)(row_keys, t)
    return DrawnTokens(*draw_tokens(logits, uniform, settings.temperature, settings.top_k, settings.top_p))


def is_stop(token: Int[Array, "*rows"], stop_ids: Int[Array, "k"]) -> Bool[Array, "*rows"]:
    """Whether a token ends its row."""
    return (token[..., None] == stop_ids).any(axis=-1)
