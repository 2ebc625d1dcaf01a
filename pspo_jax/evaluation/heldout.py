"""Held-out accuracy of a policy: greedy, and sampled at the rollout settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspo_jax.config import Config
from pspo_jax.rollout.sampler import SamplingParams
from pspo_jax.state import Prompts
from pspo_jax.tasks.base import Completions, PromptSet, Scores, Task


def evaluate(
    sample: Callable[..., Any],
    params: Any,
    task: Task,
    config: Config,
    key: Any,
    batch: int,
    place: Callable[[Any], Any],
) -> dict[str, float]:
    """Shares of the held-out prompts' completions: right ones, greedy and sampled, and those without a verdict.

    `{"greedy": ..., "sampled": over eval.samples completions, "no_verdict": of all of them}`

    Args:
      sample: a sampler of one completion a prompt, for `batch` prompts.
      key: the sampled completions are a function of it.
      place: puts a batch of prompts on the devices.
    """
    greedy = SamplingParams.of(config.rollout, task.stop_ids, temperature=0.0)
    sampled = SamplingParams.of(config.rollout, task.stop_ids)
    n = len(task.heldout.lengths)
    judged: dict[str, list[Callable[[], Scores]]] = {"greedy": [], "sampled": []}
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch)
        real = rows < n
        rows = np.where(real, rows, 0).astype(np.int32)
        prompts = place(gather(task.heldout, rows, np.ones(batch, np.float32)))
        draws = [("greedy", greedy)] + [("sampled", sampled)] * config.eval.samples
        for i, (name, settings) in enumerate(draws):
            rollouts = sample(params, prompts, jax.random.fold_in(jax.random.fold_in(key, start), i), settings)
            tokens, lengths, ended = jax.device_get((rollouts.tokens, rollouts.lengths, rollouts.ended))
            count = int(real.sum())
            completions = Completions(
                task.heldout, rows[:count], tokens[:count], lengths[:count], ended[:count], step=0
            )
            judged[name].append(task.judge(completions))
    right = {name: np.concatenate([wait().right for wait in waits]) for name, waits in judged.items()}
    missing = np.concatenate([np.isnan(values).ravel() for values in right.values()])
    return {name: _mean(values) for name, values in right.items()} | {"no_verdict": float(missing.mean())}


def _mean(values: np.ndarray) -> float:
    """Mean over the verdicts there are."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def gather(prompts: PromptSet, rows: np.ndarray, loss_weight: Any) -> Prompts:
    """The batch of these rows."""
    return Prompts(
        ids=jnp.asarray(rows),
        tokens=jnp.asarray(prompts.tokens[rows]),
        lengths=jnp.asarray(prompts.lengths[rows]),
        loss_weight=jnp.asarray(loss_weight),
    )
