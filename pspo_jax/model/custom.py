"""A user's own network as a `Model`: any function from tokens to logits, or a Flax NNX module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.model.interface import Begun, Decoder, ImageTokens, InitFn, Model, Packed, mask_logits

if TYPE_CHECKING:
    from flax import nnx


class ApplyFn(Protocol):
    """A causal network: logits at position s depend on the tokens up to s alone. Rows are padded on the right."""

    def __call__(self, params: PyTree, tokens: Int[Array, "R S"], /) -> Float[Array, "R S V"]: ...


def from_logits(apply: ApplyFn, init: InitFn, vocab_size: int, forbidden: Sequence[int] = ()) -> Model:
    """A model from any causal `apply(params, tokens) -> logits`: Flax NNX or Linen, Equinox, plain functions.

    There is no cache: the sampler calls `apply` on the whole row once per token. This is right for small models and for
    trying an idea; a large model needs a `Model.decoder` with a cache. Logits of a microbatch exist all at once here.

    Args:
      apply: see ApplyFn.
      init: `init(key) -> params`.
      forbidden: ids that are never drawn, such as the pad id.
    """

    def decoder(
        params: PyTree,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        group_size: int,
        max_new_tokens: int,
        images: Images | None = None,
    ) -> Decoder:
        b, p = prompts.shape
        logits = apply(params, prompts)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        rows = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
        cache = jnp.repeat(rows[:, None], group_size, axis=1)

        def step(
            cache: Int[Array, "B G S"], tokens: Int[Array, "B G"], t: Int[Array, "*B"]
        ) -> tuple[Float[Array, "B G V"], Int[Array, "B G S"]]:
            position = (lengths + t)[:, None, None]
            is_next = jnp.arange(p + max_new_tokens) == position
            cache = jnp.where(is_next, tokens[..., None], cache)
            logits = apply(params, cache.reshape(b * group_size, -1))
            index = jnp.broadcast_to(position, (b, group_size, 1)).reshape(-1, 1, 1)
            next_logits = jnp.take_along_axis(logits, index, axis=1).reshape(b, group_size, -1)
            return mask_logits(next_logits, forbidden), cache

        return Decoder(mask_logits(last, forbidden), cache, step)

    def resume(
        params: PyTree, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], begun: Begun, max_new_tokens: int
    ) -> Decoder:
        made = decoder(params, prompts, lengths, begun.tokens.shape[1], max_new_tokens)
        return made._replace(cache=_with_begun(made.cache, lengths, begun))

    def hidden(
        params: PyTree, tokens: Int[Array, "R S"], packed: Packed | None = None, images: ImageTokens | None = None
    ) -> Float[Array, "R S V"]:
        """The logits stand for hidden states; `packed` and `images` are never given, as the model takes neither."""
        return apply(params, tokens)

    return Model(
        init=init,
        hidden=hidden,
        logits=lambda params, hidden: mask_logits(hidden, forbidden),
        decoder=decoder,
        axes=None,
        vocab_size=vocab_size,
        resume=resume,
    )


def _with_begun(cache: Int[Array, "B G S"], lengths: Int[Array, "B"], begun: Begun) -> Int[Array, "B G S"]:
    """The rows of a cache with the tokens of completions that have begun, behind the prompts."""
    b, g, width = begun.tokens.shape
    place = jnp.arange(width)
    # A place beyond the end is out of bounds, and writes to it are dropped.
    place = jnp.where(place < begun.lengths[..., None], lengths[:, None, None] + place, cache.shape[-1])
    rows = jnp.arange(b)[:, None, None], jnp.arange(g)[:, None]
    return cache.at[(*rows, place)].set(begun.tokens, mode="drop")


def from_nnx(module: nnx.Module, forbidden: Sequence[int] = (), vocab_size: int | None = None) -> tuple[Model, PyTree]:
    """`(model, params)` from a Flax NNX module whose `module(tokens [R, S])` returns logits [R, S, V].

    The module is split once; the parameters are then a plain pytree, and no NNX dispatch happens in the loop.

    Args:
      forbidden: ids that are never drawn, such as the pad id.
      vocab_size: V; None = found by tracing the module.
    """
    from flax import nnx

    graph, params, *others = nnx.split(module, nnx.Param, ...)

    def apply(params: PyTree, tokens: Int[Array, "R S"]) -> Float[Array, "R S V"]:
        logits: Float[Array, "R S V"] = nnx.merge(graph, params, *others)(tokens)
        return logits

    if vocab_size is None:
        vocab_size = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32)).shape[-1]
    return from_logits(apply, lambda key: params, vocab_size, forbidden), params
