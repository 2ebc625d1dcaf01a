"""The training step: rewards in, updated state out, one jitted and donated program.

credit -> replay exchange -> (old, reference log-probs) -> iterations x minibatches x microbatches -> observe
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.algorithms import Algorithm, needs_movement, resolve
from pspo_jax.config import Config
from pspo_jax.credit import group_advantages
from pspo_jax.credit.base import group_statistics
from pspo_jax.objective.log_probs import completion_log_probs
from pspo_jax.objective.losses import (
    Denominators,
    LossMetrics,
    combine,
    denominators,
    loss_metrics,
    policy_loss,
    token_losses,
    zero_metrics,
)
from pspo_jax.parallel.mesh import microbatch_size
from pspo_jax.policy.base import Adapted, Policy, join
from pspo_jax.replay import Groups
from pspo_jax.selection import Columns
from pspo_jax.state import DROPOUT, Outcome, Params, Rollouts, TrainState, purpose_key

MAX_REWARD = 1e15
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Rollouts, Float[Array, "B G"]], tuple[TrainState, Metrics]]


@struct.dataclass
class Rows:
    """Completions as independent rows, R = prompts x group size."""

    prompts: Int[Array, "R P"]
    lengths: Int[Array, "R"]
    tokens: Int[Array, "R T"]
    mask: Bool[Array, "R T"]
    advantages: Float[Array, "R"]
    loss_weight: Float[Array, "R"]
    sampler_log_probs: Float[Array, "R T"]
    sampling_log_probs: Float[Array, "R T"]
    old_log_probs: Float[Array, "R T"]
    reference_log_probs: Float[Array, "R T"] | None = None


class Gap(NamedTuple):
    """How far the trainer's log-probs are from the sampler's; exact before the first update of a step."""

    tokens: Float[Array, ""]
    difference_sum: Float[Array, ""]
    difference_max: Float[Array, ""]
    ratio_sum: Float[Array, ""]
    ratio_min: Float[Array, ""]
    ratio_max: Float[Array, ""]


class UpdateMetrics(NamedTuple):
    """One optimizer update's numbers."""

    loss: LossMetrics
    gap: Gap
    grad_norm: Float[Array, ""]
    applied: Float[Array, ""]
    """1, or 0 if the update was skipped as not finite."""


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    num_prompts: int,
    prompt_length: int,
    key: Key[Array, ""],
    frozen: Params | None = None,
    columns: Columns | None = None,
) -> TrainState:
    """The state before the first step.

    The KL reference, if the config wants one, is a copy of `params`; with frozen weights it is these alone, uncopied.

    Args:
      num_prompts: N, rows of the dataset.
      prompt_length: P, the padded length of prompts.
      key: the run's key, `jax.random.key(seed)`.
      frozen: weights under `params` that do not train, such as the base of adapters.
      columns: what the selector may know of prompts beforehand; None = nothing.
    """
    r = config.rollout
    copied = config.objective.kl_coef > 0 and frozen is None
    reference = jax.tree.map(jnp.copy, params) if copied else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        selector=algorithm.selector.init(num_prompts, columns),
        credit=algorithm.credit.init(num_prompts),
        replay=algorithm.replay.init(r.prompts, r.group_size, prompt_length, r.max_new_tokens),
        key=key,
        reference=reference,
        frozen=frozen,
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        movement=jnp.zeros((), jnp.float32),
    )


def make_train_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    config: Config,
    state_shardings: Any = None,
) -> TrainStep:
    """`train_step(state, rollouts, rewards) -> (state, metrics)`, jitted; `state` is donated.

    Uses config.objective and, for Dr.GRPO's constant, rollout.max_new_tokens. rewards [B, G] hold NaN where there is no
    verdict; those beyond 1e15 count as NaN. An update whose loss or gradient is not finite leaves params and optimizer
    state as they were.

    Args:
      state_shardings: pytree of NamedSharding like the state; None = as the compiler chooses.
    """
    config = resolve(config)
    moves = needs_movement(config)

    def train_step(state: TrainState, rollouts: Rollouts, rewards: Float[Array, "B G"]) -> tuple[TrainState, Metrics]:
        ids = rollouts.prompts.ids
        # What is not finite, or whose square would not be, is no verdict: it must not reach the per-prompt state.
        rewards = jnp.where(jnp.abs(rewards) <= MAX_REWARD, rewards, jnp.nan)
        advantages, credit_state = algorithm.credit.estimate(
            state.credit, ids, rewards, rollouts.lengths, state.movement
        )
        raw = group_advantages(rewards, ddof=config.credit.ddof, eps=config.credit.eps)
        groups, replay_state = algorithm.replay.exchange(
            state.replay, Groups(rollouts, rewards, advantages), state.step
        )
        rows = _rows(policy, state, groups, config)
        params, opt_state, skipped, updates = _optimize(policy, optimizer, config, state, rows, rollouts.temperature)
        outcome = Outcome(rewards, advantages, raw, state.movement)
        selector_state = algorithm.selector.observe(state.selector, ids, outcome, state.step)
        metrics = _rollout_metrics(rollouts, rewards) | _update_metrics(updates)
        movement = state.movement
        if moves:
            metrics["policy/movement"] = _movement(policy, state, params, rows, rollouts.temperature, config)
            movement = movement + metrics["policy/movement"]
        applied = state.updates + updates.applied.sum().astype(jnp.int32)
        metrics["updates"] = applied.astype(jnp.float32)
        metrics["skipped_updates"] = skipped.astype(jnp.float32)
        metrics["advantages/abs_mean"] = jnp.abs(advantages).mean()
        metrics["loss_weight/min"] = rollouts.prompts.loss_weight.min()
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            selector=selector_state,
            credit=credit_state,
            replay=replay_state,
            updates=applied,
            skipped=skipped,
            movement=movement,
        )
        return state, metrics

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def _rows(policy: Policy, state: TrainState, groups: Groups, config: Config) -> Rows:
    """Groups as rows, with the log-probs that do not change during the step."""
    r = groups.rollouts
    b, g = r.lengths.shape

    def per_prompt(x: Array) -> Array:
        return jnp.repeat(x, g, axis=0)

    def flat(x: Array) -> Array:
        return x.reshape(b * g, *x.shape[2:])

    rows = Rows(
        prompts=per_prompt(r.prompts.tokens),
        lengths=per_prompt(r.prompts.lengths),
        tokens=flat(r.tokens),
        mask=flat(r.mask),
        advantages=flat(groups.advantages),
        loss_weight=per_prompt(r.prompts.loss_weight),
        sampler_log_probs=flat(r.log_probs),
        sampling_log_probs=flat(r.sampling_log_probs),
        old_log_probs=flat(r.log_probs),
    )
    if config.objective.old_log_probs == "trainer":
        rows = dataclasses.replace(rows, old_log_probs=_score(policy, state.weights, rows, r.temperature, config))
    if config.objective.kl_coef > 0:
        reference = state.reference if state.frozen is None else Adapted(state.frozen, None)
        rows = dataclasses.replace(rows, reference_log_probs=_score(policy, reference, rows, r.temperature, config))
    return rows


def _score(
    policy: Policy, weights: Any, rows: Rows, temperature: Float[Array, ""], config: Config
) -> Float[Array, "R T"]:
    """Log-probs of all rows under `weights`, a microbatch at a time, without gradients."""
    parts = _deal(rows, _microbatches(rows, config))

    def score(part: Rows) -> Array:
        return completion_log_probs(
            policy, weights, part.prompts, part.lengths, part.tokens, temperature, config.objective.logits_mib
        )[0]

    return jax.lax.stop_gradient(_undeal(jax.lax.map(score, parts)))


def _movement(
    policy: Policy, state: TrainState, params: Params, rows: Rows, temperature: Float[Array, ""], config: Config
) -> Float[Array, ""]:
    """Mean |change of log-prob| per token of one microbatch by the step's updates."""
    part = jax.tree.map(lambda x: x[0], _deal(rows, _microbatches(rows, config)))
    before = _score(policy, state.weights, part, temperature, config)
    after = _score(policy, join(params, state.frozen), part, temperature, config)
    return jnp.where(part.mask, jnp.abs(after - before), 0).sum() / jnp.maximum(part.mask.sum(), 1)


def _optimize(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: Config,
    state: TrainState,
    rows: Rows,
    temperature: Float[Array, ""],
) -> tuple[Params, Any, Int[Array, ""], UpdateMetrics]:
    """num_iterations passes over the minibatches; returns metrics stacked over updates."""
    minibatches = _deal_prompts(rows, config.objective.minibatches, config.rollout.group_size)
    drops = state.frozen is not None and config.lora.dropout > 0
    step_key = purpose_key(state.key, state.step, DROPOUT) if drops else None

    def update(carry: Any, minibatch: Rows) -> tuple[Any, UpdateMetrics]:
        params, opt_state, skipped, done = carry
        key = None if step_key is None else jax.random.fold_in(step_key, done)

        def weights(params: Params, microbatch: Array | int) -> Any:
            return join(params, state.frozen, None if key is None else jax.random.fold_in(key, microbatch))

        grads, metrics, gap = _gradient(policy, weights, params, minibatch, temperature, config)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics.loss)
        changes, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, changes)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new_params, new_opt_state), (params, opt_state)
        )
        skipped = jnp.where(finite, 0, skipped + 1).astype(jnp.int32)
        return (params, opt_state, skipped, done + 1), UpdateMetrics(metrics, gap, norm, finite.astype(jnp.float32))

    def iteration(carry: Any, _: None) -> tuple[Any, UpdateMetrics]:
        return jax.lax.scan(update, carry, minibatches)

    carry: Any = (state.params, state.opt_state, state.skipped, jnp.int32(0))
    (params, opt_state, skipped, _), metrics = jax.lax.scan(
        iteration, carry, None, length=config.objective.num_iterations
    )
    return params, opt_state, skipped, jax.tree.map(lambda x: x.reshape(-1), metrics)


def _gradient(
    policy: Policy,
    weights: Callable[[Params, Array | int], Any],
    params: Params,
    rows: Rows,
    temperature: Float[Array, ""],
    config: Config,
) -> tuple[Params, LossMetrics, Gap]:
    """Gradient of a minibatch's loss, accumulated over microbatches in float32.

    weights(params, microbatch) is what the policy's functions take.
    """
    total = denominators(rows.mask)

    def loss_fn(params: Params, part: Rows, microbatch: Array | int) -> tuple[Array, tuple[LossMetrics, Gap]]:
        return _loss(policy, weights(params, microbatch), part, temperature, config, total)

    grad_fn = jax.grad(loss_fn, has_aux=True)
    microbatches = _microbatches(rows, config)
    if microbatches == 1:
        grads, (metrics, gap) = grad_fn(params, rows, 0)
        return grads, metrics, gap

    def accumulate(carry: Any, xs: tuple[Rows, Array]) -> tuple[Any, None]:
        grads, metrics, gap = carry
        new_grads, (new_metrics, new_gap) = grad_fn(params, *xs)
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new_grads)
        return (grads, combine(metrics, new_metrics), _join_gaps(gap, new_gap)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    parts = (_deal(rows, microbatches), jnp.arange(microbatches))
    carry, _ = jax.lax.scan(accumulate, (zeros, zero_metrics(), _no_gap()), parts)
    return carry


def _loss(
    policy: Policy, weights: Any, rows: Rows, temperature: Array, config: Config, total: Denominators
) -> tuple[Array, tuple[LossMetrics, Gap]]:
    log_probs, entropy = completion_log_probs(
        policy, weights, rows.prompts, rows.lengths, rows.tokens, temperature, config.objective.logits_mib
    )
    # Masked tokens may hold anything; equal log-probs keep their ratio at 1, so no inf reaches the gradient.
    log_probs = jnp.where(rows.mask, log_probs, jax.lax.stop_gradient(rows.old_log_probs))
    losses = token_losses(
        log_probs,
        rows.old_log_probs,
        rows.advantages,
        config.objective,
        rows.loss_weight,
        rows.reference_log_probs,
    )
    loss = policy_loss(losses.loss, rows.mask, config.objective.aggregation, total, config.rollout.max_new_tokens)
    return loss, (loss_metrics(loss, losses, entropy, rows.mask, total), _gap(log_probs, rows))


def _gap(log_probs: Float[Array, "R T"], rows: Rows) -> Gap:
    difference = jnp.where(rows.mask, jnp.abs(log_probs - rows.sampler_log_probs), 0)
    ratio = jnp.exp(log_probs - rows.sampling_log_probs)
    return Gap(
        rows.mask.sum().astype(jnp.float32),
        difference.sum(),
        difference.max(),
        jnp.where(rows.mask, ratio, 0).sum(),
        jnp.where(rows.mask, ratio, jnp.inf).min(),
        jnp.where(rows.mask, ratio, 0).max(),
    )


def _no_gap() -> Gap:
    zero = jnp.float32(0)
    return Gap(zero, zero, zero, zero, jnp.float32(jnp.inf), zero)


def _join_gaps(a: Gap, b: Gap) -> Gap:
    return Gap(
        a.tokens + b.tokens,
        a.difference_sum + b.difference_sum,
        jnp.maximum(a.difference_max, b.difference_max),
        a.ratio_sum + b.ratio_sum,
        jnp.minimum(a.ratio_min, b.ratio_min),
        jnp.maximum(a.ratio_max, b.ratio_max),
    )


def _microbatches(rows: Rows, config: Config) -> int:
    n = rows.tokens.shape[0]
    return n // microbatch_size(n, config.objective.microbatch_rows)


def _deal(rows: Any, parts: int) -> Any:
    """[R, ...] -> [parts, R / parts, ...], dealt like cards, so that every part is spread over all devices."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows)


def _undeal(x: Array) -> Array:
    """The inverse of `_deal` for one array."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _deal_prompts(rows: Rows, parts: int, group_size: int) -> Rows:
    """`_deal` that keeps the rows of a prompt together."""

    def one(x: Array) -> Array:
        groups = x.reshape(-1, group_size, *x.shape[1:])
        return _deal(groups, parts).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(one, rows)


def _rollout_metrics(rollouts: Rollouts, rewards: Float[Array, "B G"]) -> Metrics:
    stats = group_statistics(rewards, ddof=1)
    valid = ~jnp.isnan(rewards)
    judged = jnp.maximum((stats.verdicts > 0).sum(), 1)
    std = jnp.sqrt(stats.variance)
    lengths = rollouts.lengths.astype(jnp.float32)
    ended = rollouts.ended
    mixed = (stats.variance > 0) & (stats.verdicts > 1)
    return {
        "reward": jnp.where(valid, rewards, 0).sum() / jnp.maximum(valid.sum(), 1),
        "reward_std": std.sum() / judged,
        "frac_reward_zero_std": 1 - mixed.mean(),
        "rewards/no_verdict": 1 - valid.mean(),
        "groups/effective": mixed.sum().astype(jnp.float32),
        "groups/solved": ((stats.mean == 1) & ~mixed).mean(),
        "groups/unsolved": ((stats.mean == 0) & ~mixed).mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": (lengths * ended).sum() / jnp.maximum(ended.sum(), 1),
        "completions/min_terminated_length": jnp.where(ended.any(), jnp.where(ended, lengths, jnp.inf).min(), 0),
        "completions/max_terminated_length": jnp.where(ended, lengths, 0).max(),
        "completions/clipped_ratio": 1 - ended.mean(),
    }


def _update_metrics(updates: UpdateMetrics) -> Metrics:
    """TRL's names; means over the step's updates. The sampler's gap is that of the first update, before any change."""
    loss = updates.loss
    first = jax.tree.map(lambda x: x[0], updates.gap)
    first_tokens = jnp.maximum(first.tokens, 1)
    return {
        "loss": loss.loss.mean(),
        "kl": loss.kl.mean(),
        "entropy": loss.entropy.mean(),
        "grad_norm": updates.grad_norm.mean(),
        "clip_ratio/low_mean": loss.low.mean(),
        "clip_ratio/low_min": loss.low_min.min(),
        "clip_ratio/high_mean": loss.high.mean(),
        "clip_ratio/high_max": loss.high_max.max(),
        "clip_ratio/region_mean": (loss.low + loss.high).mean(),
        "sampling/sampling_logp_difference/mean": first.difference_sum / first_tokens,
        "sampling/sampling_logp_difference/max": first.difference_max,
        "sampling/importance_sampling_ratio/mean": first.ratio_sum / first_tokens,
        "sampling/importance_sampling_ratio/min": first.ratio_min,
        "sampling/importance_sampling_ratio/max": first.ratio_max,
    }
