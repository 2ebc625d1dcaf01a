"""The terms of the reward by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pspo_jax.config.rewards import RewardConfig
from pspo_jax.config.text_fields import TERMS, TEXT_TERMS, interval, parse_terms
from pspo_jax.rewards import shaping

PUBLISHED_CODE_LENGTH = 1000
"""Lmax of the cosine reward in PSPO's published code, in characters."""


FORMATS = {
    "open_r1": shaping.format_open_r1,
    "open_rs": shaping.format_open_rs,
    "geo3k": shaping.format_geo3k,
}
"""The function of each reward.format."""


class ShapingInputs(NamedTuple):
    """Inputs of the shaping terms, for G completions of each of B prompts."""

    verdicts: Float[np.ndarray, "B G"]
    """The verdict; NaN = none."""
    lengths: Int[np.ndarray, "B G"]
    """Tokens."""
    texts: list[list[str]]
    """Completions, each with the beginning that its prompt holds."""
    max_length: int
    """rollout.max_new_tokens."""


def user_functions(config: RewardConfig) -> tuple[str, ...]:
    """The users' functions among the terms, as `module:function`."""
    return tuple(name for name in parse_terms(config) if name not in TERMS)


def shaping_term(name: str, config: RewardConfig, inputs: ShapingInputs) -> Float[np.ndarray, "B G"]:
    """The values [B, G] of a built-in term other than accuracy."""
    if name in TEXT_TERMS:
        call = {
            "format": FORMATS[config.format],
            "tag_count": shaping.tag_count,
            "reasoning_steps": shaping.reasoning_steps,
            "repetition": lambda t: shaping.repetition(t, config.repetition_ngram, config.repetition_penalty),
        }[name]
        return np.array([[call(text) for text in row] for row in inputs.texts], np.float32)
    if name == "geo3k":
        return shaping.geo3k(inputs.verdicts, inputs.texts)
    if name == "length":
        return shaping.length_kimi(inputs.verdicts, inputs.lengths)
    if name == "overlong":
        cache = config.overlong_cache or max(1, inputs.max_length // 5)
        return shaping.soft_overlong(inputs.lengths, inputs.max_length, min(cache, inputs.max_length))
    published_code = config.variant == "published_code"
    characters = np.array([[len(text) for text in row] for row in inputs.texts])
    return shaping.cosine(
        inputs.verdicts,
        characters if published_code else inputs.lengths,
        PUBLISHED_CODE_LENGTH if published_code else config.cosine_length or inputs.max_length,
        interval(config.cosine_right, "reward.cosine_right"),
        interval(config.cosine_wrong, "reward.cosine_wrong"),
        clamp=not published_code,
    )


def weighted_sum(
    terms: dict[str, Float[np.ndarray, "B G"]],
    weights: dict[str, float],
    verdicts: Float[np.ndarray, "B G"],
    failed: Mapping[str, Bool[np.ndarray, "B G"]] = MappingProxyType({}),
) -> Float[np.ndarray, "B G"]:
    """The reward: the weighted sum of the terms, or NaN for none.

    A function may have no opinion on a completion (None), as in TRL; its term is then left out of the sum. A completion
    has no reward at all if it could not be verified, if a term failed on it (an error, a deadline, a death), or if no
    term has a value: the sum of its other terms would count it as wrong, or spare it a penalty. Failures of a term of
    weight 0 are ignored.

    Args:
      terms: values of each term; NaN = none.
      weights: weight of each term.
      verdicts: the verdicts; NaN = none.
      failed: for each term, the completions on which it failed.
    """
    values = np.stack([weights[name] * terms[name] for name in weights])
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    whole = known.any(axis=0) & ~np.isnan(verdicts)
    for name, bad in failed.items():
        if weights.get(name):
            whole &= ~bad
    return np.where(whole, total, np.nan).astype(np.float32)
