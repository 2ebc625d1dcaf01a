"""The least time of a step by arithmetic: a model of the hardware, not a measurement.

Each phase takes at least the larger of what its products need at the devices' stated rate, what its memory traffic
needs, and what its collectives need. Nothing here knows of launch costs, of overlap that fails, or of kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pspo_jax.parallel.devices import Kind
from pspo_jax.parallel.mesh import ROWS, WEIGHTS, microbatch_size, size_along
from pspo_jax.setup import Setup


class Floor(NamedTuple):
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


def update_floor(setup: Setup, kind: Kind) -> Floor:
    """The updates of a step with every completion at its longest."""
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    devices = math.prod(mesh.values())
    rows = c.rollout.prompts * c.rollout.group_size * c.objective.num_iterations
    length = setup.task.train.tokens.shape[1] + c.rollout.max_new_tokens
    forward = rows * _forward_flops(setup, length)
    again = 1 if a.remat in ("full", "offload") else 0
    products = forward * (3 + again) / devices / kind.flops
    # Weights are read for the forward pass, for both gradients, and optimiser state is read and written once.
    width = jnp.dtype(a.compute_dtype).itemsize
    reads = _passes(setup) * 3 * _count(setup.abstract.weights) * width / mesh["tensor"]
    state = 2 * _bytes(setup.abstract.opt_state) / size_along(mesh, (*WEIGHTS, "tensor"))
    sent = traffic(setup)
    return Floor(products, (reads + state) / kind.bandwidth, sum(sent) / kind.link)


def rollout_floor(setup: Setup, kind: Kind) -> Floor:
    """Prefill and decode of a step with every completion at its longest."""
    a, c, mesh = setup.architecture, setup.config, setup.mesh.shape
    shards, tensor, fsdp = size_along(mesh, ROWS), mesh["tensor"], size_along(mesh, WEIGHTS)
    prompts, rows = c.rollout.prompts / shards, c.rollout.prompts * c.rollout.group_size / shards
    prompt, new = setup.task.train.tokens.shape[1], c.rollout.max_new_tokens
    width = jnp.dtype(a.compute_dtype).itemsize
    decoded = rows * (_forward_flops(setup, prompt + new) - _forward_flops(setup, prompt))
    products = (prompts * _forward_flops(setup, prompt) + decoded) / tensor / kind.flops
    cached = 2 * a.layers * a.kv_heads * a.head_dim * width / tensor
    per_token = _count(setup.abstract.weights) * width / tensor + cached * (prompts * prompt + rows * new / 2)
    gathered = _split(setup.abstract.weights) * width * (fsdp - 1) / fsdp / tensor
    return Floor(products, new * per_token / kind.bandwidth, gathered / kind.link)


def _forward_flops(setup: Setup, length: int) -> float:
    """Of one row, with causal attention at half of its square, and with the head at every place."""
    a = setup.architecture
    attention = 2 * a.layers * a.heads * a.head_dim * length
    embedded = 0 if a.tied else a.vocab_size * a.width
    return length * (2 * (_count(setup.abstract.weights) - embedded) + attention)


def _passes(setup: Setup) -> int:
    """Microbatches of a step."""
    c = setup.config
    rows = c.rollout.prompts * c.rollout.group_size // c.objective.minibatches
    with jax.set_mesh(setup.mesh):
        parts = rows // microbatch_size(rows, c.objective.microbatch_rows)
    return parts * c.objective.minibatches * c.objective.num_iterations


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _split(tree: Any) -> int:
    """Numbers in weights that fsdp splits."""
    return sum(x.size for x in jax.tree.leaves(tree) if any("fsdp" in str(axis) for axis in x.sharding.spec))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
