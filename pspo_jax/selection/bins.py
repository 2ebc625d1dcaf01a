"""Beliefs that the prompts of a bin share: a hierarchical Beta model, in which a bin's mean is its prompts' prior.

A bin is the prompts of one task or of one difficulty. It counts the successes S and failures F of all their groups, and
its mean is m = (a0 + S) / (a0 + b0 + S + F), with the prior (a0, b0) of `ForgettingConfig`. A prompt with own counts s
and f then has the belief

    Beta((a0 + b0) m + s,    (a0 + b0) (1 - m) + f)

so that a prompt with few visits has about the success of its bin, and one with many has its own. At a visit, a prompt's
counts are multiplied by the discount rho of `beliefs.discount`. In each step, a share `shrinkage` is forgotten of the
counts of every bin and of every prompt that is not visited: a prompt's belief drifts to its bin's mean, and the mean of
a bin that no draw reaches drifts to that of the prior, so that neither is given up for good. MarinSkyRL
(marin-community) weighs whole bins by 1 - p^n - (1 - p)^n and lets their counts revert for the same reason; here the
prompts keep beliefs of their own.

With `prior_strength=estimated`, the bin's mean weighs M completions in place of a0 + b0. With q the share of ordered
pairs of completions of one group that are both right, M = m (1 - m) / (q - m^2) - 1, the method of moments for the
beta-binomial, within `WEAKEST` and `STRONGEST`: prompts that are alike make M large, and prompts some of which are
always and the others never solved make it small. Counts of bins then also fade by exp(-1 / `shared_steps`) a step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import ForgettingConfig
from pspo_jax.selection.beliefs import Beliefs, kept
from pspo_jax.selection.interface import PromptMetadata, PromptStats, Step, VisitUpdate
from pspo_jax.selection.own_counts import OwnCounts, init_counts, learn_counts, with_prior

MAX_BINS = 64
"""Largest number of bins."""
WEAKEST, STRONGEST = 0.5, 64.0
"""Bounds of an estimated strength of a bin's mean, in completions."""


class BinnedBeliefs(NamedTuple):
    """What is known of each prompt beside its bin's counts."""

    own: OwnCounts
    """Its own counts."""
    bin: Int[Array, "R"]
    """Number of its bin, from 0."""


class BinCounts(NamedTuple):
    """Discounted counts of each bin over all of its prompts' groups."""

    successes: Float[Array, "K"]
    failures: Float[Array, "K"]
    right_pairs: Float[Array, "K"]
    """Ordered pairs of completions of one group that are both right: s (s - 1) of each group with s successes."""
    pairs: Float[Array, "K"]
    """Ordered pairs of completions of one group that have a verdict."""
    step: Int[Array, ""]
    """Step as of which the counts are discounted."""


class BinPriors(NamedTuple):
    """The prior of each bin's prompts."""

    mean: Float[Array, "K"]
    """Expected success probability."""
    strength: Float[Array, "K"]
    """Number of completions that weigh as much as the prior."""


def number_bins(values: Float[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """The bin of each prompt by its difficulty: equal difficulties are in one bin, and harder prompts in later ones.

    Each difficulty has a bin of its own. If there are more than `MAX_BINS` of them, bins hold about equally many
    prompts.

    Args:
      values: difficulties; NaN = unknown, which counts as hardest.
    """
    known = np.where(np.isnan(values), np.inf, values)
    distinct, number = np.unique(known, return_inverse=True)
    if len(distinct) > MAX_BINS:
        number = np.searchsorted(np.sort(known), known) * MAX_BINS // len(known)
    return number.astype(np.int8)


def init_bins(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[BinnedBeliefs, BinCounts]:
    """The state before any visit.

    Raises:
      ConfigError: `metadata` has no bins.
    """
    if metadata is None or metadata.bins is None:
        raise ConfigError("selection.bins: the bin of each prompt is not known; pass PromptMetadata with bins, or none")
    bins = jnp.pad(jnp.asarray(metadata.bins, jnp.int8), (0, rows - num_prompts))
    counts = _no_counts(jnp.int32(0))
    return BinnedBeliefs(init_counts(rows), bins), counts


def _no_counts(step: Int[Array, ""]) -> BinCounts:
    """The counts of bins in which nothing was seen."""
    # Each array has a buffer of its own, because the training step donates its state.
    successes, failures, right_pairs, pairs = (jnp.zeros(MAX_BINS, jnp.float32) for _ in range(4))
    return BinCounts(successes, failures, right_pairs, pairs, step)


def read_bins(config: ForgettingConfig, beliefs: BinnedBeliefs, counts: BinCounts, stats: PromptStats) -> Beliefs:
    """The Beta belief about each of m prompts as of step `stats.now`."""
    bins = beliefs.bin.astype(jnp.int32)
    priors = bin_priors(config, counts, stats.now)
    return with_prior(config, beliefs.own, priors.mean[bins], stats, priors.strength[bins])


def bin_priors(config: ForgettingConfig, counts: BinCounts, now: Step) -> BinPriors:
    """The prior of each bin's prompts as of step `now`."""
    a0, b0 = config.prior_successes, config.prior_failures
    counts = _as_of(config, counts, now)
    mean = (a0 + counts.successes) / (a0 + b0 + counts.successes + counts.failures)
    if config.prior_strength != "estimated":
        return BinPriors(mean, jnp.full_like(mean, a0 + b0))
    # The second moment of Beta(a0, b0), with the weight of as many completions as the prior's own.
    square = (a0 * (a0 + 1) + counts.right_pairs) / ((a0 + b0) * (a0 + b0 + 1) + counts.pairs)
    variance = jnp.maximum(square - mean**2, 1e-6)
    return BinPriors(mean, jnp.clip(mean * (1 - mean) / variance - 1, WEAKEST, STRONGEST))


def learn_bins(
    config: ForgettingConfig, beliefs: BinnedBeliefs, counts: BinCounts, update: VisitUpdate
) -> tuple[BinnedBeliefs, BinCounts]:
    """The state of the round's prompts and of all bins after the round."""
    counts = _as_of(config, counts, update.stats.now)
    own = beliefs._replace(own=learn_counts(config, beliefs.own, update))
    return own, _plus(counts, beliefs.bin, *_round_counts(update))


def _round_counts(update: VisitUpdate) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Successes and failures of each prompt; one that is twice in the batch has its sum in the last of its entries."""
    right, wrong = (jnp.where(update.is_last_entry, x, 0.0) for x in (update.successes, update.failures))
    return right, wrong


def _plus(counts: BinCounts, bins: Int[Array, "m"], right: Float[Array, "m"], wrong: Float[Array, "m"]) -> BinCounts:
    """The counts with those of m prompts' groups."""
    number = right + wrong
    more = right, wrong, jnp.maximum(right * (right - 1), 0), jnp.maximum(number * (number - 1), 0)
    old = counts.successes, counts.failures, counts.right_pairs, counts.pairs
    successes, failures, right_pairs, pairs = (x + _per_bin(new, bins) for x, new in zip(old, more, strict=True))
    return BinCounts(successes, failures, right_pairs, pairs, counts.step)


def _as_of(config: ForgettingConfig, counts: BinCounts, now: Step) -> BinCounts:
    """Counts that have shrunk until step `now`."""
    steps = jnp.maximum(jnp.asarray(now, jnp.int32) - counts.step, 0)
    keep = kept(config, steps)
    if config.prior_strength == "estimated":
        keep *= jnp.exp(-steps.astype(jnp.float32) / config.shared_steps)
    old = counts.successes, counts.failures, counts.right_pairs, counts.pairs
    successes, failures, right_pairs, pairs = (keep * x for x in old)
    return BinCounts(successes, failures, right_pairs, pairs, jnp.asarray(now, jnp.int32))


def follow_bins(
    old: tuple[BinnedBeliefs, BinCounts], fresh: tuple[BinnedBeliefs, BinCounts], places: Int[Array, "N"]
) -> tuple[BinnedBeliefs, BinCounts]:
    """The state for changed data. Known prompts keep their own counts, from which the new bins' counts are summed.

    A prompt's own count stands for one group, so that pairs are those of its discounted completions.

    Args:
      places: old row of each new prompt; -1 = the prompt is new.
    """
    beliefs: BinnedBeliefs = follow_rows(old[0], fresh[0], places)
    beliefs = beliefs._replace(bin=fresh[0].bin)
    return beliefs, _plus(_no_counts(old[1].step), beliefs.bin, beliefs.own.successes, beliefs.own.failures)


def _per_bin(values: Float[Array, "m"], bins: Int[Array, "m"]) -> Float[Array, "K"]:
    return jax.ops.segment_sum(values, bins.astype(jnp.int32), MAX_BINS)
