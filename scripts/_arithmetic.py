"""The least work of a decoding step and of a training step. It needs only the standard library."""

from __future__ import annotations

from typing import NamedTuple

from _bench import Shape


class Rates(NamedTuple):
    """Measured rates of a machine."""

    flops: float
    """Per second, in products of the compute type."""
    bandwidth: float
    """Bytes read per second."""


def block_weights(s: Shape) -> int:
    """Number of weights in the matrices of all blocks."""
    attention = s.width * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    return s.layers * (attention + 3 * s.width * s.mlp_width)


def head_weights(s: Shape) -> int:
    return s.vocab * s.width


def decode_flops(s: Shape, rows: int, seen: float) -> float:
    """FLOPs of one token for each row, which attends to `seen` tokens."""
    products = 2 * (block_weights(s) + head_weights(s))
    attention = 4 * s.layers * s.heads * s.head_dim * seen
    return rows * (products + attention)


def weight_bytes(s: Shape, width: int) -> float:
    """Bytes of all weights; `width` is the number of bytes of the compute type."""
    return width * (block_weights(s) + head_weights(s))


def cache_bytes(s: Shape, rows: int, prompts: int, prompt_tokens: int, own_tokens: float, width: int) -> float:
    """Bytes of keys and values that one token of each row reads: each prompt's once, and each row's own."""
    return width * 2 * s.layers * s.kv_heads * s.head_dim * (prompts * prompt_tokens + rows * own_tokens)


def decode_floor(
    s: Shape, rows: int, prompts: int, prompt_tokens: int, own_tokens: float, width: int, rates: Rates
) -> float:
    """Least seconds of one token of each row if products and reads overlap perfectly and weights are read once."""
    products = decode_flops(s, rows, prompt_tokens + own_tokens) / rates.flops
    reads = weight_bytes(s, width) + cache_bytes(s, rows, prompts, prompt_tokens, own_tokens, width)
    return max(products, reads / rates.bandwidth)


def train_flops(s: Shape, rows: int, length: int, predicted: int) -> float:
    """FLOPs of the forward and backward pass of rows with `predicted` tokens in the loss, with half of the square of
    attention.

    Recomputation in the backward pass does not count.
    """
    attention = 2 * s.layers * s.heads * s.head_dim * length
    forward = length * (2 * block_weights(s) + attention) + predicted * 2 * head_weights(s)
    return 3 * rows * forward
