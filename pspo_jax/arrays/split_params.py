"""Weights that train beside or on top of frozen ones."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Key, PyTree


@struct.dataclass
class SplitParams:
    """Frozen weights, and those that train: adapters on top of them, or the weights beside a frozen vision tower."""

    frozen: PyTree
    """The frozen weights."""
    trained: PyTree | None
    """The weights that train; None = there are only the frozen ones, as in the reference policy of a KL term."""
    key: Key[Array, ""] | None = None
    """Key of the adapters' dropout; None = no dropout, as in sampling and scoring."""


def merge_params(params: PyTree, frozen: PyTree | None, key: Key[Array, ""] | None = None) -> PyTree:
    """The weights that a model's functions take, from the trained and the frozen weights of a `TrainState`.

    Args:
      params: the weights that train.
      frozen: the weights that do not; None = all weights train.
      key: key of the adapters' dropout; None = no dropout.
    """
    return params if frozen is None else SplitParams(frozen, params, key)
