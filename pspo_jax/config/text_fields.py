"""Parsers of text fields that hold lists: reward terms, quotas, weights, pairs of numbers, stop tokens."""

from __future__ import annotations

import json

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import RewardConfig

TEXT_TERMS = ("format", "tag_count", "repetition", "reasoning_steps")
"""Reward terms that depend on the completion's text."""
LENGTH_TERMS = ("cosine", "length", "overlong")
"""Reward terms that depend on the verdict and the completion's length."""
TERMS = ("accuracy", *TEXT_TERMS, *LENGTH_TERMS)
_MAX_WEIGHT = 1e6


def parse_terms(config: RewardConfig) -> dict[str, float]:
    """Term -> weight, from reward.terms such as "format=1, cosine=2"; a term without a weight has weight 1.

    Raises:
      ConfigError: a term is unknown or repeated, or a weight is not a number from -1e6 to 1e6.
    """
    out: dict[str, float] = {}
    for item in config.terms.split(","):
        name, _, weight = (part.strip() for part in item.partition("="))
        if name not in TERMS and (":" not in name or name.startswith(":") or name.endswith(":")):
            raise ConfigError(
                f"reward.terms={config.terms!r}: {name!r} is not a reward term; choose among {', '.join(TERMS)}, "
                "module:function"
            )
        if name in out:
            raise ConfigError(f"reward.terms={config.terms!r}: {name} appears twice; drop one")
        try:
            out[name] = float(weight or 1)
        except ValueError as error:
            raise ConfigError(
                f"reward.terms={config.terms!r}: {weight!r} is not a number; write term=weight"
            ) from error
        if not abs(out[name]) <= _MAX_WEIGHT:  # the sum of larger ones could overflow float32
            raise ConfigError(
                f"reward.terms={config.terms!r}: the weight {weight!r} is out of range; choose one from -1e6 to 1e6"
            )
    interval(config.cosine_right, "reward.cosine_right")
    interval(config.cosine_wrong, "reward.cosine_wrong")
    return out


def least_reward(config: RewardConfig) -> float | None:
    """A lower bound of the reward, from the least value of each term; None = a user's function has no known bound."""
    right = interval(config.cosine_right, "reward.cosine_right")
    wrong = interval(config.cosine_wrong, "reward.cosine_wrong")
    ranges = {
        "repetition": (config.repetition_penalty, 0.0),
        "cosine": (min(right + wrong), max(right + wrong)),
        "length": (-0.5, 0.5),
        "overlong": (-1.0, 0.0),
    }
    terms = parse_terms(config)
    if any(name not in TERMS for name in terms):
        return None
    least = 0.0
    for name, weight in terms.items():
        low, high = ranges.get(name, (0.0, 1.0))
        least += min(weight * low, weight * high)
    return least


def interval(text: str, field: str) -> tuple[float, float]:
    """The two numbers of "low,high".

    Raises:
      ConfigError: the text is not two numbers separated by a comma.
    """
    try:
        low, high = (float(x) for x in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{field}={text!r}: must be two numbers, such as 0.5,1.0") from error
    return low, high


def parse_weights(text: str) -> tuple[float, float, float]:
    """Weights of easy, normal and hard prompts, from selection.pool_weights.

    Raises:
      ConfigError: the text is not three numbers that are at least 0 and not all 0.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v < 1e6 for v in values) or not sum(values):
        raise ConfigError(
            f"selection.pool_weights={text!r}: must be three numbers of at least 0, for easy, normal and hard prompts, "
            "and not all 0"
        )
    return values[0], values[1], values[2]


def parse_quotas(quotas: str) -> dict[str, float]:
    """Task -> share of the prompts, from selection.quotas.

    Raises:
      ConfigError: the text is not "task=share, ..." with shares above 0 that sum to at most 1.
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
                f"selection.quotas={quotas!r}: {part!r} is not task=share with a share in (0, 1], each task once, "
                'such as "math=0.5, gsm8k=0.5"'
            )
        named[name] = value
    if sum(named.values()) > 1 + 1e-9:
        raise ConfigError(f"selection.quotas={quotas!r}: sums to more than 1; lower a share")
    return named


def gamma_shape(text: str) -> tuple[float, float]:
    """(k, lambda) from a text such as "2,3".

    Raises:
      ValueError: the text is not two numbers, or one of them is out of range.
    """
    k, rate = (float(part) for part in text.split(","))
    if not (k >= 0 and rate > 0):
        raise ValueError(f"{text}: k must be at least 0 and lambda greater than 0")
    return k, rate


def stop_texts(stop: str) -> list[str]:
    """The tokens in rollout.stop.

    Raises:
      ConfigError: the text begins like a JSON list but is not a list of texts, or has an empty entry.
    """
    if not stop.strip():
        return []
    texts: object = [text.strip() for text in stop.split(",")]
    if stop.lstrip().startswith("["):
        try:
            texts = json.loads(stop)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"rollout.stop={stop!r}: is not a JSON list ({error}); write one such as '[\"<|im_end|>\"]'"
            ) from error
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"rollout.stop={stop!r}: must be tokens separated by commas, or a JSON list of them")
    return texts
