"""Everything that a run is, as pytrees: `TrainState`, and the batch that flows through a step, `Rollouts`.

Letters: B prompts in a batch, G completions a prompt, P prompt length, T completion length, N prompts in the dataset.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.lora import merge_params

Params = Any
"""The policy's weights: any pytree of arrays."""


@struct.dataclass
class SavedState:
    """What a checkpoint holds. With the source of the frozen weights, nothing else affects learning."""

    step: Int[Array, ""]
    """Training steps done."""
    params: Params
    opt_state: Any
    """State of the optax optimizer."""
    selector: Any
    """Per-prompt arrays of the selector."""
    advantage: Any
    """Per-prompt arrays of the credit."""
    replay: Any
    """Stored groups."""
    key: Key[Array, ""]
    """The run's key. It never changes: a purpose and the step's number are folded into it."""
    reference: Params | None = None
    """Trained weights of the KL reference, the policy that RL begins from; None when there is no KL term, or when it is
    the frozen base of adapters that no supervised step has trained."""
    updates: Int[Array, ""] | int = 0
    """Optimizer updates applied."""
    skipped: Int[Array, ""] | int = 0
    """Non-finite updates skipped in a row, up to now."""
    policy_drift: Float[Array, ""] | float = 0.0
    """Sum over the steps of the mean |change of log-prob| per token; 0 where no strategy asks for it."""
    queue: Any = None
    """Effective groups that wait for a batch; None without dynamic sampling."""

    def joined(self, frozen: Params | None) -> TrainState:
        """The state that trains, with the weights that checkpoints leave out."""
        return TrainState(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, frozen=frozen)


@struct.dataclass
class TrainState(SavedState):
    """Everything that a run is."""

    frozen: Params | None = None
    """Weights that do not train: the base under adapters. Checkpoints leave them out: their source has them."""

    @property
    def weights(self) -> Any:
        """What the policy's functions take."""
        return merge_params(self.params, self.frozen)

    def to_save(self) -> SavedState:
        """The part that a checkpoint holds."""
        return SavedState(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SavedState)})


@struct.dataclass
class Prompts:
    """A batch of prompts, padded on the right."""

    ids: Int[Array, "B"]
    """Row of each prompt in the dataset."""
    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    """Tokens of each prompt before the padding, at least 1."""
    loss_weight: Float[Array, "B"]
    """The selector's importance weight of each prompt, at most 1."""


@struct.dataclass
class Rollouts:
    """G completions of each of B prompts, and what the sampler knew when it drew them."""

    prompts: Prompts
    tokens: Int[Array, "B G T"]
    """Completions with their EOS, then padding."""
    mask: Bool[Array, "B G T"]
    """True on every token that was drawn, EOS included. Never inferred from pad ids."""
    log_probs: Float[Array, "B G T"]
    """Log-prob of each token under the policy at `temperature`: what the trainer computes. 0 outside the mask."""
    sampling_log_probs: Float[Array, "B G T"]
    """Log-prob under the distribution that was drawn from: top-k and top-p included."""
    lengths: Int[Array, "B G"]
    """Tokens drawn."""
    ended: Bool[Array, "B G"]
    """True if a stop token ended the row, False if the length limit did."""
    temperature: Float[Array, ""]
    """Temperature of the draw; the trainer divides its logits by the same number."""


class RolloutOutcome(NamedTuple):
    """What a step learned about its prompts; the selector observes it."""

    rewards: Float[Array, "B G"]
    """NaN = no verdict."""
    advantages: Float[Array, "B G"]
    """The credit's advantages (for ERS: against smoothed statistics)."""
    raw_advantages: Float[Array, "B G"]
    """Advantages within the group, (r - mean) / (std + eps), whatever the credit."""
    policy_drift: Float[Array, ""] | float = 0.0
    """`TrainState.movement` when the rollouts were sampled."""
    lengths: Int[Array, "B G"] | float = 0.0
    """Tokens drawn."""
    right: Float[Array, "B G"] | None = None
    """Verdicts in [0, 1], NaN = none; None = only rewards are known, and a selector takes them within [0, 1]."""


def run_key(seed: int) -> Key[Array, ""]:
    """The key of a run; it shares no stream with `jax.random.key(seed)`, which draws the initial weights."""
    # Weights fold the CRC of their name into it, cut to 31 bits: no name is this number.
    return jax.random.fold_in(jax.random.key(seed), 2**31)


def purpose_key(state_key: Key[Array, ""], step: Int[Array, ""] | int, purpose: int) -> Key[Array, ""]:
    """The key of one purpose (`SELECT`, `ROLLOUT`, `EVALUATE`, `DROPOUT`, `REPLAY`) in one step.

    A function of the run's key, so that a resumed run draws what the uninterrupted one would have. The purpose is
    folded in first: whatever a purpose folds into its own key, it never meets another's.
    """
    return jax.random.fold_in(jax.random.fold_in(state_key, purpose), step)


SELECT, ROLLOUT, EVALUATE, DROPOUT, REPLAY = range(5)
