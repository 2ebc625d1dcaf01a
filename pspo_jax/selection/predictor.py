"""Beliefs whose priors are predicted from features of the prompts: a Bayesian linear regression, learnt online.

That a small model which predicts the success of prompts can steer their selection, also for prompts that were never
tried, is the idea of Qu et al. ("Small Generalizable Prompt Predictive Models Can Steer Efficient RL Post-Training",
arXiv 2602.01970); Beta beliefs of prompts for selection are those of MoPPS (arXiv 2507.04632). The model here is our
own: the features x of a prompt come from the trained model's own hidden states (training/prompt_features.py), and the
success y of a group is regressed on phi = (1, x / sqrt(F)) in closed form,

    A = s I + sum_g w_g phi_g phi_g',    b = s (p0, 0, ..., 0) + sum_g w_g y_g phi_g,    m = phi' A^-1 b

where w_g is the number of the group's completions with a verdict, times exp(-age / `forgetting.shared_steps`),
because the policy improves. The prior's mean p0 = a0 / (a0 + b0) and its strength s = a0 + b0 are those of
`ForgettingConfig`. As features are divided by sqrt(F), a typical prompt may deviate from the mean of all prompts by as
much as that mean may deviate from p0. A prompt with own counts s_q and f_q has the belief

    Beta((a0 + b0) m + s_q,    (a0 + b0) (1 - m) + f_q)

with m within `LOWEST` and `HIGHEST`. Without data m is p0. One solution of F + 1 equations serves all prompts that are
scored at one time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, Int

from pspo_jax.arrays.per_prompt import follow_rows
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import ForgettingConfig
from pspo_jax.distributed.mesh import constrain
from pspo_jax.selection.beliefs import Beliefs
from pspo_jax.selection.interface import BatchMetrics, PromptMetadata, PromptStats, Step, VisitUpdate
from pspo_jax.selection.own_counts import OwnCounts, init_counts, learn_counts, with_prior

MAX_FEATURES = 64
"""Largest number of features of a prompt, F."""
LARGEST_FEATURE = 5.0
"""Bound of a feature's magnitude, in standard deviations; larger ones are cut."""
LOWEST, HIGHEST = 0.02, 0.98
"""Bounds of a predicted success: no prediction rules out that a group is mixed."""
_LEAST_RIDGE = 1e-5
"""Smallest strength of the regression's prior, as a share of the trace of its precision. It keeps the equations
solvable in float32 where there is very much data."""
_PRODUCTS = jax.lax.Precision.HIGHEST
"""Products in float32 on every device; accelerators would round their operands to 16 bits by default."""


class PredictedBeliefs(NamedTuple):
    """What is known of each prompt beside the regression."""

    own: OwnCounts
    """Its own counts."""
    features: Float[Array, "R F"]
    """Its features over sqrt(F): the mean of their squares over all prompts and features is about 1 / F."""


class Regression(NamedTuple):
    """Sums over the groups that were seen, without the prior. Column 0 belongs to the constant feature."""

    precision: Float[Array, "F+1 F+1"]
    """sum_g w_g phi_g phi_g'."""
    moment: Float[Array, "F+1"]
    """sum_g w_g y_g phi_g."""
    step: Int[Array, ""]
    """Step as of which the weights are those of `exp(-age / shared_steps)`."""


def init_predictor(num_prompts: int, rows: int, metadata: PromptMetadata | None) -> tuple[PredictedBeliefs, Regression]:
    """The state before any visit.

    Raises:
      ConfigError: `metadata` has no features.
    """
    if metadata is None or metadata.features is None:
        raise ConfigError(
            "selection.predictor: the features of each prompt are not known; pass PromptMetadata with features, or none"
        )
    features = jnp.asarray(metadata.features, jnp.float32)
    count = features.shape[1]
    features = jnp.nan_to_num(features, nan=0.0, posinf=LARGEST_FEATURE, neginf=-LARGEST_FEATURE)
    features = jnp.clip(features, -LARGEST_FEATURE, LARGEST_FEATURE) / count**0.5
    features = jnp.pad(features, ((0, rows - num_prompts), (0, 0)))
    precision, moment = jnp.zeros((count + 1, count + 1), jnp.float32), jnp.zeros(count + 1, jnp.float32)
    return PredictedBeliefs(init_counts(rows), features), Regression(precision, moment, jnp.int32(0))


def read_predictor(
    config: ForgettingConfig, beliefs: PredictedBeliefs, regression: Regression, stats: PromptStats
) -> Beliefs:
    """The Beta belief about each of m prompts as of step `stats.now`."""
    mean = predicted(config, beliefs.features, regression, stats.now)
    return with_prior(config, beliefs.own, mean, stats)


def predicted(
    config: ForgettingConfig, features: Float[Array, "m F"], regression: Regression, now: Step
) -> Float[Array, "m"]:
    """Success of m prompts that the regression predicts as of step `now`, within `LOWEST` and `HIGHEST`."""
    a0, b0 = config.prior_successes, config.prior_failures
    keep = _kept(config, now - regression.step)
    precision = keep * regression.precision
    strength = jnp.maximum(a0 + b0, _LEAST_RIDGE * jnp.trace(precision))
    prior = jnp.zeros_like(regression.moment).at[0].set(a0 / (a0 + b0))
    factor = cho_factor(precision + strength * jnp.eye(precision.shape[0]), lower=True)
    weights = cho_solve(factor, keep * regression.moment + strength * prior)
    return jnp.clip(weights[0] + jnp.matmul(features, weights[1:], precision=_PRODUCTS), LOWEST, HIGHEST)


def learn_predictor(
    config: ForgettingConfig, beliefs: PredictedBeliefs, regression: Regression, update: VisitUpdate
) -> tuple[PredictedBeliefs, Regression]:
    """The state of the round's prompts, and the regression after the round; groups without a verdict weigh nothing."""
    now = jnp.asarray(update.stats.now, jnp.int32)
    keep = _kept(config, now - regression.step)
    # Whole on every device, so that all of them add up in one order.
    features = constrain(jnp.pad(beliefs.features, ((0, 0), (1, 0)), constant_values=1.0), None, None)
    # A prompt that is twice in the batch has its sum in both entries.
    successes, failures = (
        constrain(jnp.where(update.is_last_entry, x, 0.0), None) for x in (update.successes, update.failures)
    )
    weighted = (successes + failures)[:, None] * features
    return beliefs._replace(own=learn_counts(config, beliefs.own, update)), Regression(
        keep * regression.precision + jnp.matmul(features.T, weighted, precision=_PRODUCTS),
        keep * regression.moment + jnp.matmul(features.T, successes, precision=_PRODUCTS),
        now,
    )


def predictor_metrics(
    config: ForgettingConfig, beliefs: PredictedBeliefs, regression: Regression, update: VisitUpdate
) -> BatchMetrics:
    """How well the regression predicts a round that it has not seen; NaN if no group has a verdict."""
    error = jnp.abs(predicted(config, beliefs.features, regression, update.stats.now) - update.success)
    counted = update.has_verdict & update.is_last_entry
    return {"selection/predictor_error": jnp.where(counted, error, 0.0).sum() / counted.sum()}


def follow_predictor(
    old: tuple[PredictedBeliefs, Regression], fresh: tuple[PredictedBeliefs, Regression], places: Int[Array, "N"]
) -> tuple[PredictedBeliefs, Regression]:
    """The state for changed data. Known prompts keep their own counts.

    The features of all prompts are new, so that the regression starts over.

    Args:
      places: old row of each new prompt; -1 = the prompt is new.
    """
    own: OwnCounts = follow_rows(old[0].own, fresh[0].own, places)
    return fresh[0]._replace(own=own), fresh[1]


def _kept(config: ForgettingConfig, steps: Int[Array, ""]) -> Float[Array, ""]:
    """Share of a group's weight that is left after so many steps."""
    return jnp.exp(-jnp.maximum(steps, 0).astype(jnp.float32) / config.shared_steps)
