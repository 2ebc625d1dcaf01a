"""Rewards by name and weight, and their sum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pspo_jax.config.schema import RewardConfig
from pspo_jax.config.text_fields import TERMS, TEXT_TERMS, interval, parse_terms
from pspo_jax.rewards import shaping

RELEASED_LENGTH = 1000


class Shape(NamedTuple):
    """What shaping rewards are computed from."""

    verdicts: Float[np.ndarray, "B G"]
    """The verdict; NaN = none."""
    lengths: Int[np.ndarray, "B G"]
    """Tokens."""
    texts: list[list[str]]
    """Completions, with what the prompt began of them."""
    max_length: int
    """rollout.max_new_tokens."""


def user_functions(config: RewardConfig) -> tuple[str, ...]:
    """User functions among the terms."""
    return tuple(name for name in parse_terms(config) if name not in TERMS)


def shaped(name: str, config: RewardConfig, shape: Shape) -> Float[np.ndarray, "B G"]:
    """A built-in term other than accuracy."""
    if name in TEXT_TERMS:
        call = {
            "format": shaping.format_open_rs if config.format == "open_rs" else shaping.format_open_r1,
            "tag_count": shaping.tag_count,
            "reasoning_steps": shaping.reasoning_steps,
            "repetition": lambda t: shaping.repetition(t, config.repetition_ngram, config.repetition_penalty),
        }[name]
        return np.array([[call(text) for text in row] for row in shape.texts], np.float32)
    if name == "length":
        return shaping.length_kimi(shape.verdicts, shape.lengths)
    if name == "overlong":
        cache = config.overlong_cache or max(1, shape.max_length // 5)
        return shaping.soft_overlong(shape.lengths, shape.max_length, min(cache, shape.max_length))
    released = config.variant == "published_code"
    characters = np.array([[len(text) for text in row] for row in shape.texts])
    return shaping.cosine(
        shape.verdicts,
        characters if released else shape.lengths,
        RELEASED_LENGTH if released else config.cosine_length or shape.max_length,
        interval(config.cosine_right, "reward.cosine_right"),
        interval(config.cosine_wrong, "reward.cosine_wrong"),
        clamp=not released,
    )


def weighted_sum(
    terms: dict[str, Float[np.ndarray, "B G"]],
    weights: dict[str, float],
    verdicts: Float[np.ndarray, "B G"],
    failed: Mapping[str, Bool[np.ndarray, "B G"]] = MappingProxyType({}),
) -> Float[np.ndarray, "B G"]:
    """The reward: NaN where the verifier or a term gave no verdict, or no term has a value; else the terms' sum.

    A function may have no opinion on a completion (None), as in TRL: its term is left out of the sum. A completion
    that could not be verified, or that a term failed on (`failed`: an error, a deadline, a death), is left out whole:
    its other rewards alone would count it as wrong, or spare it a penalty. A term of weight 0 spoils nothing.
    """
    values = np.stack([weights[name] * terms[name] for name in weights])
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    whole = known.any(axis=0) & ~np.isnan(verdicts)
    for name, bad in failed.items():
        if weights.get(name):
            whole &= ~bad
    return np.where(whole, total, np.nan).astype(np.float32)
