"""Group rollouts inside one jit: prefill, then a token loop that ends when every row has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.state import Params, Prompts, Rollouts
from pspo_jax.config.schema import RolloutConfig
from pspo_jax.distributed.mesh import constrain
from pspo_jax.model.interface import Model
from pspo_jax.rollout.continuous import Samples, decode_slots
from pspo_jax.rollout.token_sampling import draw_tokens

SMALLEST_CACHE_TOKENS = 128
"""Tokens that a cache has room for at least, if completions may be so long."""


class SamplingParams(NamedTuple):
    """Settings of a draw. All are traced: changing a value never recompiles."""

    temperature: Float[Array, ""] | float
    """0 = greedy."""
    top_p: Float[Array, ""] | float
    top_k: Int[Array, ""] | int
    stop_ids: Int[Array, "k"]
    """Token ids that end a row; pad with -1."""
    max_new_tokens: Int[Array, ""] | int
    """Length limit, at most the sampler's T."""

    @staticmethod
    def of(config: RolloutConfig, stop_ids: Any, temperature: float | None = None) -> SamplingParams:
        """A config's settings, as arrays of fixed types; greedy decoding (temperature=0) keeps no truncation."""
        t = config.temperature if temperature is None else temperature
        build: Any = SamplingParams
        values = build(
            np.float32(t),
            np.float32(config.top_p if t else 1.0),
            np.int32(config.top_k if t else 0),
            np.asarray(stop_ids, np.int32),
            np.int32(config.max_new_tokens),
        )
        return jax.device_put(values)


class _Loop(NamedTuple):
    t: Int[Array, ""]
    """Position of `last` in the completion."""
    last: Int[Array, "B G"]
    cache: Any
    alive: Bool[Array, "B G"]
    """Rows that draw another token."""
    tokens: Int[Array, "B G T"]
    log_probs: Float[Array, "B G T"]
    sampling_log_probs: Float[Array, "B G T"]
    lengths: Int[Array, "B G"]


def make_sampler(
    model: Model, group_size: int, max_new_tokens: int, pad_id: int, slots: int | None = None, chunk: int = 1
) -> Callable[..., Rollouts]:
    """A jitted `sample(params, prompts, key, settings, first_row=0) -> Rollouts`.

    It compiles once per (B, P): prompt lengths inside the padding, temperature, top-p, top-k, stop ids and the length
    limit are traced. Row g of prompt b draws its t-th token with key fold_in(fold_in(key, first_row + b G + g), t): its
    tokens do not depend on the other rows, on how rows are spread over devices, or on how a batch is cut into calls.
    Stop tokens are returned and are in the mask.

    Args:
      slots: rows that are decoded at a time, the next row in a slot when one has ended (see `slots`); None = all.
      chunk: tokens drawn before the next test whether all rows have ended; see `tokens_per_test`.
    """
    sample = counting_sampler(model, group_size, max_new_tokens, pad_id, slots, chunk)
    return jax.jit(lambda *args, **named: sample(*args, **named)[0])


def counting_sampler(
    model: Model, group_size: int, max_new_tokens: int, pad_id: int, slots: int | None = None, chunk: int = 1
) -> Callable[..., tuple[Rollouts, Int[Array, ""]]]:
    """`make_sampler`, not jitted, with the number of tokens computed, those of rows that had ended included."""

    def sample(
        params: Params,
        prompts: Prompts,
        key: Key[Array, ""],
        settings: SamplingParams,
        first_row: Int[Array, ""] | int = 0,
    ) -> tuple[Rollouts, Int[Array, ""]]:
        b = prompts.tokens.shape[0]
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(b * group_size))
        if slots is not None and slots < b * group_size:
            drawn = decode_slots(model, params, prompts, row_keys, settings, slots, group_size, max_new_tokens, pad_id)
            drawn = jax.tree.map(lambda x: x.reshape(b, group_size, *x.shape[1:]) if x.ndim else x, drawn)
            return _rollouts(prompts, drawn, settings), b * group_size + drawn.steps * slots
        logits, cache, step = model.decoder(params, prompts.tokens, prompts.lengths, group_size, max_new_tokens)
        limit = jnp.minimum(settings.max_new_tokens, max_new_tokens)

        def draw(loop: _Loop, logits: Array, t: Array) -> _Loop:
            """Append token t to every live row."""
            uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(row_keys)
            token, log_prob, sampling = draw_tokens(
                logits, uniform.reshape(b, group_size), settings.temperature, settings.top_k, settings.top_p
            )
            live = loop.alive & (t < limit)
            token = jnp.where(live, token, pad_id)
            return _Loop(
                t,
                token,
                loop.cache,
                loop.alive & ~(live & (token[..., None] == settings.stop_ids).any(axis=-1)),
                _put(loop.tokens, token, t),
                _put(loop.log_probs, jnp.where(live, log_prob, 0), t),
                _put(loop.sampling_log_probs, jnp.where(live, sampling, 0), t),
                loop.lengths + live,
            )

        def one(_: Array | int, loop: _Loop) -> _Loop:
            logits, cache = step(loop.cache, loop.last, loop.t)
            return draw(loop._replace(cache=cache), constrain(logits, "batch", None, None), loop.t + 1)

        def body(loop: _Loop) -> _Loop:
            return one(0, loop) if chunk == 1 else jax.lax.fori_loop(0, chunk, one, loop)

        # The last chunk may reach past the longest completion.
        shape = (b, group_size, 1 + -(-(max_new_tokens - 1) // chunk) * chunk)
        start = _Loop(
            jnp.int32(0),
            jnp.full(shape[:2], pad_id, jnp.int32),
            cache,
            jnp.ones(shape[:2], bool),
            jnp.full(shape, pad_id, jnp.int32),
            jnp.zeros(shape),
            jnp.zeros(shape),
            jnp.zeros(shape[:2], jnp.int32),
        )
        logits = jnp.broadcast_to(logits[:, None], (b, group_size, logits.shape[-1]))
        end = draw(start, logits, jnp.int32(0))
        for size in sizes(max_new_tokens, chunk) if model.resize else [max_new_tokens]:
            if model.resize:
                end = end._replace(cache=model.resize(end.cache, size))

            def goes_on(loop: _Loop, size: int = size) -> Bool[Array, ""]:
                """The last token drawn is not in the cache."""
                return (loop.t + 1 < jnp.minimum(limit, size + 1)) & loop.alive.any()

            end = jax.lax.while_loop(goes_on, body, end)
        tokens, log_probs, sampling = (
            x[..., :max_new_tokens] for x in (end.tokens, end.log_probs, end.sampling_log_probs)
        )
        drawn = Samples(tokens, log_probs, sampling, end.lengths, ~end.alive, end.t)
        return _rollouts(prompts, drawn, settings), b * group_size * (1 + drawn.steps)

    return sample


def sizes(max_new_tokens: int, chunk: int = 1) -> list[int]:
    """Tokens that a cache has room for, one size after the other: a token pays for what is drawn, not for what may be.

    Each size is a loop of its own and compiles anew, so there are few. All but the last are whole chunks.
    """
    parts = (max_new_tokens // part // chunk * chunk for part in (4, 2))
    return [part for part in parts if part >= SMALLEST_CACHE_TOKENS] + [max_new_tokens]


def tokens_per_test(platform: str, max_new_tokens: int) -> int:
    """The sampler's `chunk` for a platform.

    A GPU's loop waits for the host at every test but not where the number of turns is known; elsewhere a test is free,
    and a chunk would only draw for rows that have ended.
    """
    return max(1, min(32, max_new_tokens // 16)) if platform == "gpu" else 1


def _rollouts(prompts: Prompts, drawn: Samples, settings: SamplingParams) -> Rollouts:
    temperature = jnp.asarray(settings.temperature, jnp.float32)
    return Rollouts(
        prompts=prompts,
        tokens=drawn.tokens,
        mask=jnp.arange(drawn.tokens.shape[-1]) < drawn.lengths[..., None],
        log_probs=drawn.log_probs,
        sampling_log_probs=drawn.sampling_log_probs,
        lengths=drawn.lengths,
        ended=drawn.ended,
        temperature=jnp.where(temperature == 0, 1.0, temperature),
    )


def _put(array: Array, column: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, column[..., None].astype(array.dtype), t, axis=2)
