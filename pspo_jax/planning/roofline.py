"""The least time of a step by arithmetic: a model of the hardware, not a measurement.

Each phase takes at least the larger of what its products need at the devices' stated rate, what its memory traffic
needs, and what its collectives need. Nothing here knows of launch costs, of overlap that fails, or of kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pspo_jax.config.schema import round_prompts
from pspo_jax.distributed.devices import DeviceSpec
from pspo_jax.distributed.mesh import ROWS, WEIGHTS, microbatch_size, size_along
from pspo_jax.losses.packing import padded_length
from pspo_jax.training.optimizer import decays
from pspo_jax.training.scoring import bins_at_a_time, packs_lengths, shares_prompts
from pspo_jax.training.setup import Setup


class LowerBound(NamedTuple):
    """Seconds that a phase takes at least."""

    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self)


class Traffic(NamedTuple):
    """Bytes that each device sends in the updates of a step, by rings."""

    gathered: float
    """All-gathers of weights over fsdp: for the forward and for the backward pass of every microbatch."""
    reduced: float
    """Gradients of every microbatch, float32: a reduce-scatter over fsdp, an all-reduce of the share over data."""


def traffic(setup: Setup) -> Traffic:
    """What FSDP has to send; tensor's own collectives and activations are left out."""
    mesh, a = setup.mesh.shape, setup.architecture
    fsdp, data, tensor = size_along(mesh, WEIGHTS), mesh["data"], mesh["tensor"]
    passes = _passes(setup)
    weights = setup.abstract.weights if a.lora is not None else setup.abstract.params
    share = (fsdp - 1) / fsdp
    gathered = 2 * passes * _split(weights) * jnp.dtype(a.compute_dtype).itemsize * share / tensor
    gradient = 4 * _split(setup.abstract.params) / tensor
    return Traffic(gathered, passes * gradient * (share + 2 * (data - 1) / data / fsdp))


def update_lower_bound(setup: Setup, kind: DeviceSpec) -> LowerBound:
    """The updates of a step with every completion at its longest.

    A trained matrix is multiplied three times: forward, for its input's gradient and for its own. A frozen one, the
    base under adapters, has no gradient of its own: twice.
    """
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    work = _update_work(setup)
    trained, frozen = _matrices(setup.abstract.params), _matrices(setup.abstract.frozen)
    head, passes = a.vocab_size * a.width, 2 if a.lora is not None else 3
    # Below the first block nothing trains under adapters: its q, k and v need no gradient of their input.
    first = a.width * (a.heads + 2 * a.kv_heads) * a.head_dim if a.lora is not None else 0
    again = 1 if a.remat in ("full", "offload") else 0
    flops = 2 * work.places * ((3 + again) * trained + (2 + again) * frozen - first)
    flops += 2 * work.heads * passes * head + (3 + again) * _attention_flops(setup, work)
    products = c.loss.num_iterations * flops / math.prod(mesh.values()) / kind.flops
    # Matrices are read for each product but that of their own gradient, which is written. Optimizer state is both once.
    width = jnp.dtype(a.compute_dtype).itemsize
    reads = _passes(setup) * (3 * trained + 2 * frozen + passes * head) * width / mesh["tensor"]
    state = 2 * _bytes(setup.abstract.opt_state) / size_along(mesh, (*WEIGHTS, "tensor"))
    sent = traffic(setup)
    return LowerBound(products, (reads + state) / kind.bandwidth, sum(sent) / kind.link)


def rollout_lower_bound(setup: Setup, kind: DeviceSpec) -> LowerBound:
    """Prefill and decode of a batch, or of a round of dynamic sampling, with every completion at its longest."""
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    shards, tensor, fsdp = size_along(mesh, ROWS), mesh["tensor"], size_along(mesh, WEIGHTS)
    prompts, g = round_prompts(c) / shards, c.rollout.group_size
    prompt, least, new = setup.task.train.tokens.shape[1], _shortest_prompt(setup), c.rollout.max_new_tokens
    width = jnp.dtype(a.compute_dtype).itemsize
    matrices, head = _matrices(setup.abstract.params) + _matrices(setup.abstract.frozen), a.vocab_size * a.width
    # A prompt gives its group's first token, and the last token of a completion is never read.
    decoded = prompts * g * (new - 1)
    pairs = prompts * prompt * (prompt + 1) / 2 + decoded * (least + new / 2)
    work = _Work(prompts * prompt + decoded, prompts + decoded, pairs, prompt + new)
    products = 2 * work.places * matrices + 2 * work.heads * head + _attention_flops(setup, work)
    cached = 2 * a.layers * a.kv_heads * a.head_dim * width / tensor
    per_token = (matrices + head) * width / tensor + cached * prompts * (least + g * new / 2)
    gathered = _split(setup.abstract.weights) * width * (fsdp - 1) / fsdp / tensor
    return LowerBound(products / tensor / kind.flops, (new - 1) * per_token / kind.bandwidth, gathered / kind.link)


class _Work(NamedTuple):
    """What is computed of a batch, once."""

    places: float
    """Tokens that pass through the blocks."""
    heads: float
    """Tokens whose logits are computed."""
    pairs: float
    """Pairs of a token and one that it attends to, itself included, as if there were no windows."""
    longest: float
    """Tokens that one may attend to at most."""


def _update_work(setup: Setup) -> _Work:
    """What one pass over a step's rows computes at least.

    Packed prompts count as if all were as short as the shortest; a shared prompt counts once for its group.
    """
    c, g = setup.config, setup.config.rollout.group_size
    new, rows = c.rollout.max_new_tokens, c.rollout.prompts * g
    longest = setup.task.train.tokens.shape[1] + new
    if not _packed(setup):
        return _Work(rows * longest, rows * new, rows * longest * (longest + 1) / 2, longest)
    prompt, shared = _shortest_prompt(setup), shares_prompts(setup.model, c)
    places = rows * (new - 1) + prompt * (c.rollout.prompts if shared else rows)
    return _Work(places, rows * new, rows * (new - 1) * (prompt + new / 2), longest)


def _attention_flops(setup: Setup, work: _Work) -> float:
    """Scores and weighted sums, forward. A layer with a window sees at least that share of the pairs."""
    a = setup.architecture
    layers = sum(1 if window is None else min(window / work.longest, 1) for window in a.windows)
    return 4 * a.heads * a.head_dim * layers * work.pairs


def _shortest_prompt(setup: Setup) -> int:
    return int(setup.task.train.lengths.min())


def _matrices(params: Any) -> int:
    """Numbers in the blocks' matrices; 0 of None."""
    layers = params["layers"] if params else {}
    return sum(x.size for x, yes in zip(jax.tree.leaves(layers), jax.tree.leaves(decays(layers)), strict=True) if yes)


def _packed(setup: Setup) -> bool:
    c = setup.config
    rows = c.rollout.prompts * c.rollout.group_size // c.loss.minibatches
    with jax.set_mesh(setup.mesh):
        return packs_lengths(rows, c.rollout.max_new_tokens, c)


def _passes(setup: Setup) -> int:
    """Microbatches of a step; of packed rows, as few as hold them."""
    c = setup.config
    rows = c.rollout.prompts * c.rollout.group_size // c.loss.minibatches
    with jax.set_mesh(setup.mesh):
        if _packed(setup):
            length = padded_length(setup.task.train.tokens.shape[1] + c.rollout.max_new_tokens - 1)
            bins = _update_work(setup).places / c.loss.minibatches / length
            parts = max(math.ceil(bins / bins_at_a_time(rows, c)), 1)
        else:
            parts = rows // microbatch_size(rows, c.loss.microbatch_rows)
    return parts * c.loss.minibatches * c.loss.num_iterations


def _split(tree: Any) -> int:
    """Numbers in weights that fsdp splits."""
    return sum(x.size for x in jax.tree.leaves(tree) if any("fsdp" in str(axis) for axis in x.sharding.spec))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
