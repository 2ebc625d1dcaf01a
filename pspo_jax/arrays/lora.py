"""Weights that train on top of frozen ones."""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Key


@struct.dataclass
class LoraParams:
    """Frozen weights and what is trained on top of them."""

    base: Any
    adapter: Any | None
    """None = the base alone, which is the reference policy of a KL term."""
    key: Key[Array, ""] | None = None
    """Key of the adapters' dropout; None = no dropout, as in sampling and scoring."""


def merge_params(params: Any, frozen: Any | None, key: Key[Array, ""] | None = None) -> Any:
    """What a policy's functions take, from the trained and the frozen weights of a `TrainState`."""
    return params if frozen is None else LoraParams(frozen, params, key)
