"""The state of a run, `TrainState`, and the batch that flows through a step: `Prompts`, `Rollouts`, `RolloutOutcome`.

Letters: B prompts in a batch, G completions a prompt, P prompt length, T completion length, N prompts in the dataset.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.images import Images
from pspo_jax.arrays.split_params import merge_params

Params: TypeAlias = PyTree
"""Weights of a model: any pytree of arrays."""
OptState: TypeAlias = PyTree
"""State of an optax optimizer."""


@struct.dataclass
class SavedState:
    """The part of the state that a checkpoint holds. With the frozen weights it decides all further learning."""

    step: Int[Array, ""]
    """Training steps done."""
    params: Params
    """Weights that train: all weights of the model, or its adapters."""
    opt_state: OptState
    """State of the optax optimizer."""
    selector: PyTree
    """Per-prompt arrays of the selector."""
    advantage: PyTree
    """Per-prompt arrays of the advantage estimator."""
    replay: PyTree
    """Groups that the replay stores."""
    key: Key[Array, ""]
    """The run's key. It never changes: each use folds a purpose and the number of the step into it."""
    reference: Params | None = None
    """Trained weights of the KL term's reference policy, the one that RL begins from. None = there is no KL term, or
    the reference is the frozen base of adapters that no supervised step has trained."""
    updates: Int[Array, ""] | int = 0
    """Optimizer updates applied."""
    skipped: Int[Array, ""] | int = 0
    """Length of the current run of updates that were skipped because they were not finite."""
    policy_drift: Float[Array, ""] | float = 0.0
    """Sum over the steps of the mean |change of log-prob| per token, in nats; 0 where no strategy asks for it."""
    queue: PyTree = None
    """Effective groups that wait for a batch (`replay.dynamic_sampling.Queue`); None = no dynamic sampling."""

    def joined(self, frozen: Params | None, teacher: Params | None = None) -> TrainState:
        """The whole state: this one with the weights that checkpoints leave out."""
        saved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TrainState(**saved, frozen=frozen, teacher=teacher)


@struct.dataclass
class TrainState(SavedState):
    """The whole state of a run."""

    frozen: Params | None = None
    """Weights that do not train, such as the base under adapters. Checkpoints leave them out: their source has them."""
    teacher: Params | None = None
    """Weights of the teacher, which checkpoints leave out too; None = there is no teacher."""

    @property
    def weights(self) -> PyTree:
        """The weights that the model's functions take."""
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
    """Tokens of each prompt, then padding."""
    lengths: Int[Array, "B"]
    """Tokens of each prompt before the padding, at least 1."""
    loss_weight: Float[Array, "B"]
    """The selector's importance weight of each prompt, at most 1."""
    images: Images | None = None
    """The prompts' images; None = the data has none."""


@struct.dataclass
class Rollouts:
    """G completions of each of B prompts, with the log-probs that the sampler drew them by."""

    prompts: Prompts
    """The prompts that were completed."""
    tokens: Int[Array, "B G T"]
    """Completions with their EOS, then padding."""
    mask: Bool[Array, "B G T"]
    """True on every token that was drawn, EOS included. It is never inferred from pad ids."""
    log_probs: Float[Array, "B G T"]
    """Log-prob of each token under the policy at `temperature`, as the trainer computes it; 0 outside the mask."""
    sampling_log_probs: Float[Array, "B G T"]
    """Log-prob of each token under the distribution that was drawn from, top-k and top-p included."""
    lengths: Int[Array, "B G"]
    """Number of tokens drawn, EOS included."""
    ended: Bool[Array, "B G"]
    """True if a stop token ended the row, False if the length limit did."""
    temperature: Float[Array, ""]
    """Temperature of the draw; the trainer divides its logits by the same number."""


class RolloutOutcome(NamedTuple):
    """The results of a batch of rollouts, which the selector observes."""

    rewards: Float[Array, "B G"]
    """Reward of each completion; NaN = none."""
    advantages: Float[Array, "B G"]
    """The estimator's advantages (ERS: against smoothed statistics)."""
    raw_advantages: Float[Array, "B G"]
    """Advantages within the group, (r - mean) / (std + eps), whatever the estimator."""
    policy_drift: Float[Array, ""] | float = 0.0
    """`TrainState.policy_drift` when the rollouts were sampled."""
    lengths: Int[Array, "B G"] | float = 0.0
    """Number of tokens drawn."""
    verdicts: Float[Array, "B G"] | None = None
    """Verdicts in [0, 1], NaN = none; None = only rewards are known, and a selector takes them clipped to [0, 1]."""


def run_key(seed: int) -> Key[Array, ""]:
    """The key of a run. It shares no stream with `jax.random.key(seed)`, which draws the initial weights."""
    # Weights fold the CRC of their name into it, cut to 31 bits: no name is this number.
    return jax.random.fold_in(jax.random.key(seed), 2**31)


def purpose_key(state_key: Key[Array, ""], step: Int[Array, ""] | int, purpose: int) -> Key[Array, ""]:
    """The key of one purpose (`SELECT`, `ROLLOUT`, `EVALUATE`, `DROPOUT`, `REPLAY`) in one step.

    It depends on nothing but its arguments, so a resumed run draws what the uninterrupted one would have drawn. The
    purpose is folded in first: whatever a purpose folds into its own key, no other purpose has that key.
    """
    return jax.random.fold_in(jax.random.fold_in(state_key, purpose), step)


SELECT, ROLLOUT, EVALUATE, DROPOUT, REPLAY = range(5)
