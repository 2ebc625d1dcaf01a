"""From a resolved config to the strategies that it names: selector, advantages and replay."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from pspo_jax import advantages, replay, selection
from pspo_jax.config.defaults import flatten
from pspo_jax.config.ownership import believes
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.config.validation import validate
from pspo_jax.losses.ratios import check_surrogate


class Algorithm(NamedTuple):
    """The strategies of one algorithm; each is pure functions over its own state."""

    selector: selection.Selector
    estimator: advantages.AdvantageEstimator
    replay: replay.Replay


def build(config: Config, kinds: tuple[str, ...] = ()) -> Algorithm:
    """The strategies that a config names; fields left at None follow `algorithm.name`.

    Args:
      kinds: names of the run's tasks, for selection.quotas.
    Raises:
      ConfigError: as `validation.validate`; a config that is resolved has been validated, and is not checked again.
    """
    if config.given != frozenset(flatten(config)):
        validate(config)
    config = resolve(config)
    check_surrogate(config.loss)
    r = config.rollout
    rounds = r.dynamic_sampling_rounds or 1
    sizes = selection.SelectorContext(
        round_prompts(config), r.group_size, config.run.steps, config.run.seed, kinds, rounds
    )
    chosen = config.selection
    if rounds > 1:
        # A prompt is not rolled out twice in a step.
        chosen = dataclasses.replace(chosen, cooldown=max(chosen.cooldown or 0, 1))
    batch_differs = rounds > 1 or config.replay.name != "none"
    made = advantages.make(config.advantage, config.forgetting, batch_differs)
    if config.algorithm.variant == "published_code":
        exponent = chosen.exponent * (chosen.correction or 0.0)
        made = advantages.published_code_ers(
            config.advantage, config.forgetting, round_prompts(config), exponent, chosen.floor or 0.0
        )
        chosen = dataclasses.replace(chosen, correction=0.0, correction_end=None)
    replays = replay.REPLAYS[config.replay.name or "none"](config)
    selector = selection.selector(chosen, config.forgetting, sizes)
    if r.longest_first:
        selector = selection.longest_first(selector, r.chunks)
    return Algorithm(selector, made, replays)


def needs_policy_drift(config: Config) -> bool:
    """Whether a strategy asks how far the policy moves in a step, which costs two passes over a microbatch."""
    config = resolve(config)
    by_alpha = config.advantage.name == "ers" and config.advantage.alpha_mode == "policy_drift"
    return by_alpha or (believes(config) and config.forgetting.mode == "policy_drift")
