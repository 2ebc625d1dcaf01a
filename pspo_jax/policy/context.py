"""How many positions a checkpoint was made for."""

from __future__ import annotations

from typing import Any

_STRETCHED = ("linear", "dynamic", "yarn")
"""Rotary settings whose factor multiplies the positions; those of other types are counted already."""


def context_length(hf: Any) -> int | None:
    """Positions that a transformers config says its model can use, prompt and completion together; None = it says none.

    A factor of the rotary embedding counts, as vLLM has it, unless the config gives settings for each kind of layer.
    """
    limit = getattr(hf, "max_position_embeddings", None)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return None
    rotary = getattr(hf, "rope_parameters", None)
    if not isinstance(rotary, dict) or rotary.get("rope_type") not in _STRETCHED:
        return limit
    factor, base = rotary.get("factor"), rotary.get("original_max_position_embeddings") or limit
    return max(limit, int(base * factor)) if isinstance(factor, int | float) else limit


def context_line(name: str | None, limit: int | None, longest_prompt: int, max_new_tokens: int) -> str | None:
    """A line for rows that may become longer than a checkpoint's context; None if there are none."""
    if limit is None or longest_prompt + max_new_tokens <= limit:
        return None
    return (
        f"rollout.max_new_tokens={max_new_tokens}: after the longest prompt of {longest_prompt:,} tokens a row has up "
        f"to {longest_prompt + max_new_tokens:,} positions, and {name} was made for {limit:,} "
        "(max_position_embeddings); text beyond them is poor: lower it, or prompt.max_tokens"
    )
