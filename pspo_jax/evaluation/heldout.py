"""Held-out accuracy of a policy during training: greedy, and sampled at the rollout settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from pspo_jax.arrays.state import Prompts, Rollouts
from pspo_jax.config.schema import Config
from pspo_jax.data.image_batches import BatchRoom, gather
from pspo_jax.data.task import CompletionBatch, PromptDataset, RewardResult, Task
from pspo_jax.distributed import processes
from pspo_jax.rollout.token_loop import SamplingParams

OTHER_IMAGES = "greedy_other_images"
"""Name of the greedy accuracy of prompts with the images of other prompts."""


class Sample(Protocol):
    """Samples one completion of each prompt of a batch."""

    def __call__(self, params: PyTree, prompts: Prompts, key: Key[Array, ""], settings: SamplingParams, /) -> Rollouts:
        """The completions are a function of the key, whose random numbers each batch's caller chooses."""


def evaluate(
    sample: Sample,
    params: PyTree,
    task: Task,
    config: Config,
    key: Key[Array, ""],
    batch: int,
    place: Callable[[Prompts], Prompts],
    report: Callable[[RewardResult], None] = lambda _: None,
    room: BatchRoom | None = None,
) -> dict[str, float]:
    """Sample and verify completions of all held-out prompts.

    Args:
      sample: the sampler, for `batch` prompts a call.
      key: the key of all draws; equal keys give equal completions.
      batch: prompts per call of the sampler.
      place: puts a batch of prompts on the devices.
      report: is called with the rewards of this process's rows, batch by batch.
      room: room for images; None = no prompt has any.
    Returns:
      Shares in [0, 1]: `greedy`, the mean verdict of greedy completions; `sampled`, that of eval.samples completions
      of each prompt; `no_verdict`, the share of all completions that have none. If the prompts have several labels,
      `greedy/LABEL` and `sampled/LABEL` are the means over the prompts of one label. With eval.other_images, and if the
      prompts have images, `greedy_other_images` is the mean verdict of greedy completions of the same prompts with the
      images of other prompts; a prompt whose image has a size of its own is left out.
    """
    greedy = SamplingParams.of(config.rollout, task.stop_ids, temperature=0.0)
    sampled = SamplingParams.of(config.rollout, task.stop_ids)
    n = len(task.heldout.lengths)
    waits: dict[str, list[tuple[Int[np.ndarray, "b"], Callable[[], RewardResult]]]] = {"greedy": [], "sampled": []}
    control = _with_other_images(task.heldout, config)
    if control is not None:
        waits[OTHER_IMAGES] = []
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch)
        real = rows < n
        rows = np.where(real, rows, 0).astype(np.int32)
        prompts = place(gather(task.heldout, rows, np.ones(batch, np.float32), room))
        draws = [("greedy", greedy, prompts)] + [("sampled", sampled, prompts)] * config.eval.samples
        if control is not None:
            draws += [(OTHER_IMAGES, greedy, place(gather(control.prompts, rows, np.ones(batch, np.float32), room)))]
        for i, (name, settings, prompts) in enumerate(draws):
            rollouts = sample(params, prompts, jax.random.fold_in(jax.random.fold_in(key, start), i), settings)
            own = processes.owned_rows(rollouts.lengths)
            own = own[real[own]]
            tokens, lengths, ended = (
                processes.fetch_rows(x, own) for x in (rollouts.tokens, rollouts.lengths, rollouts.ended)
            )
            completions = CompletionBatch(task.heldout, rows[own], tokens, lengths, ended, step=0, wants_reward=False)
            waits[name].append((rows[own], task.reward_fn(completions)))
    verdicts = {name: _verdicts([wait for _, wait in of_name], report) for name, of_name in waits.items()}
    if control is not None:
        of_control = np.concatenate([rows for rows, _ in waits[OTHER_IMAGES]])
        verdicts[OTHER_IMAGES] = verdicts[OTHER_IMAGES][control.counted[of_control]]
    sampled_rows = {
        name: np.concatenate([rows for rows, _ in of_name]) for name, of_name in waits.items() if name != OTHER_IMAGES
    }
    return _means(verdicts) | _means_by_label(verdicts, sampled_rows, task.heldout.labels)


def _verdicts(
    waits: Sequence[Callable[[], RewardResult]], report: Callable[[RewardResult], None]
) -> Float[np.ndarray, "M 1"]:
    """The verdicts of all batches once they are there, and each batch's rewards reported."""
    scores = [wait() for wait in waits]
    for found in scores:
        report(found)
    return np.concatenate([found.verdicts for found in scores])


class _Control(NamedTuple):
    """Prompts with each other's images."""

    prompts: PromptDataset
    counted: Bool[np.ndarray, "N"]
    """Prompts that got other images. One whose image has a size of its own keeps it, and is left out."""


def _with_other_images(prompts: PromptDataset, config: Config) -> _Control | None:
    """The control of prompts; None where the config does not ask for it, or no prompt has an image to exchange."""
    if prompts.images is None or not config.eval.other_images:
        return None
    images = prompts.images.exchanged(config.task.seed)
    counted = images.all_differ(prompts.images)
    return _Control(prompts._replace(images=images), counted) if counted.any() else None


def _means(verdicts: dict[str, Float[np.ndarray, "M 1"]]) -> dict[str, float]:
    """Shares over all processes, from each one's verdicts."""
    # (sum of verdicts, number of verdicts, number of completions) of each kind.
    sums = processes.sum_over_processes(
        np.array([[np.nansum(x), (~np.isnan(x)).sum(), x.size] for x in verdicts.values()], np.float64)
    )
    means = {name: float(s / n) if n else float("nan") for name, (s, n, _) in zip(verdicts, sums, strict=True)}
    return means | {"no_verdict": float(1 - sums[:, 1].sum() / sums[:, 2].sum())}


def _means_by_label(
    verdicts: dict[str, Float[np.ndarray, "M 1"]], rows: dict[str, Int[np.ndarray, "M"]], labels: Sequence[str] | None
) -> dict[str, float]:
    """Shares over all processes for each label, if there are several.

    Args:
      rows: the prompt of each verdict.
      labels: the label of each prompt.
    """
    names, label_of_row = np.unique(np.array(labels or [""]), return_inverse=True)
    if len(names) < 2:
        return {}
    out = {}
    for kind, of_kind in rows.items():
        values = verdicts[kind]
        known = ~np.isnan(values[:, 0])
        label = label_of_row[of_kind][known]
        counts = [np.bincount(label, weights, len(names)) for weights in (values[known, 0], np.ones(len(label)))]
        for name, total, count in zip(names, *processes.sum_over_processes(np.array(counts, np.float64)), strict=True):
            out[f"{kind}/{name}"] = float(total / count) if count else float("nan")
    return out
