"""Shaping terms: the parts of a reward beside the verdict on the answer. Plain Python and NumPy, on the host.

A text term maps one completion to a float, in time linear in its characters: a model learns to write whatever raises
its reward, and a regular expression that backtracks would let one odd completion hold up a whole step. An array term
maps [B, G] (B prompts, G completions of each) to [B, G] float32. A length is in whatever unit the caller counts, tokens
or characters; a limit is in the same unit. In `verdicts`, 1 = right, anything less = wrong, NaN = no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float, Int

from pspo_jax.verifiers.boxed import BOX

_THINK = "<think>\n"
_THINK_END = "\n</think>\n"
_ANSWER = "\n<answer>\n"
_ANSWER_END = "\n</answer>"
_STEP = re.compile(r"Step \d+:|\A\d+\.|\n[-*]|First,|Second,|Next,|Finally,")
_STEPS_FOR_ALL = 3


def format_open_r1(text: str) -> float:
    r"""1.0 if the text is `<think>\n..\n</think>\n<answer>\n..\n</answer>`, else 0.0 (open-r1's `format_reward`).

    As published, which is laxer than it looks: the pattern's `$` is in multi-line mode, so anything may follow a line
    that ends with `</answer>`, and its dots match tags too, so a tag may occur again inside a part. Nothing may come
    before `<think>`. `tag_count` is the term that sees repeated tags.
    """
    if not text.startswith(_THINK):
        return 0.0
    # The first border between the parts leaves the most room for the end, so no other one need be tried.
    border = _THINK_END + _ANSWER.removeprefix("\n")
    at = text.find(border, len(_THINK))
    if at < 0:
        return 0.0
    at += len(border)
    return float(text.endswith(_ANSWER_END, at) or text.find(_ANSWER_END + "\n", at) >= 0)


def format_open_rs(text: str) -> float:
    r"""1.0 if the text holds exactly one `\n</think>\n`, else 0.0 (open-rs's `format_reward`, PSPO's released form).

    The opening tag is in the prompt there. As published, occurrences do not overlap.
    """
    return float(text.count(_THINK_END) == 1)


def format_geo3k(text: str) -> float:
    r"""1.0 if the text is `<think>..</think>..\boxed{..}..`, else 0.0 (verl's `format_reward` for Geometry3k).

    As published, dots match anything, tags and newlines too; nothing may come before `<think>`.
    """
    if not text.startswith("<think>"):
        return 0.0
    # The first place of each part leaves the most room for the next, so no other one need be tried.
    place = len("<think>")
    for part in ("</think>", BOX, "}"):
        found = text.find(part, place)
        if found < 0:
            return 0.0
        place = found + len(part)
    return 1.0


def tag_count(text: str) -> float:
    r"""A quarter for each of the four tags that occurs exactly once (open-r1's `tag_count_reward`).

    `<think>\n`, `\n</think>\n`, `\n<answer>\n` and `\n</answer>`, each with its newlines. As published, occurrences do
    not overlap.
    """
    return sum(text.count(tag) == 1 for tag in (_THINK, _THINK_END, _ANSWER, _ANSWER_END)) / 4


def reasoning_steps(text: str) -> float:
    r"""min(1, signs / 3), for the signs of step-by-step reasoning (open-r1's `reasoning_steps_reward`).

    `Step 3:`, a line that begins with `-` or `*` (not the first line), `First,`, `Second,`, `Next,`, `Finally,`, and a
    number with a dot, `3.`, at the very beginning of the text: as published, its `^` is not in multi-line mode.
    """
    signs = sum(1 for _ in islice(_STEP.finditer(text), _STEPS_FOR_ALL))
    return signs / _STEPS_FOR_ALL


def repetition(text: str, ngram: int = 3, max_penalty: float = -1.0) -> float:
    """(1 - distinct / all n-grams) * max_penalty (open-r1's `get_repetition_penalty_reward`, after arXiv:2502.03373).

    Over lower-cased words, split at white space. 0.0 for a text of fewer words than `ngram`.
    """
    if ngram < 1:
        raise ValueError(f"ngram is {ngram}; it must be at least 1")
    words = text.lower().split()
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    distinct = len(set(zip(*(words[i:] for i in range(ngram)), strict=False)))
    return (1 - distinct / total) * max_penalty + 0.0  # + 0.0: no negative zero


def geo3k(
    verdicts: Float[np.ndarray, "B G"], texts: Sequence[Sequence[str]], format_reward: float = 0.1
) -> Float[np.ndarray, "B G"]:
    """1 for a right completion, whatever its format, else `format_reward` x `format_geo3k` (MoPPS on Geometry3k).

    Args:
      texts: the completions of each group.
    """
    formats = np.array([[format_geo3k(text) for text in row] for row in texts]).reshape(verdicts.shape)
    return _with_verdict(verdicts, np.where(_is_correct(verdicts), 1.0, format_reward * formats))


def cosine(
    verdicts: Float[np.ndarray, "B G"],
    length: Int[np.ndarray, "B G"],
    max_length: int,
    right_range: tuple[float, float] = (0.5, 1.0),
    wrong_range: tuple[float, float] = (-0.5, 0.0),
    clamp: bool = True,
) -> Float[np.ndarray, "B G"]:
    """Cosine reward over length (arXiv:2502.03373, without its penalty for exceeding the limit).

        low + (high - low) / 2 * (1 + cos(pi * min(length / max_length, 1)))

    A range is (low, high): the value at `max_length` and the value at length 0. Given the other way round, longer is
    better; open-r1's `min_value_wrong, max_value_wrong` are, in this order, the high and the low of `wrong_range`.

    `clamp=False` leaves length / max_length uncapped, so that beyond `max_length` the reward turns back and oscillates.
    The released code of open-r1 and PSPO does that, with characters and a maximum of 1000.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    share = np.asarray(length, np.float64) / max_length
    if clamp:
        share = np.minimum(share, 1.0)
    is_right = _is_correct(verdicts)
    low, high = (np.where(is_right, a, b) for a, b in zip(right_range, wrong_range, strict=True))
    value = low + (high - low) / 2 * (1 + np.cos(np.pi * share))
    return _with_verdict(verdicts, value)


def length_kimi(verdicts: Float[np.ndarray, "B G"], length: Int[np.ndarray, "B G"]) -> Float[np.ndarray, "B G"]:
    """Length reward of Kimi k1.5 (arXiv:2501.12599, section 2.3.3), within each prompt's group.

        lam = 0.5 - (length - min) / (max - min);   right: lam;   wrong: min(0, lam)

    0 for a group whose lengths are all equal. Completions without a verdict count neither for min nor for max.
    """
    lengths = np.asarray(length, np.float64)
    valid = ~np.isnan(verdicts)
    shortest = lengths.min(axis=1, keepdims=True, initial=np.inf, where=valid)
    longest = lengths.max(axis=1, keepdims=True, initial=-np.inf, where=valid)
    # A group without any verdict has an infinite `shortest`: all its values are replaced by NaN below.
    differ = longest > shortest
    lam = 0.5 - (lengths - shortest) / np.where(differ, longest - shortest, 1.0)
    value = np.where(_is_correct(verdicts), lam, np.minimum(lam, 0.0))
    return _with_verdict(verdicts, np.where(differ, value, 0.0))


def soft_overlong(length: Int[np.ndarray, "B G"], max_length: int, cache: int) -> Float[np.ndarray, "B G"]:
    """Soft overlong punishment of DAPO (arXiv:2503.14476, section 3.4).

    0 up to max_length - cache, from there linear to -1 at `max_length`, -1 beyond. With a cache of 0, a step: 0 up to
    `max_length`, -1 beyond.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache is {cache}; it must be between 0 and max_length ({max_length})")
    excess = np.asarray(length, np.float64) - (max_length - cache)
    value = np.where(excess > 0, -1.0, 0.0) if cache == 0 else np.clip(-excess / cache, -1.0, 0.0)
    return (value + 0.0).astype(np.float32)  # + 0.0: no negative zero


def _is_correct(verdicts: Float[np.ndarray, "B G"]) -> Bool[np.ndarray, "B G"]:
    """True for right completions; partial credit and NaN are not right."""
    return np.asarray(verdicts) >= 1


def _with_verdict(verdicts: Float[np.ndarray, "B G"], value: Float[np.ndarray, "B G"]) -> Float[np.ndarray, "B G"]:
    """`value` as float32, NaN where there is no verdict."""
    return np.where(np.isnan(verdicts), np.nan, value).astype(np.float32)
