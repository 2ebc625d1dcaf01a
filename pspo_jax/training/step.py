"""The training step: rewards in, updated state out, one jitted and donated program.

credit -> selector.observe -> replay exchange -> (old, reference log-probs) -> iterations x minibatches x microbatches

Dynamic sampling cuts it in two: `collect`, once a round, and `update`, once a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from pspo_jax.advantages import group_advantages
from pspo_jax.arrays.groups import groups_of, take
from pspo_jax.arrays.lora import merge_params
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.state import REPLAY, Params, RolloutOutcome, Rollouts, TrainState, purpose_key
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.distributed.mesh import UPDATE_ROWS, size_along
from pspo_jax.losses.ratios import kl_estimate
from pspo_jax.model.interface import Model
from pspo_jax.replay import Groups, effective
from pspo_jax.replay.dynamic_sampling import append, new_queue, take_first
from pspo_jax.selection import PromptMetadata
from pspo_jax.training.algorithm import Algorithm, needs_policy_drift
from pspo_jax.training.metrics import Metrics, replay_metrics, rollout_metrics
from pspo_jax.training.optimizer import in_float32
from pspo_jax.training.scoring import (
    microbatches,
    reference_weights,
    rows_of,
    score,
    split_microbatches,
    stale_groups,
    with_log_probs,
)
from pspo_jax.training.update import optimize, update_metrics

MAX_REWARD = 1e15
TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""(state, rollouts, rewards [B, G], verdicts [B, G] | None = None)"""
Collect = Callable[..., tuple[TrainState, Metrics]]
"""(state, rollouts, rewards [B, G], verdicts [B, G] | None = None)"""
Update = Callable[[TrainState, Float[Array, ""]], tuple[TrainState, Metrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    num_prompts: int,
    prompt_length: int,
    key: Key[Array, ""],
    frozen: Params | None = None,
    columns: PromptMetadata | None = None,
) -> TrainState:
    """The state before the first step.

    The KL reference, if the config wants one, is the policy that RL begins from: a copy of `params`. Adapters that no
    supervised step has trained change nothing, and their reference is the frozen weights alone, uncopied.

    Args:
      num_prompts: N, rows of the dataset.
      prompt_length: P, the padded length of prompts.
      key: the run's key, `jax.random.key(seed)`.
      frozen: weights under `params` that do not train, such as the base of adapters.
      columns: what the selector may know of prompts beforehand; None = nothing.
    """
    config = resolve(config)
    r = config.rollout
    copied = config.loss.kl_coef > 0 and (frozen is None or config.sft.steps > 0)
    reference = jax.tree.map(jnp.copy, params) if copied else None
    # Before a round fewer groups than a batch wait, and a round adds no more than its prompts.
    room = r.prompts + round_prompts(config)
    truncates = r.top_p < 1 or r.top_k > 0
    queue = (
        new_queue(room, r.group_size, prompt_length, r.max_new_tokens, truncates)
        if samples_dynamically(config)
        else None
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=in_float32(optimizer).init(params),
        selector=algorithm.selector.init(num_prompts, columns),
        advantage=algorithm.estimator.init(num_prompts),
        replay=algorithm.replay.init(r.prompts, r.group_size, prompt_length, r.max_new_tokens),
        key=key,
        reference=reference,
        frozen=frozen,
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        policy_drift=jnp.zeros((), jnp.float32),
        queue=queue,
    )


def samples_dynamically(config: Config) -> bool:
    """Whether a step rolls out until its batch is full of effective groups."""
    return resolve(config).rollout.dynamic_sampling_rounds != 1


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    state_shardings: Any = None,
) -> TrainStep:
    """`train_step(state, rollouts, rewards, verdicts=None) -> (state, metrics)`, jitted; `state` is donated.

    rewards [B, G] are what is trained on, NaN = none; those beyond 1e15 count as NaN. verdicts [B, G] are the verdicts in
    [0, 1], NaN = none, by which selectors and metrics count successes; None = the rewards within [0, 1]. An update
    whose loss or gradient is not finite leaves params and optimizer state as they were.

    Args:
      state_shardings: pytree of NamedSharding like the state; None = as the compiler chooses.
    """
    config = resolve(config)

    def train_step(
        state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"], verdicts: Float[Array, "B G"] | None = None
    ) -> tuple[TrainState, Metrics]:
        state, groups, metrics = assign_advantages(model, algorithm, config, state, rollouts, rewards, verdicts)
        state, more = _update(
            model, optimizer, algorithm, config, state, groups, rollouts.temperature, rollouts.sampling_log_probs
        )
        return state, metrics | more

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def make_collect(model: Model, algorithm: Algorithm, config: Config, state_shardings: Any = None) -> Collect:
    """`collect(state, rollouts, rewards, verdicts=None) -> (state, metrics)`, jitted, `state` donated: a round of dynamic
    sampling. Rewards and verdicts are as in `make_train_step`.

    Its effective groups wait in `state.queue`; metrics["groups/waiting"] says how many there are.
    """
    config = resolve(config)

    def collect(
        state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"], verdicts: Float[Array, "B G"] | None = None
    ) -> tuple[TrainState, Metrics]:
        state, groups, metrics = assign_advantages(model, algorithm, config, state, rollouts, rewards, verdicts)
        wanted = effective(groups, config.replay.effective)
        queue = append(state.queue, groups, wanted, rollouts.sampling_log_probs)
        metrics["groups/waiting"] = queue.held.astype(jnp.float32)
        return dataclasses.replace(state, queue=queue), metrics

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(collect, donate_argnums=0, out_shardings=out)


def make_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    state_shardings: Any = None,
) -> Update:
    """`update(state, temperature) -> (state, metrics)`, jitted; `state` is donated: a step on the groups that wait.

    The first rollout.prompts of `state.queue` are its batch. Slots for which none waits leave the batch, or are filled
    by the replay.
    """
    config = resolve(config)

    def update(state: TrainState, temperature: Float[Array, ""]) -> tuple[TrainState, Metrics]:
        prompts = config.rollout.prompts
        sampling = None if state.queue.sampling_log_probs is None else state.queue.sampling_log_probs[:prompts]
        groups, queue = take_first(state.queue, prompts)
        state = dataclasses.replace(state, queue=queue)
        return _update(model, optimizer, algorithm, config, state, groups, temperature, sampling)

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(update, donate_argnums=0, out_shardings=out)


def assign_advantages(
    model: Model,
    algorithm: Algorithm,
    config: Config,
    state: TrainState,
    rollouts: Rollouts,
    rewards: Float[Array, "B G"],
    verdicts: Float[Array, "B G"] | None,
) -> tuple[TrainState, Groups, Metrics]:
    """What rewards and verdicts say of prompts: advantages, and what credit and selector remember."""
    ids = rollouts.prompts.ids
    # What is not finite, or whose square would not be, is no reward: it must not reach the per-prompt state.
    rewards = jnp.where(jnp.abs(rewards) <= MAX_REWARD, rewards, jnp.nan)
    advantages, credit_state, kl = compute_advantages(model, algorithm, config, state, rollouts, rewards)
    raw = group_advantages(rewards, ddof=config.advantage.ddof, eps=config.advantage.eps)
    seen = scaled_over_round(algorithm, advantages, rewards)
    outcome = RolloutOutcome(rewards, seen, raw, state.policy_drift, rollouts.lengths, verdicts)
    selector_state = algorithm.selector.observe(state.selector, ids, outcome, state.step)
    groups = groups_of(rollouts, rewards, advantages, state.step)
    metrics = rollout_metrics(rollouts, rewards, jnp.clip(rewards, 0, 1) if verdicts is None else verdicts)
    metrics["groups/effective"] = effective(groups, config.replay.effective).sum().astype(jnp.float32)
    if algorithm.estimator.over_batch is None:
        metrics["advantages/abs_mean"] = jnp.abs(advantages).mean()
    metrics["loss_weight/min"] = rollouts.prompts.loss_weight.min()
    if kl is not None:
        drawn = rollouts.mask.reshape(kl.shape)
        metrics["kl"] = jnp.where(drawn, kl, 0).sum() / jnp.maximum(drawn.sum(), 1)
    return dataclasses.replace(state, selector=selector_state, advantage=credit_state), groups, metrics


def compute_advantages(
    model: Model,
    algorithm: Algorithm,
    config: Config,
    state: TrainState,
    rollouts: Rollouts,
    rewards: Float[Array, "B G"],
) -> tuple[Float[Array, "B G"], Any, Float[Array, "R T"] | None]:
    """Advantages, the credit's state after them, and the KL per token that was taken from the rewards; None = none.

    With loss.kl_in=reward, advantages are of rewards less the KL of all tokens drawn. What the loss leaves out,
    such as truncated completions, counts in a group's rewards, and so its KL does too: without it, completions that
    ended would pay alone.
    """
    o = config.loss
    kl = None
    if o.kl_coef > 0 and o.kl_in == "reward":
        rows = rows_of(groups_of(rollouts, rewards, rewards, state.step), state.step, config)
        rows = dataclasses.replace(rows, mask=rollouts.mask.reshape(rows.mask.shape))
        reference = score(model, reference_weights(state), rows, rollouts.temperature, config)[0]
        kl = kl_estimate(rows.behaviour_log_probs, reference, o.kl_estimator)
        rewards = rewards - o.kl_coef * jnp.where(rows.mask, kl, 0).sum(axis=1).reshape(rewards.shape)
    found = algorithm.estimator.estimate(
        state.advantage, rollouts.prompts.ids, rewards, rollouts.lengths, state.policy_drift
    )
    return *found, kl


def scaled_over_round(
    algorithm: Algorithm, advantages: Float[Array, "B G"], rewards: Float[Array, "B G"]
) -> Float[Array, "B G"]:
    """Advantages as they would be if the groups rolled out together were the batch that trains."""
    over_batch = algorithm.estimator.over_batch
    return advantages if over_batch is None else over_batch(advantages, rewards, jnp.ones(len(rewards), bool))


def _update(
    model: Model,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    state: TrainState,
    groups: Groups,
    temperature: Float[Array, ""],
    sampling_log_probs: Float[Array, "B G T"] | None = None,
) -> tuple[TrainState, Metrics]:
    """Replay exchange, then the optimizer's updates."""
    replays = config.replay.name == "popo"
    metrics: Metrics = {}

    def distance(stored: Groups) -> Float[Array, "C"]:
        return behaviour_divergence(model, state, stored, temperature, config)

    key = purpose_key(state.key, state.step, REPLAY)
    groups, replay_state = algorithm.replay.mix_batch(state.replay, groups, state.step, key, distance)
    if algorithm.estimator.over_batch is not None:
        scaled = algorithm.estimator.over_batch(groups.advantages, groups.rewards, groups.counted)
        groups = dataclasses.replace(groups, advantages=scaled)
        in_batch = jnp.maximum(groups.counted.sum() * scaled.shape[1], 1)
        metrics["advantages/abs_mean"] = jnp.where(groups.counted[:, None], jnp.abs(scaled), 0).sum() / in_batch
    rows = rows_of(groups, state.step, config, sampling_log_probs)
    stale = stale_groups(groups, state.step) if replays or samples_dynamically(config) else None
    rows = with_log_probs(model, state, rows, stale, temperature, config)
    if stale is not None:
        metrics |= replay_metrics(groups, rows, state.step, config)
        replay_state = algorithm.replay.adapt_share(replay_state, metrics["replay/ess"])
    if replays:
        metrics["replay/stored"] = replay_state.groups.counted.sum().astype(jnp.float32)
        metrics["replay/max_share"] = replay_state.share
    if config.replay.name != "none" or samples_dynamically(config):
        metrics["groups/in_batch"] = groups.counted.sum().astype(jnp.float32)
    params, opt_state, skipped, updates = optimize(model, optimizer, config, state, rows, temperature)
    metrics |= update_metrics(updates, config)
    drift = state.policy_drift
    if needs_policy_drift(config):
        metrics["policy/drift"] = policy_drift(model, state, params, rows, temperature, config)
        drift = drift + metrics["policy/drift"]
    applied = state.updates + updates.applied.sum().astype(jnp.int32)
    metrics["updates"] = applied.astype(jnp.float32)
    metrics["skipped_updates"] = skipped.astype(jnp.float32)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        replay=replay_state,
        updates=applied,
        skipped=skipped,
        policy_drift=drift,
    )
    return state, metrics


def policy_drift(
    model: Model, state: TrainState, params: Params, rows: Rows, temperature: Float[Array, ""], config: Config
) -> Float[Array, ""]:
    """Mean |change of log-prob| per token of one microbatch by the step's updates."""
    part = jax.tree.map(lambda x: x[0], split_microbatches(rows, microbatches(rows, config)))
    before = score(model, state.weights, part, temperature, config)[0]
    after = score(model, merge_params(params, state.frozen), part, temperature, config)[0]
    return jnp.where(part.mask, jnp.abs(after - before), 0).sum() / jnp.maximum(part.mask.sum(), 1)


def behaviour_divergence(
    model: Model, state: TrainState, stored: Groups, temperature: Float[Array, ""], config: Config
) -> Float[Array, "C"]:
    """Mean over tokens of k3's estimate of KL(behaviour || policy) for each stored group; one pass over the ring."""
    capacity = stored.counted.shape[0]
    # As many as the mesh divides, the first of them twice: whatever the capacity, rows spread over all devices.
    groups = capacity + -capacity % size_along(jax.sharding.get_abstract_mesh().shape, UPDATE_ROWS)
    stored = take(stored, jnp.arange(groups) % capacity)
    rows = rows_of(stored, state.step, config)
    now = score(model, state.weights, rows, temperature, config)[0]
    kl = jnp.where(rows.mask, kl_estimate(rows.behaviour_log_probs, now, "k3"), 0).reshape(groups, -1).sum(axis=1)
    return (kl / jnp.maximum(rows.mask.reshape(groups, -1).sum(axis=1), 1))[:capacity]
