"""The description of a transformer as plain numbers, read from a checkpoint's config.json or from `ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pspo_jax.arrays.images import PatchLayout
from pspo_jax.config.schema import PROJECTIONS, LoraConfig, ModelConfig, Remat

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the red, green and blue values of images, in [0, 1], over the data of CLIP."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of these values."""


@dataclass(frozen=True)
class Rotary:
    """One rotary position embedding."""

    frequencies: tuple[float, ...]
    """Radians per position of each of the h/2 pairs of a head; all 0 = positions are not encoded (NoPE)."""
    scale: float = 1.0
    """Factor of sines and cosines (YaRN's attention factor)."""
    axes: tuple[int, ...] = ()
    """Axis of the position by which each pair is rotated, where positions have several (M-RoPE); empty = positions have
    one axis."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: x W + (alpha / rank) dropout(x) A B, with A [in, rank] and B [rank, out]."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Projections with an adapter, among PROJECTIONS."""

    @property
    def scale(self) -> float:
        """Factor of the product with the adapter."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Vision:
    """A vision tower: a bidirectional transformer over patches, whose outputs are merged into embeddings of tokens.

    Patches are embedded by one matrix and rotated by their row and column. Blocks attend to a whole image or within
    windows. At the end, the patches of a unit are merged by an MLP of two matrices with GELU.
    """

    layers: int
    """Number of blocks."""
    width: int
    """Width of the tower's residual stream."""
    heads: int
    mlp_width: int
    whole_image: tuple[int, ...]
    """Blocks, by their index, whose patches attend to the whole image; in the others, they attend within windows."""
    layout: PatchLayout = field(default_factory=PatchLayout)
    """Sizes of units and windows. A tower without windows has a layout too, in which its patches are ordered."""
    patch: int = 14
    """Pixels along each side of a patch."""
    channels: int = 3
    frames: int = 2
    """Frames of a video that one patch covers. A still image is the same in all of them."""
    gated: bool = True
    """Whether the MLP is gated, with SiLU (Qwen2.5-VL); otherwise it has two matrices with a fast GELU (Qwen2-VL)."""
    layer_norm: bool = False
    """Whether norms subtract the mean and have a bias (Qwen2-VL); otherwise they are RMSNorm (Qwen2.5-VL)."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Mean that is subtracted from each channel, whose values are in [0, 1]."""
    std: tuple[float, ...] = CLIP_STD
    """Standard deviation by which each channel is divided."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of a still image."""
        return self.channels * self.patch**2


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

    vocab_size: int
    """Number of rows of the embedding, V."""
    layers: int
    width: int
    """Width of the residual stream, D."""
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rotaries: tuple[Rotary, ...]
    """The rotary embeddings that layers use."""
    layer_rotary: tuple[int, ...]
    """For each layer, the index of its rotary embedding in `rotaries`."""
    windows: tuple[int | None, ...]
    """For each layer, the number of tokens that a query sees, itself included; None = all before it."""
    norm_eps: float = 1e-6
    tied: bool = False
    """Whether the embedding is the output head too."""
    biases: tuple[str, ...] = ()
    """Projections with a bias, among PROJECTIONS."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of q and k over each head (Qwen3, Gemma 3) or over all heads together (OLMo 2)."""
    pre_norm: bool = True
    """Whether an RMSNorm stands before attention and before the MLP."""
    post_norm: bool = False
    """Whether an RMSNorm stands on their outputs (OLMo 2; Gemma 3 has both)."""
    norm_offset: float = 0.0
    """Number added to the scale of every norm (Gemma stores scale - 1)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    """Factor of the embeddings (Gemma: sqrt(D))."""
    query_scale: float | None = None
    """Factor of the products of queries and keys; None = 1 / sqrt(head_dim)."""
    max_positions: int | None = None
    """Length of a row, in tokens, that the checkpoint was made for (max_position_embeddings); None = unknown."""
    forbidden: tuple[int, ...] = ()
    """Ids that are never drawn, such as rows of the embedding that no token of the tokenizer uses."""
    vision: Vision | None = None
    """The vision tower; None = the model reads text alone."""
    freezes_vision: bool = False
    """Whether the tower does not train, although other weights do; under adapters it never trains."""
    lora: Lora | None = None
    """Adapters; with them, all other weights are frozen. None = all weights train."""
    param_dtype: str = "float32"
    """Type in which weights are held; adapters are always float32."""
    compute_dtype: str = "float32"
    """Type of the operands of matrix products."""
    scan_unroll: int = 2
    """Number of layers in one turn of the loop over layers."""
    remat: Remat = "none"
    """Activations that the forward pass keeps for the backward pass; see model.remat."""
    attention: str = "xla"
    """Implementation of attention over whole rows: "xla" or one of `attention.kernels.KERNELS`."""
    packed_attention: str = "xla"
    """The same for bins that hold several rows."""
    decode_attention: str = "xla"
    """Implementation of attention in decoding: "xla" or one of `attention.decode.PART_KERNELS`, which know no
    windows."""
    split_decode: bool = False
    """Whether decoding splits MLPs and vocabulary along fsdp; see rollout.weights."""

    @property
    def split_width(self) -> int:
        """A number that a mesh must divide to split every matrix: the width, or what it shares with the tower's."""
        return self.width if self.vision is None else math.gcd(self.width, self.vision.width)

    def whole(self) -> Architecture:
        """The same architecture with all of its weights in one tree, which trains as a whole."""
        return replace(self, lora=None, freezes_vision=False)

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


def beyond_context(a: Architecture, prompt: int, completion: int) -> str | None:
    """A warning that rows may be longer than the checkpoint was made for; None if no row can be.

    Args:
      prompt: tokens of the longest prompt.
      completion: tokens of the longest completion.
    """
    if a.max_positions is None or prompt + completion <= a.max_positions:
        return None
    return (
        f"rollout.max_new_tokens={completion}: a row has up to {prompt:,} + {completion:,} tokens, more than the "
        f"{a.max_positions:,} that model.source was made for (max_position_embeddings); tokens beyond them are likely "
        "to be noise; lower it, or prompt.max_tokens"
    )


def built_in(
    config: ModelConfig, vocab_size: int, forbidden: tuple[int, ...] = (), vision: Vision | None = None
) -> Architecture:
    """The architecture that the shape fields of a config describe.

    Args:
      vision: its vision tower, which trains; with one, positions have three axes, with sections as in Qwen2.5-VL.
    """
    c = config
    axes = () if vision is None else axes_of(mrope_sections(c.head_dim // 2))
    return Architecture(
        vocab_size=vocab_size,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        mlp_width=c.mlp_width,
        rotaries=(Rotary(plain_frequencies(c.head_dim, c.rope_theta), axes=axes),),
        layer_rotary=(0,) * c.layers,
        windows=(None,) * c.layers,
        norm_eps=c.norm_eps,
        tied=c.tied,
        biases=("q", "k", "v") if c.qkv_bias else (),
        qk_norm="head" if c.qk_norm else "none",
        forbidden=forbidden,
        vision=vision,
        param_dtype=c.param_dtype,
        compute_dtype=c.compute_dtype or "float32",
        scan_unroll=c.scan_unroll,
        remat=c.remat or "none",
    )


def mrope_sections(pairs: int) -> tuple[int, int, int]:
    """Numbers of pairs of a head that time, row and column rotate: 16, 24 and 24 of Qwen2.5-VL's 64."""
    of_side = 3 * pairs // 8
    return pairs - 2 * of_side, of_side, of_side


def axes_of(sections: Sequence[int]) -> tuple[int, ...]:
    """The axis of each pair, for sections of so many pairs."""
    return tuple(axis for axis, n in enumerate(sections) for _ in range(n))


def plain_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i / h) for pair i, in float32 as every framework computes them."""
    half = head_dim // 2
    exponent = -np.arange(half, dtype=np.float32) / np.float32(half)
    return tuple(float(f) for f in np.power(np.float32(theta), exponent))


def lora_of(config: LoraConfig) -> Lora | None:
    """The adapters that a config asks for; None = all weights train. Its targets have been validated before."""
    if not config.rank:
        return None
    targets = tuple(name for name in PROJECTIONS if name in config.target_names())
    return Lora(config.rank, config.alpha, config.dropout, targets)
