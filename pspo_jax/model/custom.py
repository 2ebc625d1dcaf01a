"""A user's own model as a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pspo_jax.model.interface import Model, mask_logits


def from_logits(
    apply: Callable[[Any, Int[Array, "R S"]], Float[Array, "R S V"]],
    init: Callable[..., Any],
    vocab_size: int,
    forbidden: Sequence[int] = (),
) -> Model:
    """A policy from any causal `apply(params, tokens) -> logits`: Flax NNX or Linen, Equinox, plain functions.

    Sampling calls `apply` on the whole row once per token, as there is no cache: right for small models and for
    trying an idea, slow for large ones, which should implement `Policy.decoder` with a cache. Logits of one microbatch
    exist whole here, since `apply` returns them whole.

    Args:
      apply: causal: logits at position s depend on tokens up to s alone. Rows are padded on the right.
      init: `init(key) -> params`.
      forbidden: ids that are never drawn, such as the pad id.
    """

    def decoder(
        params: Any,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        group_size: int,
        max_new_tokens: int,
    ) -> tuple[Float[Array, "B V"], Int[Array, "B G S"], Callable[..., Any]]:
        b, p = prompts.shape
        logits = apply(params, prompts)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        rows = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
        cache = jnp.repeat(rows[:, None], group_size, axis=1)

        def step(
            cache: Int[Array, "B G S"], tokens: Int[Array, "B G"], t: Int[Array, ""]
        ) -> tuple[Float[Array, "B G V"], Int[Array, "B G S"]]:
            place = (lengths + t)[:, None, None]
            here = jnp.arange(p + max_new_tokens) == place
            cache = jnp.where(here, tokens[..., None], cache)
            logits = apply(params, cache.reshape(b * group_size, -1))
            at = jnp.broadcast_to(place, (b, group_size, 1)).reshape(-1, 1, 1)
            here_logits = jnp.take_along_axis(logits, at, axis=1).reshape(b, group_size, -1)
            return mask_logits(here_logits, forbidden), cache

        return mask_logits(last, forbidden), cache, step

    return Model(
        init=init,
        hidden=apply,
        logits=lambda params, hidden: mask_logits(hidden, forbidden),
        decoder=decoder,
        axes=None,
        vocab_size=vocab_size,
    )


def from_nnx(model: Any, forbidden: Sequence[int] = (), vocab_size: int | None = None) -> tuple[Model, Any]:
    """`(policy, params)` from a Flax NNX module whose `model(tokens [R, S])` returns logits [R, S, V].

    The module is split once; the parameters are then a plain pytree, and no NNX dispatch happens in the loop.
    """
    from flax import nnx

    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts

    def apply(params: Any, tokens: Int[Array, "R S"]) -> Float[Array, "R S V"]:
        return nnx.merge(graph, params, rest)(tokens)

    if vocab_size is None:
        vocab_size = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32)).shape[-1]
    return from_logits(apply, lambda key: params, vocab_size, forbidden), params
