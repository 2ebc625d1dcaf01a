"""Parsers of text fields that hold lists: reward terms, quotas, strata, weights, loggers, stop tokens and the like."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from pspo_jax.config.fields import ConfigError, nearest
from pspo_jax.config.rewards import RewardConfig

TEXT_TERMS = ("format", "tag_count", "repetition", "reasoning_steps")
"""Reward terms that depend on the completion's text."""
LENGTH_TERMS = ("cosine", "length", "overlong")
"""Reward terms that depend on the verdict and the completion's length."""
TERMS = ("accuracy", "geo3k", "judge", "reward_model", *TEXT_TERMS, *LENGTH_TERMS)
REMOTE_LOGGERS = ("wandb", "trackio", "mlflow")
"""Loggers that are packages of their own; each has an extra of its name."""
LOGGERS = ("tensorboard", *REMOTE_LOGGERS)
_MAX_WEIGHT = 1e6
_STRATUM = re.compile(r"(\d+(?:\.\d+)?)(?:(\+)|\s*-\s*(\d+(?:\.\d+)?))?")


class Stratum(NamedTuple):
    """Prompts whose difficulty is in low..high, both included, and their share of the training prompts."""

    name: str
    """The stratum as task.strata writes it, such as 0, 1-2 or 3+."""
    low: float
    high: float
    share: float


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
    """A lower bound of the reward, from the least value of each term; None = a user's function or a
    reward model has no known bound."""
    right = interval(config.cosine_right, "reward.cosine_right")
    wrong = interval(config.cosine_wrong, "reward.cosine_wrong")
    ranges = {
        "repetition": (config.repetition_penalty, 0.0),
        "cosine": (min(right + wrong), max(right + wrong)),
        "length": (-0.5, 0.5),
        "overlong": (-1.0, 0.0),
    }
    terms = parse_terms(config)
    if any(name not in TERMS or name == "reward_model" for name in terms):
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


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths of images in pixels, from task.image_widths.

    Raises:
      ConfigError: the text is not a list of different multiples of 8 that are at least 24.
    """
    found = [part.strip() for part in text.split(",")]
    widths = tuple(int(part) for part in found if part.isdecimal())
    if len(widths) != len(found) or len({*widths}) != len(widths) or any(w < 24 or w % 8 for w in widths):
        raise ConfigError(
            f"task.image_widths={text!r}: must be different multiples of 8 from 24 on, separated by commas, such as "
            "24,32"
        )
    return widths


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
    named = _shares("selection.quotas", quotas, "task", "math=0.5, gsm8k=0.5")
    if sum(named.values()) > 1 + 1e-9:
        raise ConfigError(f"selection.quotas={quotas!r}: sums to more than 1; lower a share")
    return named


def parse_strata(strata: str) -> tuple[Stratum, ...]:
    """The strata of task.strata, in their order; () = there are none.

    Raises:
      ConfigError: the text is not "difficulty=share, ..." with shares above 0 that sum to 1, or strata overlap.
    """
    named = _shares("task.strata", strata, "difficulty", "0=0.8, 3+=0.2")
    out: list[Stratum] = []
    for name, share in named.items():
        match = _STRATUM.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"task.strata={strata!r}: {name!r} is no difficulty; write a number (0), a range (1-2) or a least "
                "number (3+)"
            )
        first, open_end, last = match.groups()
        low = float(first)
        stratum = Stratum(name.replace(" ", ""), low, float("inf") if open_end else float(last or first), share)
        if stratum.high < low:
            raise ConfigError(f"task.strata={strata!r}: {name!r} ends before it begins; write {last}-{first}")
        for other in out:
            if low <= other.high and other.low <= stratum.high:
                raise ConfigError(f"task.strata={strata!r}: {other.name} and {name} overlap; change one of them")
        out.append(stratum)
    if out and abs(sum(named.values()) - 1) > 1e-6:
        raise ConfigError(
            f"task.strata={strata!r}: the shares sum to {sum(named.values()):g}; change them so that they sum to 1"
        )
    return tuple(out)


def _shares(field: str, text: str, what: str, example: str) -> dict[str, float]:
    """Name -> share, from "name=share, ...", whose names stand for a `what`.

    Raises:
      ConfigError: a part has another form, a share is not in (0, 1], or a name comes twice.
    """
    named: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, number = (x.strip() for x in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not (name and equals and 0 < value <= 1) or name in named:
            raise ConfigError(
                f"{field}={text!r}: {part!r} is not {what}=share with a share in (0, 1], each {what} once, such as "
                f'"{example}"'
            )
        named[name] = value
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


def parse_loggers(text: str) -> tuple[str, ...]:
    """Names of the loggers of log.to, such as "tensorboard,wandb"; none = ().

    Raises:
      ConfigError: a name is unknown, empty or repeated.
    """
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    for i, name in enumerate(names):
        if name not in LOGGERS:
            raise ConfigError(
                f"log.to={text!r}: {name!r} is no logger; choose among {', '.join(LOGGERS)}, separated by commas, or "
                f"none{nearest(name, LOGGERS)}"
            )
        if name in names[:i]:
            raise ConfigError(f"log.to={text!r}: {name} appears twice; drop one")
    return names


def parse_profile(text: str) -> tuple[int, int]:
    """The first and the last step of run.profile, such as (10, 12) of "10:12"; of "10" alone, that step.

    Raises:
      ConfigError: it is no pair of steps in order, from 1 on.
    """
    found = re.fullmatch(r"(\d{1,10})(?::(\d{1,10}))?", text.strip(), re.ASCII)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"run.profile={text!r}: must be steps from 1 on in order, such as 10:12 or 10")
    return first, last
