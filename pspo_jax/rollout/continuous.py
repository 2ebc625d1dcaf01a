"""Rollouts in fewer slots than rows: a finished row's slot goes to the next that waits (continuous batching in a jit).

All prompts are read once, first. Then a fixed number of slots decodes; between chunks of a few tokens, slots whose row
has ended take the next pending row, whose prompt's keys and values are copied in. A slot's own keys and values are a
ring over time: all slots write the same column in a step, and what a slot may see is told by a column's age, so rows at
different places need no scatter. Each device refills its slots from its own rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.state import Params, Prompts
from pspo_jax.distributed.mesh import ROWS, constrain, size_along
from pspo_jax.model.interface import Model
from pspo_jax.rollout.token_sampling import draw_tokens

TOKENS_PER_TEST = 16
"""Tokens between two refills at most, for which a row that has ended waits; or a 32nd of the longest completion."""


class Samples(NamedTuple):
    """What every row drew, and what it took."""

    tokens: Int[Array, "R T"]
    log_probs: Float[Array, "R T"]
    sampling_log_probs: Float[Array, "R T"]
    lengths: Int[Array, "R"]
    ended: Bool[Array, "R"]
    steps: Int[Array, ""]
    """Steps that all slots took."""


class _Loop(NamedTuple):
    """n = shards of the batch, s = slots of one, r = rows of one."""

    steps: Int[Array, ""]
    pending: Int[Array, "n"]
    """Rows that a slot has taken; the next is this one."""
    row: Int[Array, "n s"]
    """r = none yet."""
    t: Int[Array, "n s"]
    """Place of `last` in its completion."""
    last: Int[Array, "n s"]
    alive: Bool[Array, "n s"]
    taken: Any
    """What each slot has of its row's prompt."""
    cache: Any
    """What each slot has of its row's completion."""
    out: Samples
    """[n, r, ...]"""


def decode_slots(
    model: Model,
    params: Params,
    prompts: Prompts,
    row_keys: Key[Array, "R"],
    settings: Any,
    slots: int,
    group_size: int,
    max_new_tokens: int,
    pad_id: int,
) -> Samples:
    """Completions of all rows, R = B x group_size, in `slots` slots.

    Raises:
      ValueError: the policy cannot, or the mesh does not divide the slots.
    """
    if model.slots is None:
        raise ValueError("rollout.slots: this policy has no `slots`; leave it out")
    shards = size_along(jax.sharding.get_abstract_mesh().shape, ROWS)
    if slots % shards:
        raise ValueError(f"rollout.slots={slots}: must be a multiple of the {shards} devices that share the batch")
    b = prompts.tokens.shape[0]
    r, s = b * group_size // shards, slots // shards
    logits, taken, cache, fill, step = model.slots(params, prompts.tokens, prompts.lengths, (shards, s), max_new_tokens)
    keys = row_keys.reshape(shards, r)
    limit = jnp.minimum(settings.max_new_tokens, max_new_tokens)
    here = jnp.arange(shards)[:, None]
    chunk = max(1, min(TOKENS_PER_TEST, max_new_tokens // 32))

    def draw(
        logits: Float[Array, "n s V"], rows: Int[Array, "n s"], t: Int[Array, "n s"]
    ) -> tuple[Array, Array, Array]:
        """Token t of each slot's row, and its log-probs."""
        own = keys[here, jnp.minimum(rows, r - 1)]
        uniform = jax.vmap(jax.vmap(lambda key, place: jax.random.uniform(jax.random.fold_in(key, place))))(own, t)
        return draw_tokens(logits, uniform, settings.temperature, settings.top_k, settings.top_p)

    def append(loop: _Loop, drawn: tuple[Array, Array, Array], to: Bool[Array, "n s"], t: Int[Array, "n s"]) -> _Loop:
        """Give the slots in `to` their token t."""
        token, log_prob, sampling = drawn
        row = jnp.where(to, loop.row, r)  # r is out of bounds: dropped
        stop = (token[..., None] == settings.stop_ids).any(axis=-1)

        def put(array: Array, value: Array) -> Array:
            return array.at[here, row, t].set(value, mode="drop")

        out = loop.out._replace(
            tokens=put(loop.out.tokens, token),
            log_probs=put(loop.out.log_probs, log_prob),
            sampling_log_probs=put(loop.out.sampling_log_probs, sampling),
            lengths=loop.out.lengths.at[here, row].set(t + 1, mode="drop"),
            ended=loop.out.ended.at[here, row].set(stop, mode="drop"),
        )
        return loop._replace(
            t=jnp.where(to, t, loop.t),
            last=jnp.where(to, token, loop.last),
            alive=jnp.where(to, ~stop & (t + 1 < limit), loop.alive),
            out=out,
        )

    def refill(loop: _Loop) -> _Loop:
        """Pending rows for slots that have none alive. What crosses the cond is copied: not the slots' own caches."""
        wanted = loop.pending[:, None] + jnp.cumsum(~loop.alive, axis=1) - 1
        fresh = ~loop.alive & (wanted < r)
        row, at_first = jnp.where(fresh, wanted, loop.row), jnp.zeros_like(loop.t)

        def take(taken: Any) -> tuple[Any, tuple[Array, Array, Array]]:
            prompt = jnp.minimum(row, r - 1) // group_size
            first = jax.vmap(lambda x, i: x[i])(logits.reshape(shards, -1, logits.shape[-1]), prompt)
            return fill(taken, prompt, fresh), draw(first, row, at_first)

        def leave(taken: Any) -> tuple[Any, tuple[Array, Array, Array]]:
            return taken, (at_first, jnp.zeros(row.shape), jnp.zeros(row.shape))

        taken, drawn = jax.lax.cond(fresh.any(), take, leave, loop.taken)
        pending = loop.pending + fresh.sum(axis=1, dtype=jnp.int32)
        return append(loop._replace(row=row, pending=pending, taken=taken), drawn, fresh, at_first)

    def one(_: Array, loop: _Loop) -> _Loop:
        logits, cache = step(loop.taken, loop.cache, loop.last, loop.t, loop.steps)
        loop = loop._replace(cache=cache, steps=loop.steps + 1)
        return append(loop, draw(logits, loop.row, loop.t + 1), loop.alive, loop.t + 1)

    def body(loop: _Loop) -> _Loop:
        return jax.lax.fori_loop(0, chunk, one, refill(loop))

    zeros = jnp.zeros((shards, r, max_new_tokens))
    out = Samples(
        jnp.full(zeros.shape, pad_id, jnp.int32),
        zeros,
        zeros,
        jnp.zeros((shards, r), jnp.int32),
        jnp.zeros((shards, r), bool),
        jnp.int32(0),
    )
    none = jnp.zeros((shards, s), jnp.int32)
    start = _Loop(jnp.int32(0), jnp.zeros(shards, jnp.int32), none + r, none, none, none > 0, taken, cache, out)
    start = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)) if x.ndim else x, start)
    end = jax.lax.while_loop(lambda loop: loop.alive.any() | (loop.pending < r).any(), body, start)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, end.out)
    return flat._replace(steps=end.steps)
