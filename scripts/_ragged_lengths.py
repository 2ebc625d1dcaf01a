"""A model whose completions have log-normal lengths, most of whose variance lies between prompts.

It wraps another model: at each position the logit of the end token is set so that a row ends there with the probability
that the log-normal distribution of its prompt has for that length, if the row has come so far. Everything else is the
other model's, so that a token costs what it costs there.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PyTree

    from pspo_jax.model.interface import Decoder, Model, SlotDecoder

SIGMA = 0.8
"""Standard deviation of the logarithm of a length."""
BETWEEN_PROMPTS = 0.8
"""Share of the variance of the logarithm that lies between prompts."""


def log_medians(prompts: int, mean: float, longest: int, longest_first: bool = False) -> Float[np.ndarray, "B"]:
    """Logarithm of the median length of each prompt, so that lengths cut at `longest` have the mean over all rows.

    Args:
      longest_first: whether the prompts are in the order of their lengths, the longest first.
    """
    normal = statistics.NormalDist()
    # Quantiles in an arbitrary order stand for draws, so that few prompts have the distribution of many.
    order = np.random.default_rng(0).permutation(prompts)
    z = np.array([normal.inv_cdf((i + 0.5) / prompts) for i in order])
    between = SIGMA * BETWEEN_PROMPTS**0.5 * (-np.sort(-z) if longest_first else z)
    within = SIGMA * (1 - BETWEEN_PROMPTS) ** 0.5
    noise = within * np.array([normal.inv_cdf((i + 0.5) / 1000) for i in range(1000)])
    low, high = 0.0, np.log(longest) + 5
    for _ in range(50):
        middle = (low + high) / 2
        found = np.minimum(np.exp(middle + between[:, None] + noise), longest).mean()
        low, high = (middle, high) if found < mean else (low, middle)
    return low + between


def with_lengths(model: Model, medians: Float[np.ndarray, "B"], end: int) -> Model:
    """The model with rows that end by token `end` at the lengths of their prompts, and by no other token."""
    import jax
    import jax.numpy as jnp
    from jax.scipy.stats import norm

    within = SIGMA * (1 - BETWEEN_PROMPTS) ** 0.5
    of_prompt = jnp.asarray(medians, jnp.float32)

    def ending(logits: Float[Array, "*n V"], median: Float[Array, "*n"], t: Int[Array, "..."]) -> Float[Array, "*n V"]:
        """Logits of token t of rows whose prompts have these medians."""

        def log_reaches(length: Array) -> Array:
            """Log-probability that a row is longer than this."""
            return norm.logsf((jnp.log(jnp.maximum(length, 1e-9)) - median) / within)

        length = jnp.asarray(t, jnp.float32) + 1
        stays = jnp.minimum(log_reaches(length) - log_reaches(length - 1), -1e-7)  # log-probability of another token
        others = jax.nn.logsumexp(logits.at[..., end].set(-jnp.inf), axis=-1)
        return logits.at[..., end].set(others + jnp.log(-jnp.expm1(stays)) - stays)

    def decoder(*args: PyTree) -> Decoder:
        inner = model.decoder(*args)

        def step(cache: PyTree, tokens: Array, t: Array) -> tuple[Array, PyTree]:
            logits, cache = inner.step(cache, tokens, t)
            return ending(logits, jnp.broadcast_to(of_prompt[:, None], tokens.shape), t + 1), cache

        return inner._replace(logits=ending(inner.logits, of_prompt, jnp.int32(0)), step=step)

    def slots(*args: PyTree) -> SlotDecoder:
        assert model.slots is not None
        inner = model.slots(*args)

        class Slots(NamedTuple):
            cache: PyTree
            median: Array

        def load(held: Slots, slot: Array, prompt: Array, waiting: PyTree, place: Array) -> Slots:
            cache = inner.load(held.cache, slot, prompt, waiting, place)
            return Slots(cache, held.median.at[slot].set(of_prompt[prompt], mode="drop"))

        def step(held: Slots, tokens: Array, t: Array) -> tuple[Array, Slots]:
            logits, cache = inner.step(held.cache, tokens, t)
            return ending(logits, held.median[None], t + 1), Slots(cache, held.median)

        return inner._replace(
            logits=ending(inner.logits, of_prompt, jnp.int32(0)),
            slots=lambda rows, columns: Slots(inner.slots(rows, columns), jnp.zeros(rows)),
            load=load,
            save=lambda waiting, place, held, slot: inner.save(waiting, place, held.cache, slot),
            step=step,
        )

    return model._replace(decoder=decoder, slots=slots)
