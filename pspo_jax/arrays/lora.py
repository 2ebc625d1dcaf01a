"""Weights that train on top of frozen ones."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Key, PyTree


@struct.dataclass
class LoraParams:
    """Frozen weights and the adapters that train on top of them."""

    base: PyTree
    """The frozen weights."""
    adapter: PyTree | None
    """The adapters' weights; None = the base alone, which is the reference policy of a KL term."""
    key: Key[Array, ""] | None = None
    """Key of the adapters' dropout; None = no dropout, as in sampling and scoring."""


def merge_params(params: PyTree, frozen: PyTree | None, key: Key[Array, ""] | None = None) -> PyTree:
    """The weights that a model's functions take, from the trained and the frozen weights of a `TrainState`.

    Args:
      params: the weights that train: all of them, or the adapters.
      frozen: the weights under the adapters; None = all weights train.
      key: key of the adapters' dropout; None = no dropout.
    """
    return params if frozen is None else LoraParams(frozen, params, key)
