"""The best k prompts, and draws in proportion to weights, among millions of prompts, without a pass over them.

Per-prompt arrays are leaves of a tree. Each block of FANOUT leaves has a reduction (level one), and each block of
FANOUT of these has one again (level two). A change of B leaves touches 2 B blocks; a choice of k leaves descends
through at most k blocks a level. Both cost the same for ten thousand prompts and, except for a longer level two, for
ten million. Prompts belong to classes, each for a task and a pool. Every class has reductions of its own, and a label
on each leaf says which class it belongs to.

Leaves may be sharded. The levels, 1/128 of their size, are replicated on every device, so that every device makes the
same choice, and only the leaves of chosen blocks travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pspo_jax.arrays.per_prompt import FANOUT

ROUNDS = 12
"""Number of rounds of proportional draws before the rest is drawn by a pass over all weights."""


class Maxima(NamedTuple):
    """Levels one and two of the largest (key, tie) pair of each block; -inf if a block has no leaf of the class."""

    key_one: Float[Array, "C blocks"]
    tie_one: Float[Array, "C blocks"]
    key_two: Float[Array, "C superblocks"]
    tie_two: Float[Array, "C superblocks"]


class Sums(NamedTuple):
    """Levels one and two of the sum of the weights of each block."""

    one: Float[Array, "C blocks"]
    two: Float[Array, "C superblocks"]


def block_rows(leaves: Array, blocks: Int[Array, "m"]) -> Array:
    """The leaves [m, FANOUT] of the given blocks; a block beyond the end stands for the last block."""
    table = leaves.reshape(-1, FANOUT)
    return table[jnp.minimum(blocks, table.shape[0] - 1)]


def build_maxima(key: Float[Array, "R"], tie: Float[Array, "R"], label: Int[Array, "R"], classes: int) -> Maxima:
    """The levels above all leaves, at the cost of one pass over them."""
    in_class = label == jnp.arange(classes)[:, None]
    one = _pair_max(_split(jnp.where(in_class, key, -jnp.inf)), _split(jnp.where(in_class, tie, -jnp.inf)))
    key_one, tie_one = (_padded(x, -jnp.inf) for x in one)
    return Maxima(key_one, tie_one, *_pair_max(_split(key_one), _split(tie_one)))


def build_sums(weight: Float[Array, "R"], label: Int[Array, "R"], classes: int) -> Sums:
    """The levels above all leaves, at the cost of one pass over them."""
    in_class = label == jnp.arange(classes)[:, None]
    one = _padded(_split(jnp.where(in_class, weight, 0.0)).sum(-1), 0.0)
    return Sums(one, _split(one).sum(-1))


def update_maxima(
    levels: Maxima, blocks: Int[Array, "m"], key: Float[Array, "m F"], tie: Float[Array, "m F"], label: Array
) -> Maxima:
    """The levels after the leaves of `blocks` became key, tie and label [m, F]; a block may be named twice."""
    classes = levels.key_one.shape[0]
    in_class = label == jnp.arange(classes)[:, None, None]
    new = _pair_max(jnp.where(in_class, key, -jnp.inf), jnp.where(in_class, tie, -jnp.inf))
    key_one, tie_one = levels.key_one.at[:, blocks].set(new[0]), levels.tie_one.at[:, blocks].set(new[1])
    above = blocks // FANOUT
    new = _pair_max(_split(key_one)[:, above], _split(tie_one)[:, above])
    return Maxima(key_one, tie_one, levels.key_two.at[:, above].set(new[0]), levels.tie_two.at[:, above].set(new[1]))


def update_sums(levels: Sums, blocks: Int[Array, "m"], weight: Float[Array, "m F"], label: Array) -> Sums:
    """`update_maxima` for sums. They are computed anew and not by differences, so that rounding does not add up."""
    in_class = label == jnp.arange(levels.one.shape[0])[:, None, None]
    one = levels.one.at[:, blocks].set(jnp.where(in_class, weight, 0.0).sum(-1))
    above = blocks // FANOUT
    return Sums(one, levels.two.at[:, above].set(_split(one)[:, above].sum(-1)))


def top(
    levels: Maxima, cls: int, key: Float[Array, "R"], tie: Float[Array, "R"], label: Int[Array, "R"], k: int
) -> tuple[Int[Array, "k"], Float[Array, "k"], Float[Array, "k"]]:
    """The k leaves of a class with the largest (key, tie); among equal pairs the lowest row comes first.

    Returns:
      rows in ascending order, keys and ties; key -inf where the class has fewer than k leaves.
    """
    two = top_pairs(levels.key_two[cls], levels.tie_two[cls], min(k, levels.key_two.shape[1]))
    key_one, tie_one = (_split(x[cls])[two].reshape(-1) for x in (levels.key_one, levels.tie_one))
    pick = top_pairs(key_one, tie_one, min(k, len(key_one)))
    blocks = _below(two)[pick]
    # Level one is padded. A block beyond the end has key -inf and would show the last block's leaves.
    real = (key_one[pick] > -jnp.inf)[:, None] & (block_rows(label, blocks) == cls)
    leaf_key = jnp.where(real, block_rows(key, blocks), -jnp.inf).reshape(-1)
    leaf_tie = jnp.where(real, block_rows(tie, blocks), -jnp.inf).reshape(-1)
    short = max(0, k - len(leaf_key))
    leaf_key, leaf_tie = (jnp.pad(x, (0, short), constant_values=-jnp.inf) for x in (leaf_key, leaf_tie))
    rows = jnp.pad(_below(blocks), (0, short))
    pick = top_pairs(leaf_key, leaf_tie, k)
    return rows[pick], leaf_key[pick], leaf_tie[pick]


def top_pairs(key: Float[Array, "n"], tie: Float[Array, "n"], k: int) -> Int[Array, "k"]:
    """Indices, in ascending order, of the k largest pairs; the lowest index first among equals. Ties are finite.

    Two calls of top_k do this: all keys above the k-th largest are in, and ties decide among the keys equal to it.
    """
    # The minimum is taken and not the last entry, because XLA sorts all keys for a slice of top_k's result.
    least = jax.lax.top_k(key, k)[0].min()
    rank = jnp.where(key > least, jnp.inf, jnp.where(key == least, tie, -jnp.inf))
    return jnp.sort(jax.lax.top_k(rank, k)[1])


class Leaves(NamedTuple):
    """The leaves of one class, as weights of a draw."""

    value: Float[Array, "R"]
    """Value of each leaf, from which `weigh` computes its weight."""
    label: Int[Array, "R"]
    cls: int
    """Index of the class in the levels that belong to these leaves."""
    weigh: Callable[[Array], Array] = lambda value: value
    """Function from a leaf's value to its weight, at least 0."""
    member: Callable[[Array], Array] | None = None
    """Function that tells by labels which leaves belong to the class; None = those whose label is `cls`."""

    def weights(self, value: Array, label: Array) -> Float[Array, "..."]:
        """Weights of leaves with these values and labels; 0 outside the class."""
        in_class = label == self.cls if self.member is None else self.member(label) & (label >= 0)
        return jnp.where(in_class, self.weigh(value), 0.0)


def draw(
    levels: Sums, leaves: Leaves, key: Key[Array, ""], k: int, taken: Int[Array, "t"] | None = None
) -> Int[Array, "k"]:
    """k successive draws without replacement, each in proportion to weight among the rows not drawn or taken before.

    The first k distinct rows of independent draws have exactly this distribution. If a few rows hold nearly all of the
    weight, many draws may be necessary. Therefore ROUNDS rounds of somewhat more than k draws are made, and any rows
    still missing are drawn by Gumbel noise over all rows.

    Returns:
      rows in the order of the draws; -1 where no more rows have a positive weight.
    """
    taken = jnp.zeros(0, jnp.int32) if taken is None else taken
    t = len(taken)
    size = k + k // 4 + 16

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        rounds, found, _ = carry
        return (found < k) & (rounds < ROUNDS)

    def one_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rounds, found, held = carry
        new = descend(levels, leaves, jax.random.fold_in(key, rounds), size)
        fresh = _first_of_each(jnp.concatenate([held, new]))[t + k :] & (new >= 0)
        place = found + jnp.cumsum(fresh) - 1
        held = held.at[jnp.where(fresh & (place < k), t + place, t + k)].set(new, mode="drop")
        return rounds + 1, jnp.minimum(found + fresh.sum(), k), held

    start = (jnp.int32(0), jnp.int32(0), jnp.concatenate([taken, jnp.full(k, -1, jnp.int32)]))
    _, found, held = jax.lax.while_loop(unfinished, one_round, start)
    rest_key = jax.random.fold_in(key, ROUNDS)
    return jax.lax.cond(found < k, lambda: _finish(leaves, rest_key, k, found, held), lambda: held[t:])


def _finish(leaves: Leaves, key: Array, k: int, found: Array, held: Int[Array, "t+k"]) -> Int[Array, "k"]:
    """The rows that are still missing, by Gumbel noise: an exact draw at the cost of a pass over all rows."""
    weight = leaves.weights(leaves.value, leaves.label)
    noise = jnp.log(weight) + jax.random.gumbel(key, weight.shape, mode="high")
    noise = noise.at[jnp.where(held >= 0, held, len(weight))].set(-jnp.inf, mode="drop")
    zeros = jnp.zeros_like(noise)
    label = zeros.astype(jnp.int8)
    rows, noise, _ = top(build_maxima(noise, zeros, label, 1), 0, noise, zeros, label, k)
    rows = jnp.where(noise > -jnp.inf, rows, -1)[jnp.argsort(-noise)]
    place = jnp.arange(k)
    return jnp.where(place < found, held[-k:], rows[jnp.maximum(place - found, 0)])


def descend(levels: Sums, leaves: Leaves, key: Key[Array, ""], size: int) -> Int[Array, "size"]:
    """Independent draws in proportion to weight, by one uniform number for each level; -1 if all weights are 0."""
    u = jax.random.uniform(key, (3, size))
    sums = levels.two[leaves.cls]
    two = _inverse(sums, u[0])
    one = two * FANOUT + _inverse(_split(levels.one[leaves.cls])[two], u[1])
    weight = leaves.weights(block_rows(leaves.value, one), block_rows(leaves.label, one))
    rows = one * FANOUT + _inverse(weight, u[2])
    return jnp.where(sums.sum() > 0, rows, -1).astype(jnp.int32)


def _inverse(weight: Float[Array, "... n"], u: Float[Array, "m"]) -> Int[Array, "m"]:
    """The index at which the cumulative sum of weights first exceeds u times its total; never one of weight 0.

    Rounding may make a long cumulative sum fall, or rise at a weight of 0; such indices are left out.
    """
    reached = jnp.where(weight > 0, jnp.cumsum(weight, axis=-1), -jnp.inf)
    total = reached.max(-1)
    target = jnp.minimum(u * total, jnp.nextafter(total, jnp.float32(0)))
    return jnp.argmax(reached > target[:, None], axis=-1)


def _first_of_each(rows: Int[Array, "n"]) -> Bool[Array, "n"]:
    """Whether an entry is the first of its value."""
    order = jnp.argsort(rows, stable=True)
    ordered = rows[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(len(rows), bool).at[order].set(first)


def _below(blocks: Int[Array, "m"]) -> Int[Array, "m*F"]:
    """Indices of the entries under the given blocks of the level above."""
    return (blocks[:, None] * FANOUT + jnp.arange(FANOUT)).reshape(-1)


def _pair_max(key: Float[Array, "... F"], tie: Float[Array, "... F"]) -> tuple[Array, Array]:
    largest = key.max(-1)
    return largest, jnp.where(key == largest[..., None], tie, -jnp.inf).max(-1)


def _split(x: Float[Array, "... n"]) -> Float[Array, "... n/F F"]:
    return x.reshape(*x.shape[:-1], -1, FANOUT)


def _padded(x: Float[Array, "C n"], value: float) -> Float[Array, "C m"]:
    """Level one, padded to a whole number of blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % FANOUT)), constant_values=value)
