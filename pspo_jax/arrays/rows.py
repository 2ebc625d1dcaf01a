"""Completions as independent rows: what a loss and the log-probs behind it are computed from."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass(kw_only=True)
class LossInputs:
    """What a loss knows of completions before the update, as independent rows."""

    mask: Bool[Array, "R T"]
    """Tokens in the loss."""
    counted: Bool[Array, "R"]
    """Whether the row is in the batch: no mean counts the others, whose mask is empty."""
    advantages: Float[Array, "R"]
    loss_weight: Float[Array, "R"]
    """The selector's importance weight."""
    old_log_probs: Float[Array, "R T"]
    """Of the policy that ratios are against: the one at the start of the step."""
    behaviour_log_probs: Float[Array, "R T"]
    """Of the policy that drew the tokens."""
    reference_log_probs: Float[Array, "R T"] | None = None
    top_entropy: Bool[Array, "R T"] | None = None
    """Tokens that the surrogate and the entropy bonus are taken from; None = all."""


@struct.dataclass(kw_only=True)
class Rows(LossInputs):
    """Completions as rows, R = prompts x group size, with what their log-probs are computed from."""

    group: Int[Array, "R"]
    """Of the batch; rows of one have the same prompt."""
    prompts: Int[Array, "R P"]
    lengths: Int[Array, "R"]
    tokens: Int[Array, "R T"]
    stale: Bool[Array, "R"]
    """Sampled by an older policy."""
    sampling_log_probs: Float[Array, "R T"]
    """Under the distribution drawn from, top-k and top-p included; of rows that are not stale."""
