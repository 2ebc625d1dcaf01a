"""The rounds of a step with carry-over, on the host: prompts are drawn as they are needed, until a batch is whole.

The selector draws rollout.prompts prompts at a time, as it does without carry-over, and all of them are rolled out in
their order: those for which a round has no room begin in a later one.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from pspo_jax.arrays.state import Prompts, Rollouts, TrainState
from pspo_jax.data.image_batches import gather
from pspo_jax.distributed import processes
from pspo_jax.distributed.mesh import batch_sharding, replicated
from pspo_jax.rollout.carry import PendingGroups
from pspo_jax.rollout.token_loop import SamplingParams
from pspo_jax.training.compile import Programs
from pspo_jax.training.setup import Setup


class Timed(Protocol):
    """Times a block as a part of a phase of the step."""

    def __call__(self, phase: str, /) -> AbstractContextManager[None]: ...


class Drawn(NamedTuple):
    """Prompts that the selector has drawn and that have not begun, the first one first."""

    ids: Int[np.ndarray, "k"]
    """Row of each prompt in the dataset."""
    weights: Float[np.ndarray, "k"]
    """Loss weight of each prompt."""


def roll_out_batch(
    setup: Setup, programs: Programs, state: TrainState, timed: Timed
) -> tuple[TrainState, Rollouts, int]:
    """The state without the batch, the batch, and the number of rounds that it took."""
    roll_out, take_batch = programs.roll_out, programs.take_batch
    assert roll_out is not None and take_batch is not None
    whole, batch = replicated(setup.mesh), setup.config.rollout.prompts
    settings = processes.to_global(SamplingParams.of(setup.config.rollout, setup.task.stop_ids), whole)
    number = 0
    while True:
        held, unfinished = (int(x) for x in processes.to_host((state.pending.held, state.pending.unfinished)))
        if held - unfinished >= batch:
            break
        place = processes.to_global(np.int32(number), whole)
        with timed("select"):
            state, fresh = begin_prompts(setup, programs, state, batch - unfinished, number)
        with timed("rollout"):
            pending = roll_out(state.weights, state.pending, fresh, state.key, state.step, place, settings)
            state = dataclasses.replace(state, pending=pending)
            # The phase ends when the round does.
            processes.to_host(pending.held)
        number += 1
    with timed("rollout"):
        pending, rollouts = take_batch(state.pending, settings.temperature)
    return dataclasses.replace(state, pending=pending), rollouts, number


def begin_prompts(
    setup: Setup, programs: Programs, state: TrainState, needed: int, number: int
) -> tuple[TrainState, Prompts]:
    """The state without the next `needed` prompts, which begin in round `number`; and a batch that they lead."""
    pending, batch = state.pending, setup.config.rollout.prompts
    drawn = _drawn(pending)
    if len(drawn.ids) < needed:
        whole = replicated(setup.mesh)
        place = processes.to_global(np.int32(number), whole)
        waiting = processes.to_global(_pending_ids(pending, drawn), whole)
        ids, weights, selector, _ = programs.select(state.selector, state.key, state.step, place, waiting)
        new = processes.to_host((ids, weights))
        drawn = Drawn(*(np.concatenate(parts) for parts in zip(drawn, new, strict=True)))
        state = dataclasses.replace(state, selector=selector)
    # Behind those that begin, any prompts fill the batch.
    places = np.arange(batch) % max(needed, 1)
    first = Drawn(*(x[places] if needed else np.zeros(batch, x.dtype) for x in drawn))
    chosen = gather(setup.task.train, first.ids, first.weights, setup.room)
    rest = Drawn(*(x[needed:] for x in drawn))
    state = dataclasses.replace(state, pending=_with_drawn(setup, pending, rest))
    return state, processes.to_global(chosen, batch_sharding(setup.mesh))


def _drawn(pending: PendingGroups) -> Drawn:
    ids, weights, count = processes.to_host((pending.drawn_ids, pending.drawn_weights, pending.drawn))
    return Drawn(ids[: int(count)], weights[: int(count)])


def _with_drawn(setup: Setup, pending: PendingGroups, drawn: Drawn) -> PendingGroups:
    """What is pending, with these prompts in the place of those that were drawn before."""
    room, shardings = pending.drawn_ids.shape[0], setup.shardings.pending
    padding = 0, room - len(drawn.ids)
    ids, weights = (np.pad(x, padding) for x in drawn)
    return dataclasses.replace(
        pending,
        drawn_ids=processes.to_global(ids.astype(np.int32), shardings.drawn_ids),
        drawn_weights=processes.to_global(weights.astype(np.float32), shardings.drawn_weights),
        drawn=processes.to_global(np.int32(len(drawn.ids)), shardings.drawn),
    )


def _pending_ids(pending: PendingGroups, drawn: Drawn) -> Int[np.ndarray, "m"]:
    """Rows of the prompts that have been drawn and that no batch has held; -1 behind them."""
    ids, held = processes.to_host((pending.groups.prompts.ids, pending.held))
    found = np.full(len(ids) + pending.drawn_ids.shape[0], -1, np.int32)
    found[: int(held)] = ids[: int(held)]
    found[len(ids) : len(ids) + len(drawn.ids)] = drawn.ids
    return found
