"""Completions as independent rows: the inputs of a loss, and of the log-probs that it is computed from.

Letters: R rows (prompts x group size), P prompt length, T completion length.
"""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass(kw_only=True)
class LossInputs:
    """All that a loss knows about completions before the update, one row per completion."""

    mask: Bool[Array, "R T"]
    """Tokens in the loss."""
    counted: Bool[Array, "R"]
    """Whether the row is in the batch. A row that is not counts in no mean, and its mask is empty."""
    advantages: Float[Array, "R"]
    """Advantage of each completion."""
    loss_weight: Float[Array, "R"]
    """The selector's importance weight."""
    old_log_probs: Float[Array, "R T"]
    """Log-probs under the old policy, the one at the start of the step; ratios are against it."""
    behaviour_log_probs: Float[Array, "R T"]
    """Log-probs under the behaviour policy, the one that drew the tokens."""
    reference_log_probs: Float[Array, "R T"] | None = None
    """Log-probs under the KL term's reference policy; None = the loss has no KL term."""
    token_advantages: Float[Array, "R T"] | None = None
    """Advantage of each token by a teacher, which is added to that of its completion; None = no teacher gives any."""
    top_entropy: Bool[Array, "R T"] | None = None
    """Tokens that the surrogate and the entropy bonus are taken from; None = all."""
    interpolation: Float[Array, "R T"] | None = None
    """Weight of the policy that trains in the old policy's log-probs, beside the behaviour policy; None = these are
    `old_log_probs`."""


@struct.dataclass(kw_only=True)
class RowImages:
    """Where the tokens of images lie in each row's prompt; the images themselves are held once for each prompt."""

    prompt: Int[Array, "R"]
    """Index of the row's prompt among those whose images are held."""
    unit: Int[Array, "R P"]
    """`Images.unit` of the prompt."""
    positions: Int[Array, "R P 3"]
    """`Images.positions` of the prompt."""
    delta: Int[Array, "R"]
    """`Images.delta` of the prompt."""


@struct.dataclass(kw_only=True)
class Rows(LossInputs):
    """Completions as rows, with the tokens that their log-probs are computed from."""

    group: Int[Array, "R"]
    """Index of the row's group in the batch; rows of one group have the same prompt."""
    prompts: Int[Array, "R P"]
    """Tokens of each row's prompt, padded on the right."""
    lengths: Int[Array, "R"]
    """Tokens of each prompt before the padding."""
    tokens: Int[Array, "R T"]
    """Tokens of each completion."""
    stale: Bool[Array, "R T"]
    """Whether an older policy drew the token."""
    sampling_log_probs: Float[Array, "R T"]
    """Log-probs under the distribution that was drawn from, top-k and top-p included; they are right for tokens that
    are not stale."""
    images: RowImages | None = None
    """Where the tokens of images lie; None = no prompt of the data has images."""
