"""The least time of a step by arithmetic: a model of the hardware, not a measurement.

A phase computes products, moves data to and from memory, and sends data to other devices. At the rates of a device's
data sheet each of these takes a time, and the phase takes the longest of them at least. The cost of launching kernels
and communication that does not overlap with products are left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pspo_jax.config.schema import extra_completions, round_prompts, update_completions
from pspo_jax.distributed.devices import DeviceSpec
from pspo_jax.distributed.mesh import ROWS, WEIGHTS, microbatch_size, size_along
from pspo_jax.training.optimizer import decays
from pspo_jax.training.scoring import bin_shape, packs_lengths, shares_prompts
from pspo_jax.training.setup import Setup


class LowerBound(NamedTuple):
    """The least time of a phase, in seconds, by each of the limits."""

    products: float
    """Seconds for the matrix products at the device's rate."""
    memory: float
    """Seconds for the traffic to and from the device's memory."""
    links: float
    """Seconds for the bytes that the device sends to others."""

    @property
    def seconds(self) -> float:
        """The least time of the phase: the largest of the three."""
        return max(self)


class Traffic(NamedTuple):
    """The bytes that each device sends in the updates of a step, with collectives that pass data around a ring."""

    gathered: float
    """Bytes of weights, all-gathered over fsdp for the forward and for the backward pass of every microbatch."""
    reduced: float
    """Bytes of float32 gradients of every microbatch: reduce-scattered over fsdp, then all-reduced over data, inside a
    slice."""


def traffic(setup: Setup) -> Traffic:
    """The bytes that FSDP sends inside a slice. Activations and the collectives along tensor are left out."""
    mesh, a = setup.mesh.shape, setup.architecture
    fsdp, data, tensor = size_along(mesh, WEIGHTS), mesh["data"], mesh["tensor"]
    passes = _passes(setup)
    weights = setup.abstract.weights if a.lora is not None else setup.abstract.params
    share = (fsdp - 1) / fsdp
    gathered = 2 * passes * _split(weights) * jnp.dtype(a.compute_dtype).itemsize * share / tensor
    gradient = 4 * _split(setup.abstract.params) / tensor
    return Traffic(gathered, passes * gradient * (share + 2 * (data - 1) / data / fsdp))


def bytes_across_slices(setup: Setup) -> float:
    """The bytes that each slice sends to others in an update: its float32 gradients, once, in a ring of the slices."""
    slices = setup.mesh.shape["slice"]
    return 2 * (slices - 1) / slices * 4 * sum(x.size for x in jax.tree.leaves(setup.abstract.params))


def update_lower_bound(setup: Setup, device: DeviceSpec) -> LowerBound:
    """The least time of the updates of a step, with every completion at its longest.

    A trained matrix is multiplied three times: in the forward pass, for the gradient of its input and for its own
    gradient. A frozen matrix, under adapters, is multiplied twice, as it has no gradient of its own.
    """
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    work = _update_work(setup)
    trained, frozen = _matrices(setup.abstract.params), _matrices(setup.abstract.frozen)
    head, passes = a.vocab_size * a.width, 2 if a.lora is not None else 3
    # With adapters nothing below the first block trains, so that its q, k and v need no gradient of their input.
    first = a.width * (a.heads + 2 * a.kv_heads) * a.head_dim if a.lora is not None else 0
    again = 1 if a.remat in ("full", "offload") else 0
    flops = 2 * work.tokens * ((3 + again) * trained + (2 + again) * frozen - first)
    flops += 2 * work.predictions * passes * head + (3 + again) * _attention_flops(setup, work)
    products = c.loss.num_iterations * flops / math.prod(mesh.values()) / device.flops
    # A matrix is read for each product except that of its own gradient, which is written. Optimizer state is read and
    # written once.
    width = jnp.dtype(a.compute_dtype).itemsize
    reads = _passes(setup) * (3 * trained + 2 * frozen + passes * head) * width / mesh["tensor"]
    state = 2 * _bytes(setup.abstract.opt_state) / size_along(mesh, (*WEIGHTS, "tensor"))
    sent = traffic(setup)
    return LowerBound(products, (reads + state) / device.bandwidth, sum(sent) / device.link)


def rollout_lower_bound(setup: Setup, device: DeviceSpec) -> LowerBound:
    """The least time of the rollout of a batch, or of a round of dynamic sampling, with every completion at its
    longest."""
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    shards, tensor, fsdp = size_along(mesh, ROWS), mesh["tensor"], size_along(mesh, WEIGHTS)
    prompts, g = round_prompts(c) / shards, c.rollout.group_size
    prompt, least, new = setup.task.train.tokens.shape[1], _shortest_prompt(setup), c.rollout.max_new_tokens
    width = jnp.dtype(a.compute_dtype).itemsize
    matrices, head = _matrices(setup.abstract.params) + _matrices(setup.abstract.frozen), a.vocab_size * a.width
    # Reading a prompt gives the first token of its group, and the last token of a completion is not read.
    decoded = prompts * g * (new - 1)
    pairs = prompts * prompt * (prompt + 1) / 2 + decoded * (least + new / 2)
    work = _Work(prompts * prompt + decoded, prompts + decoded, pairs, prompt + new)
    products = 2 * work.tokens * matrices + 2 * work.predictions * head + _attention_flops(setup, work)
    cached = 2 * a.layers * a.kv_heads * a.head_dim * width / tensor
    per_token = (matrices + head) * width / tensor + cached * prompts * (least + g * new / 2)
    gathered = _split(setup.abstract.weights) * width * (fsdp - 1) / fsdp / tensor
    return LowerBound(
        products / tensor / device.flops, (new - 1) * per_token / device.bandwidth, gathered / device.link
    )


class _Work(NamedTuple):
    """The amount of work in one forward pass over a batch."""

    tokens: float
    """Number of tokens that pass through the blocks."""
    predictions: float
    """Number of tokens whose logits are computed."""
    pairs: float
    """Number of pairs of a token and a token that it attends to, itself included, as if there were no windows."""
    longest: float
    """Largest number of tokens that a token attends to."""


def _update_work(setup: Setup) -> _Work:
    """The least work of one pass over the rows of a step.

    Packed prompts are counted as if all were as short as the shortest; a shared prompt is counted once for its group.
    """
    c = setup.config
    new, rows = c.rollout.max_new_tokens, update_completions(c)
    longest = setup.task.train.tokens.shape[1] + new
    if not _packed(setup):
        return _Work(rows * longest, rows * new, rows * longest * (longest + 1) / 2, longest)
    prompt, shared = _shortest_prompt(setup), shares_prompts(setup.model, c)
    tokens = rows * (new - 1) + prompt * (c.rollout.prompts + extra_completions(c) if shared else rows)
    return _Work(tokens, rows * new, rows * (new - 1) * (prompt + new / 2), longest)


def _attention_flops(setup: Setup, work: _Work) -> float:
    """Products of scores and of weighted sums in one forward pass. A layer with a window has a share of the pairs."""
    a = setup.architecture
    layers = sum(1 if window is None else min(window / work.longest, 1) for window in a.windows)
    return 4 * a.heads * a.head_dim * layers * work.pairs


def _shortest_prompt(setup: Setup) -> int:
    """Tokens of the shortest prompt of the training data."""
    return int(setup.task.train.lengths.min())


def _matrices(params: PyTree | None) -> int:
    """Number of parameters in the matrices of the language model's blocks; 0 if there are none."""
    layers = params.get("layers", {}) if params else {}
    return sum(
        x.size
        for x, is_matrix in zip(jax.tree.leaves(layers), jax.tree.leaves(decays(layers)), strict=True)
        if is_matrix
    )


def _packed(setup: Setup) -> bool:
    """Whether updates pack rows into bins."""
    c = setup.config
    rows = update_completions(c) // c.loss.minibatches
    with jax.set_mesh(setup.mesh):
        return packs_lengths(rows, c.rollout.max_new_tokens, c)


def _passes(setup: Setup) -> int:
    """Number of microbatches in the updates of a step; for packed rows, the fewest that hold them."""
    c = setup.config
    rows = update_completions(c) // c.loss.minibatches
    with jax.set_mesh(setup.mesh):
        if _packed(setup):
            shape = bin_shape(rows, setup.task.train.tokens.shape[1], c.rollout.max_new_tokens, setup.model, c)
            bins = _update_work(setup).tokens / c.loss.minibatches / shape.length
            parts = max(math.ceil(bins / shape.at_a_time), 1)
        else:
            parts = rows // microbatch_size(rows, c.loss.microbatch_rows)
    return parts * c.loss.minibatches * c.loss.num_iterations


def _split(tree: PyTree) -> int:
    """Number of parameters in the weights that fsdp splits."""
    return sum(x.size for x in jax.tree.leaves(tree) if any("fsdp" in str(axis) for axis in x.sharding.spec))


def _bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
