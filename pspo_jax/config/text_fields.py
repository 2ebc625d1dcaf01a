"""Fields whose text is a small language of its own: reward terms, shares, weights, pairs of numbers, stop tokens."""

from __future__ import annotations

import json
from typing import Any

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import RewardConfig

TEXT_TERMS = ("format", "tag_count", "repetition", "reasoning_steps")
"""Functions of the completion's text."""
LENGTH_TERMS = ("cosine", "length", "overlong")
"""Functions of the verdict and the completion's length."""
TERMS = ("accuracy", *TEXT_TERMS, *LENGTH_TERMS)
_MAX_WEIGHT = 1e6


def parse_terms(config: RewardConfig) -> dict[str, float]:
    """Name -> weight of reward.terms: "format=1, cosine=2"; a weight that is left out is 1."""
    out: dict[str, float] = {}
    for item in config.terms.split(","):
        name, _, weight = (part.strip() for part in item.partition("="))
        if name not in TERMS and (":" not in name or name.startswith(":") or name.endswith(":")):
            raise ConfigError(
                f"reward.terms={config.terms!r}: no reward {name!r}; choose among {', '.join(TERMS)}, module:function"
            )
        if name in out:
            raise ConfigError(f"reward.terms={config.terms!r}: {name} stands there twice")
        try:
            out[name] = float(weight or 1)
        except ValueError as error:
            raise ConfigError(f"reward.terms={config.terms!r}: {weight!r} is no weight; write name=number") from error
        if not abs(out[name]) <= _MAX_WEIGHT:  # larger ones would leave the range of float32 where they are summed
            raise ConfigError(f"reward.terms={config.terms!r}: {weight!r} is no weight; choose one from -1e6 to 1e6")
    interval(config.cosine_right, "reward.cosine_right")
    interval(config.cosine_wrong, "reward.cosine_wrong")
    return out


def interval(text: str, field: str) -> tuple[float, float]:
    """Two numbers, separated by a comma."""
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{field}={text!r}: must be two numbers, such as 0.5,1.0") from error
    return low, high


def parse_weights(text: str) -> tuple[float, float, float]:
    """Weights of easy, normal and hard prompts.

    Raises:
      ConfigError: not three numbers, of at least 0 and not all 0.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v < 1e6 for v in values) or not sum(values):
        raise ConfigError(
            f"selection.pool_weights={text!r}: must be three numbers from 0, for easy, normal and hard, not all 0"
        )
    return values[0], values[1], values[2]


def parse_quotas(quotas: str) -> dict[str, float]:
    """Task -> share.

    Raises:
      ConfigError: it cannot be read as "task=share, ...", with shares above 0 that sum to at most 1.
    """
    named: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in quotas.split(","))):
        name, equals, text = (x.strip() for x in part.partition("="))
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not (name and equals and 0 < value <= 1) or name in named:
            raise ConfigError(
                f"selection.quotas={quotas!r}: {part!r} is no task=share with a share in (0, 1], each task once, "
                'such as "math=0.5, gsm8k=0.5"'
            )
        named[name] = value
    if sum(named.values()) > 1 + 1e-9:
        raise ConfigError(f"selection.quotas={quotas!r}: sums to more than 1; lower a share")
    return named


def gamma_shape(text: str) -> tuple[float, float]:
    """(k, lambda) of "2,3"; raises ValueError for anything else."""
    k, rate = (float(part) for part in text.split(","))
    if not (k >= 0 and rate > 0):
        raise ValueError(f"{text}: k must be at least 0 and lambda greater than 0")
    return k, rate


def stop_texts(stop: str) -> list[str]:
    """The tokens that rollout.stop names.

    Raises:
      ConfigError: it begins like a JSON list and is none of texts, or names nothing between two commas.
    """
    if not stop.strip():
        return []
    texts: Any = [text.strip() for text in stop.split(",")]
    if stop.lstrip().startswith("["):
        try:
            texts = json.loads(stop)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"rollout.stop={stop!r}: is no JSON list ({error}); such as '[\"<|im_end|>\"]'"
            ) from error
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"rollout.stop={stop!r}: must be tokens separated by commas, or a JSON list of them")
    return texts
