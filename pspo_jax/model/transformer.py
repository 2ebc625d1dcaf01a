"""The built-in model: a decoder-only transformer (RMSNorm, rotary positions, grouped-query attention, gated MLP).

The weights decide what a block computes: a bias, a norm or an adapter that is in the table of weights is applied, and
no other switch exists for it (block.py). Training scans over stacked layers; decoding runs them unrolled (decoding.py).

Precision: products run in `compute_dtype` with float32 accumulation. Float32 always: softmax and its scores (sums of
many terms of one sign), norms (a mean of squares), rotary angles (positions beyond 256 have no bfloat16), logits and
log-probs (a ratio of two policies is the exponential of a small difference), gradients that are added up, adapters
(updates of 1e-6 vanish in bfloat16) and all optimizer state (a decay of 0.999 is 1 in bfloat16).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from pspo_jax.arrays.split_params import SplitParams
from pspo_jax.model.architecture import Architecture
from pspo_jax.model.block import forward, logits_of
from pspo_jax.model.decoding import group_decoder, resize, slot_decoder
from pspo_jax.model.interface import Model
from pspo_jax.model.vision import encode_images
from pspo_jax.model.weights import init_weights, merge, trained_and_frozen, weight_axes


def transformer(a: Architecture) -> Model:
    """The model of an architecture. Where some of its weights are frozen, its functions take `SplitParams`."""
    trained, frozen = trained_and_frozen(a)
    dtype = jnp.dtype("float32" if a.lora is not None else a.param_dtype)
    return Model(
        init=lambda key: init_weights(trained, key, dtype),
        hidden=lambda params, tokens, packed=None, images=None: forward(
            a, *_all_weights(params), tokens, packed=packed, images=images
        )[0],
        logits=lambda params, hidden: logits_of(a, _all_weights(params)[0], hidden),
        decoder=lambda params, prompts, lengths, group_size, max_new_tokens, images=None: group_decoder(
            a, _all_weights(params)[0], prompts, lengths, group_size, max_new_tokens, images
        ),
        axes=weight_axes(trained),
        vocab_size=a.vocab_size,
        frozen_axes=None if frozen is None else weight_axes(frozen),
        resize=resize,
        packs=True,
        slots=lambda params, prompts, lengths, shards, images=None: slot_decoder(
            a, _all_weights(params)[0], prompts, lengths, shards, images
        ),
        shares=a.packed_attention == "xla",
        encode_images=None
        if a.vision is None
        else lambda params, images: encode_images(a, _all_weights(params)[0], images),
        trains_encoder="vision" in trained,
    )


def _all_weights(params: PyTree) -> tuple[PyTree, Key[Array, ""] | None]:
    """One tree of all weights, and the key of the adapters' dropout; None = there is no dropout."""
    if not isinstance(params, SplitParams):
        return params, None
    if params.trained is None:
        return params.frozen, None
    return merge(params.frozen, params.trained), params.key
