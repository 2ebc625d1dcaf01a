"""What a decoding step and a training step have to compute and to read at least; standard library alone."""

from __future__ import annotations

from typing import NamedTuple

from _bench import Shape


class Rates(NamedTuple):
    """What a machine was measured to do."""

    flops: float
    """Per second, in products of the compute type."""
    bandwidth: float
    """Bytes read per second."""


def block_weights(s: Shape) -> int:
    """Numbers in the matrices of all blocks."""
    attention = s.width * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    return s.layers * (attention + 3 * s.width * s.mlp_width)


def head_weights(s: Shape) -> int:
    return s.vocab * s.width


def decode_flops(s: Shape, rows: int, seen: float) -> float:
    """Of one token for each row, which attends to `seen` tokens."""
    products = 2 * (block_weights(s) + head_weights(s))
    attention = 4 * s.layers * s.heads * s.head_dim * seen
    return rows * (products + attention)


def weight_bytes(s: Shape, width: int) -> float:
    """Of all weights; `width` = bytes of the compute type."""
    return width * (block_weights(s) + head_weights(s))


def cache_bytes(s: Shape, rows: int, prompts: int, prompt_tokens: int, own_tokens: float, width: int) -> float:
    """Keys and values that a token of each row reads: each prompt's once, and each row's own."""
    return width * 2 * s.layers * s.kv_heads * s.head_dim * (prompts * prompt_tokens + rows * own_tokens)


def decode_floor(
    s: Shape, rows: int, prompts: int, prompt_tokens: int, own_tokens: float, width: int, rates: Rates
) -> float:
    """Least seconds of a token of each row, weights read once, if products and reads overlap perfectly."""
    products = decode_flops(s, rows, prompt_tokens + own_tokens) / rates.flops
    reads = weight_bytes(s, width) + cache_bytes(s, rows, prompts, prompt_tokens, own_tokens, width)
    return max(products, reads / rates.bandwidth)


def train_flops(s: Shape, rows: int, length: int, predicted: int) -> float:
    """Forward and backward pass of rows with `predicted` tokens in the loss, attention at half of its square.

    What is computed again in the backward pass does not count.
    """
    attention = 2 * s.layers * s.heads * s.head_dim * length
    forward = length * (2 * block_weights(s) + attention) + predicted * 2 * head_weights(s)
    return 3 * rows * forward
