"""The training step: rewards in, updated state out, as one jitted program that donates the state.

rewards -> advantages -> selector.observe -> replay.mix_batch, add_rollouts -> (old, reference, teacher's log-probs) ->
optimizer updates

Dynamic sampling cuts the step in two: `collect` runs once per round of rollouts, `update` once per step.

Letters: B groups, G completions per group, T completion length, R = B G rows, C stored groups.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from pspo_jax.advantages import group_advantages
from pspo_jax.arrays.groups import groups_of, take, with_images
from pspo_jax.arrays.images import Images
from pspo_jax.arrays.rows import Rows
from pspo_jax.arrays.split_params import merge_params
from pspo_jax.arrays.state import REPLAY, Params, RolloutOutcome, Rollouts, TrainState, purpose_key
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.presets import resolve
from pspo_jax.config.schema import Config, round_prompts
from pspo_jax.config.strategies import STORING
from pspo_jax.config.unread_fields import trains_on_older_policies
from pspo_jax.distributed.mesh import ROWS, size_along
from pspo_jax.losses.ratios import kl_estimate
from pspo_jax.model.interface import Model
from pspo_jax.replay import Groups, effective
from pspo_jax.replay.dynamic_sampling import Queue, append, new_queue, take_first
from pspo_jax.rollout.carry import PendingGroups, new_pending
from pspo_jax.selection import PromptMetadata
from pspo_jax.training.algorithm import Algorithm, needs_policy_drift
from pspo_jax.training.distillation import prepare_lesson
from pspo_jax.training.metrics import Metrics, carry_metrics, replay_metrics, rollout_metrics, update_metrics
from pspo_jax.training.optimizer import in_float32
from pspo_jax.training.scoring import (
    num_microbatches,
    reference_weights,
    rows_of,
    rows_of_batch,
    score,
    with_log_probs,
)
from pspo_jax.training.splitting import images_of_batch, split_microbatches
from pspo_jax.training.update import Training, optimize

MAX_REWARD = 1e15
"""Rewards of larger magnitude count as missing: their squares would not be finite in float32."""


class Jitted(Protocol):
    """A function that `jax.jit` compiles."""

    def lower(self, *args: PyTree) -> jax.stages.Lowered:
        """The program for arguments of these shapes, as `jax.jit` traces it."""
        ...


class TrainStep(Jitted, Protocol):
    """A whole training step; see `make_train_step`."""

    def __call__(
        self,
        state: TrainState,
        rollouts: Rollouts,
        rewards: Float[Array, "B G"],
        verdicts: Float[Array, "B G"] | None = None,
        /,
    ) -> tuple[TrainState, Metrics]:
        """The state after the step, and the step's metrics."""
        ...


class Collect(Jitted, Protocol):
    """One round of dynamic sampling; see `make_collect`."""

    def __call__(
        self,
        state: TrainState,
        rollouts: Rollouts,
        rewards: Float[Array, "B G"],
        verdicts: Float[Array, "B G"] | None = None,
        /,
    ) -> tuple[TrainState, Metrics]:
        """The state with the round's effective groups in its queue, and the round's metrics."""
        ...


class Update(Jitted, Protocol):
    """A training step on the groups that wait; see `make_update`."""

    def __call__(self, state: TrainState, temperature: Float[Array, ""], /) -> tuple[TrainState, Metrics]:
        """The state after the step, and the step's metrics."""
        ...


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    num_prompts: int,
    prompt_length: int,
    key: Key[Array, ""],
    frozen: Params | None = None,
    metadata: PromptMetadata | None = None,
    images: Images | None = None,
) -> TrainState:
    """The state before the first step.

    The KL term's reference policy, if the config has one, is the policy that RL begins from: a copy of `params`.
    Adapters that no supervised step has trained change nothing, so their reference is the frozen weights, uncopied.

    Args:
      params: the weights that train; the state takes them over.
      num_prompts: N, rows of the dataset.
      prompt_length: P, the padded length of prompts.
      key: the run's key, `jax.random.key(seed)`.
      frozen: weights that do not train, such as the base of adapters.
      metadata: what the selector may know about prompts beforehand; None = nothing.
      images: the empty images of one prompt, for which stored groups need room; None = the data has no images.
    Raises:
      ConfigError: the data has images, and rollout.carry is set.
    """
    config = resolve(config)
    r = config.rollout
    if r.carry and images is not None:
        raise ConfigError(
            "rollout.carry=true: cannot be used with prompts that have images; drop it, or choose data without images"
        )
    unchanged = config.lora.rank > 0 and config.sft.steps == 0
    copied = config.loss.kl_coef > 0 and not unchanged
    reference = jax.tree.map(jnp.copy, params) if copied else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=in_float32(optimizer).init(params),
        selector=algorithm.selector.init(num_prompts, metadata),
        advantage=algorithm.estimator.init(num_prompts),
        replay=with_images(algorithm.replay.init(r.prompts, r.group_size, prompt_length, r.max_new_tokens), images),
        key=key,
        reference=reference,
        frozen=frozen,
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        policy_drift=jnp.zeros((), jnp.float32),
        queue=with_images(_empty_queue(config, prompt_length), images),
        pending=_nothing_pending(config, prompt_length),
    )


def _empty_queue(config: Config, prompt_length: int) -> Queue | None:
    """The queue of dynamic sampling; None without it."""
    if not samples_dynamically(config):
        return None
    r = config.rollout
    # Fewer groups than a batch wait before a round, and a round adds no more than its prompts.
    room = r.prompts + round_prompts(config)
    return new_queue(room, r.group_size, prompt_length, r.max_new_tokens, _truncates(config))


def _nothing_pending(config: Config, prompt_length: int) -> PendingGroups | None:
    """The room of carry-over; None without it."""
    r = config.rollout
    if not r.carry:
        return None
    return new_pending(r.prompts, r.group_size, prompt_length, r.max_new_tokens, r.budget or 1, _truncates(config))


def _truncates(config: Config) -> bool:
    """Whether tokens are drawn from a part of the vocabulary, which groups then store."""
    return config.rollout.top_p < 1 or config.rollout.top_k > 0


def samples_dynamically(config: Config) -> bool:
    """Whether a step rolls out until its batch is full of effective groups."""
    return resolve(config).rollout.dynamic_sampling_rounds != 1


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    state_shardings: PyTree = None,
    teacher: Model | None = None,
) -> TrainStep:
    """`train_step(state, rollouts, rewards, verdicts=None) -> (state, metrics)`, jitted; `state` is donated.

    rewards [B, G] are trained on; NaN = none, and those beyond 1e15 count as NaN. By verdicts [B, G] in [0, 1], NaN =
    none, selectors and metrics count successes; None = the rewards clipped to [0, 1]. An update whose loss or gradient
    is not finite leaves weights and optimizer state as they were.

    Args:
      state_shardings: pytree of NamedSharding with the structure of the state; None = the compiler chooses.
      teacher: the functions of the teacher whose weights `state.teacher` holds; None = there is no teacher.
    """
    config = resolve(config)

    def train_step(
        state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"], verdicts: Float[Array, "B G"] | None = None
    ) -> tuple[TrainState, Metrics]:
        drawn: Metrics = {}
        if config.rollout.carry:
            # The batch is not the last draw, which other runs describe as they draw.
            drawn = algorithm.selector.batch_metrics(state.selector, rollouts.prompts.ids, state.step)
        state, groups, metrics = assign_advantages(model, algorithm, config, state, rollouts, rewards, verdicts)
        metrics |= drawn
        temperature, sampling = rollouts.temperature, rollouts.sampling_log_probs
        state, more = _update(model, optimizer, algorithm, config, state, groups, temperature, sampling, teacher)
        return state, metrics | more

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def make_collect(model: Model, algorithm: Algorithm, config: Config, state_shardings: PyTree = None) -> Collect:
    """`collect(state, rollouts, rewards, verdicts=None) -> (state, metrics)`, jitted; `state` is donated.

    It is a round of dynamic sampling. The round's effective groups then wait in `state.queue`, and
    metrics["groups/waiting"] is the number of groups there. Rewards and verdicts are as in `make_train_step`.
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
    state_shardings: PyTree = None,
    teacher: Model | None = None,
) -> Update:
    """`update(state, temperature) -> (state, metrics)`, jitted; `state` is donated.

    It is a step on the groups that wait: the first rollout.prompts of `state.queue` are its batch. If fewer wait, the
    replay fills the empty slots, or they leave the batch. `teacher` is that of `make_train_step`.
    """
    config = resolve(config)

    def update(state: TrainState, temperature: Float[Array, ""]) -> tuple[TrainState, Metrics]:
        prompts = config.rollout.prompts
        sampling = None if state.queue.sampling_log_probs is None else state.queue.sampling_log_probs[:prompts]
        groups, queue = take_first(state.queue, prompts)
        state = dataclasses.replace(state, queue=queue)
        return _update(model, optimizer, algorithm, config, state, groups, temperature, sampling, teacher)

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
    """Groups with their advantages, the state in which estimator and selector have seen them, and metrics."""
    ids = rollouts.prompts.ids
    # A reward that is not finite, or whose square would not be, must not reach the per-prompt state.
    rewards = jnp.where(jnp.abs(rewards) <= MAX_REWARD, rewards, jnp.nan)
    advantages, estimator_state, kl = compute_advantages(model, algorithm, config, state, rollouts, rewards)
    raw = group_advantages(rewards, ddof=config.advantage.ddof, eps=config.advantage.eps)
    seen = scaled_over_round(algorithm, advantages, rewards)
    outcome = RolloutOutcome(rewards, seen, raw, state.policy_drift, rollouts.lengths, verdicts)
    before_learning = algorithm.selector.outcome_metrics(state.selector, ids, outcome, state.step)
    selector_state = algorithm.selector.observe(state.selector, ids, outcome, state.step)
    groups = groups_of(rollouts, rewards, advantages, state.step)
    metrics = rollout_metrics(rollouts, rewards, jnp.clip(rewards, 0, 1) if verdicts is None else verdicts)
    metrics |= before_learning
    metrics["groups/effective"] = effective(groups, config.replay.effective).sum().astype(jnp.float32)
    if algorithm.estimator.over_batch is None:
        metrics["advantages/abs_mean"] = jnp.abs(advantages).mean()
    metrics["loss_weight/min"] = rollouts.prompts.loss_weight.min()
    if kl is not None:
        drawn = rollouts.mask.reshape(kl.shape)
        metrics["kl"] = jnp.where(drawn, kl, 0).sum() / jnp.maximum(drawn.sum(), 1)
    return dataclasses.replace(state, selector=selector_state, advantage=estimator_state), groups, metrics


def compute_advantages(
    model: Model,
    algorithm: Algorithm,
    config: Config,
    state: TrainState,
    rollouts: Rollouts,
    rewards: Float[Array, "B G"],
) -> tuple[Float[Array, "B G"], PyTree, Float[Array, "R T"] | None]:
    """Advantages, the estimator's state after them, and the KL per token that the rewards were lowered by.

    With loss.kl_in=reward, advantages are of rewards minus the KL of all tokens drawn; otherwise that KL is None.
    Completions that the loss leaves out, such as truncated ones, count in their group's rewards, and so their KL does
    too: otherwise only completions that ended would pay it.
    """
    o = config.loss
    kl = None
    if o.kl_coef > 0 and o.kl_in == "reward":
        rows = rows_of(groups_of(rollouts, rewards, rewards, state.step), state.step, config)
        rows = dataclasses.replace(rows, mask=rollouts.mask.reshape(rows.mask.shape))
        images = rollouts.prompts.images
        reference = score(model, reference_weights(state), rows, rollouts.temperature, config, images=images)[0]
        kl = kl_estimate(rows.behaviour_log_probs, reference, o.kl_estimator)
        rewards = rewards - o.kl_coef * jnp.where(rows.mask, kl, 0).sum(axis=1).reshape(rewards.shape)
    advantages, estimator_state = algorithm.estimator.estimate(
        state.advantage, rollouts.prompts.ids, rewards, rollouts.lengths, state.policy_drift
    )
    return advantages, estimator_state, kl


def scaled_over_round(
    algorithm: Algorithm, advantages: Float[Array, "B G"], rewards: Float[Array, "B G"]
) -> Float[Array, "B G"]:
    """Advantages as they would be if the groups that were rolled out together were the batch that trains."""
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
    teacher: Model | None = None,
) -> tuple[TrainState, Metrics]:
    """The second half of a step: the replay mixes the batch, then the optimizer updates the weights."""
    state, groups, added, metrics = _mix_batch(model, algorithm, config, state, groups, temperature)
    rows = rows_of_batch(groups, added, state.step, config, sampling_log_probs)
    images = images_of_batch(groups, added)
    rows = with_log_probs(model, state, rows, temperature, config, images)
    learner, rows, teach, taught = prepare_lesson(model, teacher, state.teacher, rows, temperature, config, images)
    metrics |= taught
    if config.rollout.carry:
        metrics |= carry_metrics(state.pending, groups, rows, state.step, config)
    elif trains_on_older_policies(config):
        metrics |= replay_metrics(groups, added, rows, state.step, config)
        adapted = algorithm.replay.adapt_share(state.replay, metrics["replay/ess"])
        state = dataclasses.replace(state, replay=adapted)
    if config.replay.name in STORING:
        metrics["replay/stored"] = state.replay.groups.counted.sum().astype(jnp.float32)
    if config.replay.name == "popo":
        metrics["replay/max_share"] = state.replay.share
    training, updates = optimize(learner, optimizer, config, state, rows, temperature, images, teach)
    metrics |= update_metrics(updates, config)
    drift = state.policy_drift
    if needs_policy_drift(config):
        metrics["policy/drift"] = policy_drift(model, state, training.params, rows, temperature, config, images)
        drift = drift + metrics["policy/drift"]
    applied = state.updates + updates.applied.sum().astype(jnp.int32)
    metrics["updates"] = applied.astype(jnp.float32)
    metrics["skipped_updates"] = training.skipped.astype(jnp.float32)
    return _after_updates(state, training, applied, drift), metrics


def _mix_batch(
    model: Model,
    algorithm: Algorithm,
    config: Config,
    state: TrainState,
    groups: Groups,
    temperature: Float[Array, ""],
) -> tuple[TrainState, Groups, Groups | None, Metrics]:
    """The batch that trains, its advantages divided by their scale over it, and the completions added to it.

    The state is that after the replay; None = the replay adds no completions.
    """

    def distance(stored: Groups) -> Float[Array, "C"]:
        return behaviour_divergence(model, state, stored, temperature, config)

    metrics: Metrics = {}
    key = purpose_key(state.key, state.step, REPLAY)
    groups, replay_state = algorithm.replay.mix_batch(state.replay, groups, state.step, key, distance)
    if algorithm.estimator.over_batch is not None:
        scaled = algorithm.estimator.over_batch(groups.advantages, groups.rewards, groups.counted)
        groups = dataclasses.replace(groups, advantages=scaled)
        in_batch = jnp.maximum(groups.counted.sum() * scaled.shape[1], 1)
        metrics["advantages/abs_mean"] = jnp.where(groups.counted[:, None], jnp.abs(scaled), 0).sum() / in_batch
    if config.replay.name != "none" or samples_dynamically(config):
        metrics["groups/in_batch"] = groups.counted.sum().astype(jnp.float32)
    added, replay_state = algorithm.replay.add_rollouts(replay_state, groups, state.step, key)
    return dataclasses.replace(state, replay=replay_state), groups, added, metrics


def _after_updates(
    state: TrainState, training: Training, applied: Array, drift: Float[Array, ""] | float
) -> TrainState:
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=training.params,
        opt_state=training.opt_state,
        updates=applied,
        skipped=training.skipped,
        policy_drift=drift,
    )


def policy_drift(
    model: Model,
    state: TrainState,
    params: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
    images: Images | None = None,
) -> Float[Array, ""]:
    """Mean |change of log-prob| per token, in nats, from the state's weights to `params`, over one microbatch."""
    part = jax.tree.map(lambda x: x[0], split_microbatches(rows, num_microbatches(rows, config)))
    before = score(model, state.weights, part, temperature, config, images=images)[0]
    after = score(model, merge_params(params, state.frozen), part, temperature, config, images=images)[0]
    return jnp.where(part.mask, jnp.abs(after - before), 0).sum() / jnp.maximum(part.mask.sum(), 1)


def behaviour_divergence(
    model: Model, state: TrainState, stored: Groups, temperature: Float[Array, ""], config: Config
) -> Float[Array, "C"]:
    """Estimate (k3) of KL(behaviour policy || current policy) per token for each stored group, in nats.

    It costs one forward pass over all stored groups.
    """
    capacity = stored.counted.shape[0]
    # Groups are repeated up to a number that the mesh divides, so that rows and images spread over all devices.
    groups = capacity + -capacity % size_along(jax.sharding.get_abstract_mesh().shape, ROWS)
    stored = take(stored, jnp.arange(groups) % capacity)
    rows = rows_of(stored, state.step, config)
    now = score(model, state.weights, rows, temperature, config, images=stored.prompts.images)[0]
    kl = jnp.where(rows.mask, kl_estimate(rows.behaviour_log_probs, now, "k3"), 0).reshape(groups, -1).sum(axis=1)
    return (kl / jnp.maximum(rows.mask.reshape(groups, -1).sum(axis=1), 1))[:capacity]
