"""What a transformer is, as plain numbers: read from a checkpoint's config or from `PolicyConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pspo_jax.config.schema import PROJECTIONS, LoraConfig, ModelConfig, Remat


@dataclass(frozen=True)
class Rotary:
    """One rotary position embedding."""

    frequencies: tuple[float, ...]
    """Radians per position of each of the h/2 pairs; all 0 = positions are not encoded (NoPE)."""
    scale: float = 1.0
    """Multiplies sines and cosines (YaRN's attention factor)."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: x W + (alpha / rank) dropout(x) A B, with A [in, rank] and B [rank, out]."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Names among PROJECTIONS."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

    vocab_size: int
    """Rows of the embedding, V."""
    layers: int
    width: int
    """Residual stream, D."""
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rotaries: tuple[Rotary, ...]
    """The rotary embeddings in use; `layer_rotary` says which layer uses which."""
    layer_rotary: tuple[int, ...]
    """Index into `rotaries` for each layer."""
    windows: tuple[int | None, ...]
    """Tokens that each layer's queries see, themselves included; None = all before."""
    norm_eps: float = 1e-6
    tied: bool = False
    """The embedding is the output head too."""
    biases: tuple[str, ...] = ()
    """Projections with a bias, among PROJECTIONS."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of q and k over each head (Qwen3, Gemma 3) or over all heads together (OLMo 2)."""
    pre_norm: bool = True
    """RMSNorm before attention and before the MLP."""
    post_norm: bool = False
    """RMSNorm on their outputs (OLMo 2; Gemma 3 has both)."""
    norm_offset: float = 0.0
    """Added to every norm's scale (Gemma stores scale - 1)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    """Multiplies embeddings (Gemma: sqrt(D))."""
    query_scale: float | None = None
    """Multiplies q k; None = 1 / sqrt(head_dim)."""
    max_positions: int | None = None
    """Places of a row that the checkpoint was made for (max_position_embeddings); None = not known."""
    forbidden: tuple[int, ...] = ()
    """Ids that are never drawn, such as rows of the embedding that no token of the tokenizer uses."""
    lora: Lora | None = None
    """Adapters; the other weights are frozen then."""
    param_dtype: str = "float32"
    """Type in which weights are held; adapters are float32 always."""
    compute_dtype: str = "float32"
    scan_unroll: int = 2
    remat: Remat = "none"
    attention: str = "xla"
    """What computes attention over whole rows: XLA or one of `kernels.KERNELS`."""
    packed_attention: str = "xla"
    """The same for rows that hold several."""
    split_decode: bool = False
    """Decode with MLPs and vocabulary split along fsdp; see rollout.weights."""

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


def beyond_context(a: Architecture, prompt: int, completion: int) -> str | None:
    """A line on rows that are longer than what the checkpoint was made for; None if none can be.

    Args:
      prompt: tokens of the longest prompt.
      completion: of the longest completion.
    """
    if a.max_positions is None or prompt + completion <= a.max_positions:
        return None
    return (
        f"rollout.max_new_tokens={completion}: a row has up to {prompt:,} + {completion:,} tokens, more than the "
        f"{a.max_positions:,} that model.source was made for (max_position_embeddings), and what comes beyond them is "
        "likely to be noise; lower it, or prompt.max_tokens"
    )


def built_in(config: ModelConfig, vocab_size: int, forbidden: tuple[int, ...] = ()) -> Architecture:
    """The architecture that a config's shape fields describe."""
    c = config
    return Architecture(
        vocab_size=vocab_size,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        mlp_width=c.mlp_width,
        rotaries=(Rotary(plain_frequencies(c.head_dim, c.rope_theta)),),
        layer_rotary=(0,) * c.layers,
        windows=(None,) * c.layers,
        norm_eps=c.norm_eps,
        tied=c.tied,
        biases=("q", "k", "v") if c.qkv_bias else (),
        qk_norm="head" if c.qk_norm else "none",
        forbidden=forbidden,
        param_dtype=c.param_dtype,
        compute_dtype=c.compute_dtype or "float32",
        scan_unroll=c.scan_unroll,
        remat=c.remat or "none",
    )


def plain_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i / h) for pair i, in float32 as every framework computes them."""
    half = head_dim // 2
    exponent = -np.arange(half, dtype=np.float32) / np.float32(half)
    return tuple(float(f) for f in np.power(np.float32(theta), exponent))


def lora_of(config: LoraConfig) -> Lora | None:
    """The adapters a config asks for; None for full fine-tuning.

    Targets have been checked by `config.validate`.
    """
    if not config.rank:
        return None
    targets = tuple(name for name in PROJECTIONS if name in config.target_names())
    return Lora(config.rank, config.alpha, config.dropout, targets)
