"""The strategies that a config names: selector, advantage estimator and replay."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pspo_jax import advantages, replay, selection
from pspo_jax.config.defaults import flatten
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.config.unread_fields import believes
from pspo_jax.config.validation import validate
from pspo_jax.losses.ratios import check_surrogate


class Algorithm(NamedTuple):
    """The strategies of one algorithm; each is pure functions over a state of its own."""

    selector: selection.Selector
    estimator: advantages.AdvantageEstimator
    replay: replay.Replay


def build(config: Config, task_names: tuple[str, ...] = ()) -> Algorithm:
    """The strategies that a config names; fields left at None follow `algorithm.name`.

    Args:
      task_names: names of the run's tasks, for selection.quotas.

    Raises:
      ConfigError: `validation.validate` refuses the config, or a user's own function cannot serve. A resolved config
        has been validated before, and is not validated again.
    """
    if config.given != frozenset(flatten(config)):
        validate(config)
    config = resolve(config)
    t = config.teacher
    check_surrogate(config.loss, taught=t.source is not None and t.divergence == "sampled")
    r = config.rollout
    rounds = r.dynamic_sampling_rounds or 1
    context = selection.SelectorContext(
        round_prompts(config), r.group_size, config.run.steps, config.run.seed, task_names, rounds
    )
    chosen = config.selection
    if rounds > 1:
        # No prompt is rolled out twice in a step.
        chosen = dataclasses.replace(chosen, cooldown=max(chosen.cooldown or 0, 1))
    batch_differs = rounds > 1 or config.replay.name in ("filter", "popo")
    estimator = advantages.make(config.advantage, config.forgetting, batch_differs)
    if config.algorithm.variant == "published_code":
        exponent = chosen.exponent * (chosen.correction or 0.0)
        estimator = advantages.published_code_ers(
            config.advantage, config.forgetting, round_prompts(config), exponent, chosen.floor or 0.0
        )
        chosen = dataclasses.replace(chosen, correction=0.0, correction_end=None)
    selector = selection.selector(chosen, config.forgetting, context)
    if r.longest_first:
        selector = selection.longest_first(selector, r.chunks)
    return Algorithm(selector, estimator, replay.REPLAYS[config.replay.name or "none"](config))


def needs_policy_drift(config: Config) -> bool:
    """Whether a strategy needs `TrainState.policy_drift`, which costs two forward passes over a microbatch per step."""
    config = resolve(config)
    in_alpha = config.advantage.name == "ers" and config.advantage.alpha_mode == "policy_drift"
    return in_alpha or (believes(config) and config.forgetting.mode == "policy_drift")
