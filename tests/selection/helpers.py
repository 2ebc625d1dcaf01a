"""Selectors with their functions compiled, outcomes to feed them, and tests of frequencies."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from pspo_jax.arrays.state import RolloutOutcome
from pspo_jax.config.strategies import ForgettingConfig, SelectionConfig
from pspo_jax.selection import PromptMetadata, Selector, SelectorContext, selector

GROUP = 4
Rewards = Callable[[Any, int], np.ndarray]
"""Function of (ids, step) to rewards [B, GROUP]."""


class CompiledSelector(NamedTuple):
    """A selector whose functions are compiled, and the batch size that it draws."""

    selector: Selector
    batch: int
    draw_many: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """Function of (state, keys, step) to ids [keys, batch]."""

    def init(self, prompts: int, metadata: PromptMetadata | None = None) -> Any:
        return self.selector.init(prompts, metadata)

    def select(self, state: Any, step: int, seed: int | None = None) -> tuple[np.ndarray, np.ndarray, Any]:
        key = jax.random.key(step if seed is None else seed)
        ids, weight, state = self.selector.select(state, key, jnp.int32(step), self.batch)
        return np.asarray(ids), np.asarray(weight), state

    def observe(self, state: Any, ids: Any, rewards: Any, step: int) -> Any:
        seen = rewards if isinstance(rewards, RolloutOutcome) else outcome(rewards)
        return self.selector.observe(state, jnp.asarray(ids, jnp.int32), seen, jnp.int32(step))

    def draws(self, state: Any, count: int, step: int = 0) -> np.ndarray:
        """Ids [count, batch] of `count` draws, each with a key of its own."""
        keys = jax.random.split(jax.random.key(count), count)
        return np.asarray(self.draw_many(state, keys, jnp.int32(step)))

    def table(self, state: Any, prompts: int, step: int = 0) -> dict[str, np.ndarray]:
        """The table without its padding."""
        return {name: np.asarray(x)[:prompts] for name, x in self.selector.to_table(state, jnp.int32(step)).items()}


@functools.cache
def make(
    name: str,
    batch: int,
    *,
    steps: int = 100,
    seed: int = 0,
    task_names: tuple[str, ...] = (),
    discount: float = 0.9,
    **fields: Any,
) -> CompiledSelector:
    """A compiled selector; tests with equal arguments share it."""
    config = SelectionConfig(name=name, **fields)  # type: ignore[arg-type]
    made = selector(
        config,
        ForgettingConfig(mode="fixed", discount=discount),
        SelectorContext(batch, GROUP, steps, seed, task_names),
    )

    @jax.jit
    def draw_many(state: Any, keys: Any, step: Any) -> Any:
        return jax.lax.map(lambda key: made.select(state, key, step, batch)[0], keys)

    return CompiledSelector(compiled_whole(made), batch, draw_many)


def compiled_whole(chosen: Selector) -> Selector:
    """The selector with each of its functions compiled; otherwise each operation in them is a program of its own."""
    return chosen._replace(
        init=jax.jit(chosen.init, static_argnums=0),
        select=jax.jit(chosen.select, static_argnums=3),
        observe=jax.jit(chosen.observe),
        follow=jax.jit(chosen.follow),
        batch_metrics=jax.jit(chosen.batch_metrics),
        outcome_metrics=jax.jit(chosen.outcome_metrics),
        summary=jax.jit(chosen.summary),
        to_table=jax.jit(chosen.to_table),
    )


def outcome(rewards: Any, advantages: Any = None) -> RolloutOutcome:
    """The outcome of these rewards; advantages are those within the group unless they are given."""
    rewards = np.asarray(rewards, np.float32)
    valid = ~np.isnan(rewards)
    count = np.maximum(valid.sum(1, keepdims=True), 1)
    centred = np.where(valid, rewards - np.where(valid, rewards, 0).sum(1, keepdims=True) / count, 0)
    raw = centred / (np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(count - 1, 1)) + 1e-4)
    raw = raw.astype(np.float32)
    smoothed = raw if advantages is None else np.asarray(advantages, np.float32)
    return RolloutOutcome(rewards, smoothed, raw)


def half_right(ids: Any, step: int = 0) -> np.ndarray:
    """Rewards of groups that are half right."""
    return np.tile([0.0, 1.0], (len(ids), GROUP // 2))


def all_wrong(ids: Any, step: int = 0) -> np.ndarray:
    """Rewards of groups that are all wrong."""
    return np.zeros((len(ids), GROUP))


def half_right_only(mixed: Iterable[int]) -> Rewards:
    """Rewards of which the groups of these prompts are half right, and all other groups are wrong."""
    return lambda ids, step: np.where(np.isin(ids, list(mixed))[:, None], half_right(ids), all_wrong(ids))


def random_rewards(seed: int, missing: float = 0.0) -> Rewards:
    """Random rewards; each group has a success probability of its own, and a share of groups has no verdict."""
    rng = np.random.default_rng(seed)

    def rewards(ids: Any, step: int) -> np.ndarray:
        right = (rng.random((len(ids), GROUP)) < rng.random((len(ids), 1))).astype(np.float32)
        return np.where(rng.random((len(ids), 1)) < missing, np.nan, right)

    return rewards


def run_steps(
    compiled: CompiledSelector, state: Any, steps: int, rewards: Rewards = half_right, start: int = 0
) -> tuple[np.ndarray, Any]:
    """The ids [steps, batch] that a selector draws in some steps, and its state after them."""
    drawn = []
    for step in range(start, start + steps):
        ids, _, state = compiled.select(state, step)
        state = compiled.observe(state, ids, rewards(ids, step), step)
        drawn.append(ids)
    return np.stack(drawn), state


def scan_steps(compiled: CompiledSelector, state: Any, steps: int, rewards: Any) -> np.ndarray:
    """The ids [steps, batch] that `run_steps` draws, by one program; row i of `rewards` holds those of prompt i."""
    outcomes = jax.device_put(outcome(rewards))

    def one_step(state: Any, step: Any) -> Any:
        ids, _, state = compiled.selector.select(state, jax.random.key(step), step, compiled.batch)
        seen = RolloutOutcome(outcomes.rewards[ids], outcomes.advantages[ids], outcomes.raw_advantages[ids])
        return compiled.selector.observe(state, ids, seen, step), ids

    return np.asarray(jax.jit(lambda state: jax.lax.scan(one_step, state, jnp.arange(steps))[1])(state))


def with_priorities(
    compiled: CompiledSelector, priority: Any, floor: float = 1e-6, metadata: PromptMetadata | None = None
) -> Any:
    """State of pps in which each prompt has the given priority."""
    n = len(priority)
    value = np.tile(np.asarray(priority, np.float32)[:, None] - np.float32(floor), (1, GROUP))
    seen = RolloutOutcome(np.zeros((n, GROUP), np.float32), value, value)
    return compiled.observe(compiled.init(n, metadata), np.arange(n), seen, -1)


def assert_fits(counts: Any, chances: Any) -> None:
    """Counts of independent draws fit these probabilities."""
    counts, chances = np.asarray(counts, float), np.asarray(chances, float)
    assert stats.chisquare(counts, chances / chances.sum() * counts.sum()).pvalue > 1e-3


def assert_even(counts: Any, batch: int) -> None:
    """Counts of prompts fit batches of distinct prompts in which all sets are equally likely."""
    counts = np.asarray(counts, float)
    n, mean = len(counts), counts.mean()
    # Draws without replacement vary less than independent ones, by exactly this factor.
    statistic = ((counts - mean) ** 2 / mean).sum() * (n - 1) / (n - batch)
    assert stats.chi2.sf(statistic, n - 1) > 1e-3


def assert_valid(ids: np.ndarray, prompts: int, batch: int) -> None:
    """A full batch of distinct prompts."""
    assert ids.shape == (batch,)
    assert len(set(ids.tolist())) == batch
    assert ids.min() >= 0 and ids.max() < prompts


def counted(ids: np.ndarray, prompts: int) -> np.ndarray:
    """How often each prompt occurs."""
    return np.bincount(ids.reshape(-1), minlength=prompts)
