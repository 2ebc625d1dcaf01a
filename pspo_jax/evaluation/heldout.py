"""Held-out accuracy of a policy: greedy, and sampled at the rollout settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pspo_jax.arrays.state import Prompts
from pspo_jax.config.schema import Config
from pspo_jax.data.task import CompletionBatch, PromptDataset, RewardResult, Task
from pspo_jax.distributed import processes
from pspo_jax.rollout.sampler import SamplingParams


def evaluate(
    sample: Callable[..., Any],
    params: Any,
    task: Task,
    config: Config,
    key: Any,
    batch: int,
    place: Callable[[Any], Any],
    told: Callable[[RewardResult], None] = lambda _: None,
) -> dict[str, float]:
    """Shares of the held-out prompts' completions: right ones, greedy and sampled, and those without a verdict.

    `{"greedy": ..., "sampled": over eval.samples completions, "no_verdict": of all of them}`

    Args:
      sample: a sampler of one completion a prompt, for `batch` prompts.
      key: the sampled completions are a function of it.
      place: puts a batch of prompts on the devices.
      told: gets the scores of this process's rows, batch by batch.
    """
    greedy = SamplingParams.of(config.rollout, task.stop_ids, temperature=0.0)
    sampled = SamplingParams.of(config.rollout, task.stop_ids)
    n = len(task.heldout.lengths)
    judged: dict[str, list[Callable[[], RewardResult]]] = {"greedy": [], "sampled": []}
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch)
        real = rows < n
        rows = np.where(real, rows, 0).astype(np.int32)
        prompts = place(gather(task.heldout, rows, np.ones(batch, np.float32)))
        draws = [("greedy", greedy)] + [("sampled", sampled)] * config.eval.samples
        for i, (name, settings) in enumerate(draws):
            rollouts = sample(params, prompts, jax.random.fold_in(jax.random.fold_in(key, start), i), settings)
            own = processes.owned_rows(rollouts.lengths)
            own = own[real[own]]
            tokens, lengths, ended = (
                processes.fetch_rows(x, own) for x in (rollouts.tokens, rollouts.lengths, rollouts.ended)
            )
            held = CompletionBatch(task.heldout, rows[own], tokens, lengths, ended, step=0, wants_reward=False)
            judged[name].append(task.reward_fn(held))
    scores = {name: [wait() for wait in waits] for name, waits in judged.items()}
    for one in (one for found in scores.values() for one in found):
        told(one)
    verdicts = {name: np.concatenate([one.verdicts for one in found]) for name, found in scores.items()}
    # (sum, verdicts, completions) of each, over all processes.
    sums = processes.sum_over_processes(
        np.array([[np.nansum(x), (~np.isnan(x)).sum(), x.size] for x in verdicts.values()], np.float64)
    )
    means = {name: float(s / n) if n else float("nan") for name, (s, n, _) in zip(verdicts, sums, strict=True)}
    return means | {"no_verdict": float(1 - sums[:, 1].sum() / sums[:, 2].sum())}


def gather(prompts: PromptDataset, rows: np.ndarray, loss_weight: Any) -> Prompts:
    """The batch of these rows, on the host."""
    build: Any = Prompts
    return build(
        ids=rows, tokens=prompts.tokens[rows], lengths=prompts.lengths[rows], loss_weight=np.asarray(loss_weight)
    )
